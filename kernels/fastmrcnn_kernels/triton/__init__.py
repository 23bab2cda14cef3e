"""The operations as Triton kernels: one file per operation, device code first, then the host's launcher."""
