"""The specification of every operation: plain PyTorch, any device, float64-capable, free of host synchronisation."""
