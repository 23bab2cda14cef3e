"""The operations of a two-stage detector: reference definitions and Triton kernels.  Knows torch, never fastmrcnn."""
