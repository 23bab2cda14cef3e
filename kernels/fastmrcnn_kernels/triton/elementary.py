"""Elementary functions of float32, as device code: accurate ones, and integers that sort as floats do."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastmrcnn_kernels.triton.launch import INTERPRETED


@triton.jit
def exp(x):
    """e to the power of `x`, to one unit in the last place; `tl.exp` is compiled to an approximation.

    The interpreter has no libdevice, and NumPy's float32 is two units off.
    """
    if INTERPRETED:
        result = tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        result = libdevice.exp(x)
    return result


@triton.jit
def log(x):
    """Natural logarithm of `x`, to one unit in the last place: see `exp`."""
    if INTERPRETED:
        result = tl.log(x.to(tl.float64)).to(tl.float32)
    else:
        result = libdevice.log(x)
    return result


@triton.jit
def swap_order(bits):
    """Bits of a float32 to an int32 that sorts as the float does, and back: two's complement for a sign bit."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def fma(a, b, c):
    """a * b + c with one rounding; products of float32, and all but one sum in 2^29, are as good in float64."""
    if INTERPRETED:
        result = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result
