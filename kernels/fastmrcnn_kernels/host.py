"""Where values are cheap to read, and where kernels run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

KERNEL_DEVICES = ("cpu", "cuda")
"""PyTorch's names: ROCm is "cuda", too; a CPU runs kernels under Triton's interpreter."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading a value of `tensor` costs nothing: it is in CPU memory, and real (not traced or fake)."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()


def begin_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Begins a copy of `tensor` to the CPU; the function that is returned waits for it, and returns it."""
    if not tensor.is_cuda or isinstance(tensor, FakeTensor):
        return lambda: tensor
    with torch.cuda.device_of(tensor):
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        target.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def finish() -> Tensor:
        copied.synchronize()
        return target

    return finish
