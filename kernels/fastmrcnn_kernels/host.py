"""Where values are cheap to read, and where kernels run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

KERNEL_DEVICES = ("cpu", "cuda")
"""PyTorch's names: ROCm is "cuda", too; a CPU runs kernels under Triton's interpreter."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading a value of `tensor` costs nothing: it is in CPU memory, and real (not traced or fake)."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()
