"""Small masks pasted into images: linear interpolation along x, then along y.

With either semantics a pixel lies between two cells per axis, its taps.  In float32 the first product of each sum is
not rounded, as compilers arrange it in PyTorch's `interpolate` on a GPU.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastmrcnn_kernels.pasting import REACH, Pasting, layout
from fastmrcnn_kernels.reference.bits import pack_bits


class Taps(NamedTuple):
    """Where the pixels of an axis lie: two cells each, int64 [P, 2], their weights [P, 2], and whether they do, [P]."""

    cells: Tensor
    weights: Tensor
    inside: Tensor


def is_usable(boxes: Tensor) -> Tensor:
    """Whether boxes [..., 4] are finite and within `REACH`; others give empty masks."""
    return (boxes.abs() <= REACH).all(dim=-1)


def expanded(boxes: Tensor, mask_size: int, padding: int) -> Tensor:
    """Integer pixel boxes [..., 4], ends inclusive, that masks padded by `padding` cover.

    A mask of `mask_size` cells fills its box; with its border it fills one that is larger about the same centre.  The
    corners are then truncated to integers (torchvision's `paste_masks_in_image`, after Detectron's).
    """
    scale = float(mask_size + 2 * padding) / mask_size
    centre = (boxes[..., 2:] + boxes[..., :2]) * 0.5
    half = (boxes[..., 2:] - boxes[..., :2]) * 0.5 * scale
    return torch.cat((centre - half, centre + half), dim=-1).to(torch.int64)


def axis_taps(box: Tensor, axis: int, pixel: Tensor, mask_size: int, pasting: Pasting) -> Taps:
    """Taps of each `pixel`, int64 [P], of the x (0) or y (1) `axis` of a usable `box` [4].

    Cells may be beyond the mask: those hold zeros.
    """
    low, high = box[axis], box[axis + 2]
    if pasting.detectron2:
        place = (pixel.to(box.dtype) + 0.5 - low) / (high - low) * 2 - 1
        place = ((place + 1) * mask_size - 1) / 2
        inside = (place > -1) & (place < mask_size)
        place = torch.where(inside, place, 0)
        cell = place.floor()
        beyond, padding = cell + 1, 0
    else:
        corners, padding = expanded(box, mask_size, pasting.padding), pasting.padding
        first, last = corners[axis], corners[axis + 2]
        cells = mask_size + 2 * padding
        count = (last - first + 1).clamp(min=1).to(box.dtype)
        step = torch.full_like(count, cells) / count  # a number would be multiplied by the reciprocal
        place = fused((pixel - first).to(box.dtype) + 0.5, step, torch.full_like(step, -0.5)).clamp(min=0)
        inside = (pixel >= first) & (pixel <= last)
        cell = place.floor().clamp(max=cells - 1)
        beyond = (cell + 1).clamp(max=cells - 1)
    share = (place - cell).clamp(0, 1)
    return Taps(torch.stack((cell, beyond), -1).to(torch.int64) - padding, torch.stack((1 - share, share), -1), inside)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c; in float32 as if rounded once.

    Products of float32 are exact in float64, and so, but for one case in 2^29, is what their sum is rounded from.
    """
    return a * b + c if a.dtype != torch.float32 else (a.double() * b.double() + c.double()).float()


def mix(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Sum of two tensors by two `weights` [..., 2]."""
    return fused(first, weights[..., 0], second * weights[..., 1])


def paste(mask: Tensor, box: Tensor, y: Tensor, x: Tensor, pasting: Pasting) -> Tensor:
    """Pixels in rows `y` and columns `x`, int64 [H] and [W], of one `mask` [M, M] in a usable `box` [4]: [H, W]."""
    rows, columns = (axis_taps(box, axis, pixel, len(mask), pasting) for axis, pixel in ((1, y), (0, x)))
    bordered = functional.pad(mask, (1, 1, 1, 1))
    left, right = (columns.cells + 1).clamp(0, len(mask) + 1).unbind(-1)
    top, bottom = (rows.cells + 1).clamp(0, len(mask) + 1).unbind(-1)
    along_x = mix(bordered[:, left], bordered[:, right], columns.weights)
    pasted = mix(along_x[top], along_x[bottom], rows.weights[:, None])
    return torch.where(rows.inside[:, None] & columns.inside, pasted, 0)


def is_inside(soft: Tensor, pasting: Pasting) -> Tensor:
    """Which pixels belong to a mask."""
    return soft >= pasting.threshold if pasting.detectron2 else soft > pasting.threshold


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    canvas: tuple[int, int],
    sizes: Tensor | None,
    counts: Tensor | None,
    pasting: Pasting,
    out: str,
) -> Tensor:
    """Masks [N, D, M, M], float32 or float64, in boxes [N, D, 4]; see `fastmrcnn.ops.paste_masks`."""
    images, slots = boxes.shape[:2]
    y, x = (torch.arange(side, device=masks.device) for side in canvas)
    present = is_usable(boxes)
    if counts is not None:
        present = present & (torch.arange(slots, device=masks.device) < counts[:, None])
    boxes, masks = torch.where(present[..., None], boxes, 0), torch.where(present[..., None, None], masks, 0)
    shape, dtype = layout(canvas, out, masks.dtype)
    pasted = []
    for i, d in product(range(images), range(slots)):  # one canvas at a time
        soft = paste(masks[i, d], boxes[i, d], y, x, pasting)
        if sizes is not None:
            soft = torch.where((y < sizes[i, 0])[:, None] & (x < sizes[i, 1]), soft, 0)
        pasted.append(pack_bits(is_inside(soft, pasting)) if out == "bits" else soft)
    stacked = torch.stack(pasted) if pasted else masks.new_zeros(0, *shape)
    result = is_inside(stacked, pasting) if out == "bool" else stacked.to(dtype)
    return result.unflatten(0, (images, slots))
