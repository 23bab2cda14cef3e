"""Packed masks: one bit per pixel, an eighth of what bool masks take.

`bits` are int32 [..., H, ceil(W / 32)]: pixel 32 w + k of a row is bit k of its word w, the least significant being
bit 0, and bits beyond the width W are zero.  In memory that is, on little-endian machines,
`numpy.packbits(mask, axis=-1, bitorder="little")` filled up to whole words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check
from fastmrcnn.ops.implementations import Impl, choose, choose_kernel
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.pasting import WORD
from fastmrcnn_kernels.reference import bits as reference


def pack_bits(mask: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Bits, int32 [..., H, ceil(W / 32)], of bool `mask` [..., H, W]."""
    _check_masks("mask", mask, torch.bool)
    return choose("pack_bits", impl, "numpy" if on_host(mask) else "reference")(mask)


def unpack_bits(bits: Tensor, width: int, *, impl: Impl = "auto") -> Tensor:
    """Bool masks [..., H, `width`] of `bits` [..., H, ceil(width / 32)]."""
    _check_masks("bits", bits)
    _check_width("bits", bits, width)
    return choose("unpack_bits", impl, "numpy" if on_host(bits) else "reference")(bits, width)


def count_bits(bits: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Areas in pixels, int64 [...], of masks `bits` [..., H, ceil(W / 32)]."""
    _check_masks("bits", bits)
    return choose("count_bits", impl, "numpy" if on_host(bits) else "reference")(bits)


def mask_iou(a: Tensor, b: Tensor, *, crowd: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Intersection over union of all pairs of masks.

    Args:
        a: bits [A, H, ceil(W / 32)].
        b: bits [B, H, ceil(W / 32)], of the same image size.
        crowd: which masks of `b` are crowds, bool [B]; none by default.  The area of a stands for that of its union
            with a crowd, of which it may be any part.

    Returns:
        float32 [A, B]; 0 where both masks are empty.  The order of arguments and results is that of
        `pycocotools.mask.iou(dt, gt, iscrowd)`, whose float64 numbers these are, rounded (masks of less than 2^24
        pixels; above, counts are rounded before they are divided).
    """
    check("a", a, None, None, None, dtype=torch.int32)
    check("b", b, None, *a.shape[1:], dtype=torch.int32)
    if crowd is not None:
        check("crowd", crowd, len(b), dtype=torch.bool)
    _, run = choose_kernel("mask_iou", impl, a, "numpy" if on_host(a) else "reference", "bits", (torch.int32,))
    return run(a, b, crowd)


def mask_boundary(bits: Tensor, distance: int) -> Tensor:
    """Those pixels of masks that are near their outside.

    Args:
        bits: [..., H, ceil(W / 32)].
        distance: in pixels, in the chessboard metric: a pixel is near if the square of 2 `distance` + 1 pixels about
            it reaches a pixel that is not of the mask, or beyond the image.  0: none is.

    Returns:
        Bits like `bits`.  With the `distance` of `boundary_iou`, the inner boundary of Boundary IoU (Cheng et al.,
        CVPR 2021) as its authors compute it.
    """
    _check_masks("bits", bits)
    if distance < 0:
        raise ValueError(f"distance={distance}: expected 0 or more")
    return reference.mask_boundary(bits, distance)


def boundary_iou(
    a: Tensor,
    b: Tensor,
    width: int,
    distance: int | None = None,
    *,
    crowd: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Boundary IoU of all pairs of masks (Cheng et al., CVPR 2021): `mask_iou` of their boundaries.

    What the paper's boundary AP takes for the overlap of two masks is the lesser of this and `mask_iou`.

    Args:
        a: bits [A, H, ceil(`width` / 32)].
        b: bits [B, H, ceil(`width` / 32)].
        width: of the image, in pixels.
        distance: of `mask_boundary`; by default 2 % of the image's diagonal, rounded, but 1 pixel at least.
        crowd: as `mask_iou` has it.
        impl: of `mask_iou`.

    Returns:
        float32 [A, B].
    """
    check("a", a, None, None, None, dtype=torch.int32)
    check("b", b, None, *a.shape[1:], dtype=torch.int32)
    _check_width("a", a, width)
    if distance is None:
        distance = max(1, round(0.02 * math.sqrt(a.shape[1] ** 2 + width**2)))
    return mask_iou(mask_boundary(a, distance), mask_boundary(b, distance), crowd=crowd, impl=impl)


def _check_masks(name: str, masks: Tensor, dtype: torch.dtype = torch.int32) -> None:
    check(name, masks, *(None,) * max(2, getattr(masks, "ndim", 2)), dtype=dtype)


def _check_width(name: str, bits: Tensor, width: int) -> None:
    if -(-width // WORD) != bits.shape[-1]:
        raise ValueError(f"width={width}: expected one that fills {bits.shape[-1]} words of {name}, by 32 pixels each")
