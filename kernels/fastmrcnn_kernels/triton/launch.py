"""What the launchers of all kernels share."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Kernels imported under TRITON_INTERPRET=1 run on CPU tensors, slowly, for tests."""

LINE = 128
"""Bytes of a cache line: what a program reads of a cell, or writes to it, at a time."""


def cdiv(a: int, b: int) -> int:
    """`a` / `b`, rounded up; Triton's own function of this name takes microseconds outside kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than `n`, of which the same is true."""
    return 1 << (n - 1).bit_length()


def runtime_ints(values: Iterable[int]) -> tuple[int, ...]:
    """`values`, 0 or more, for `select_int` to read: 2 v + 3 is neither 1 nor a multiple of 16.

    For each of those Triton would compile the kernel anew: inside tuples it ignores `do_not_specialize`.
    """
    return tuple([2 * value + 3 for value in values])


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `tensor` the one that kernels are launched on; ValueError if it cannot run them."""
    if tensor.is_cuda:
        elsewhere = torch.cuda.is_initialized() and tensor.get_device() != torch.cuda.current_device()
        return torch.cuda.device_of(tensor) if elsewhere else nullcontext()
    if INTERPRETED.value and tensor.device.type == "cpu":
        return nullcontext()
    raise ValueError(
        f"impl='triton': tensors are on {tensor.device.type!r}, kernels need a CUDA or ROCm device "
        "(or TRITON_INTERPRET=1 in the environment, to run them slowly on a CPU)"
    )
