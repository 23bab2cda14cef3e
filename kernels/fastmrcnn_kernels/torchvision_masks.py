"""Masks pasted as torchvision and detectron2 do it, one by one, but only where there is something: fast on a CPU.

They enlarge a mask by PyTorch's `interpolate`, or sample it by `grid_sample`; so do these, to the same bits but for
boxes far larger than the image.  Memory of the rest is the system's, which hands it out as zeros, and is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastmrcnn_kernels import numpy_bits
from fastmrcnn_kernels.pasting import WORD, Pasting, layout
from fastmrcnn_kernels.reference import bits as reference_bits
from fastmrcnn_kernels.reference import paste as reference
from fastmrcnn_kernels.reference.rle import Encoded, encoded, run_lengths

AFFORDABLE, WASTE = 1 << 20, 4
"""Pixels that an enlarged mask may have, or how many times those seen of it; else these alone are computed."""

Window = tuple[int, int, int, int]
"""Left, top, right and bottom, the latter two after the last pixel."""

Crop = tuple[int, int, int, int, Tensor]
"""Image, slot, top, left and soft mask of what can be seen of a pasted mask, [h, w]."""


def crops(masks: Tensor, boxes: Tensor, sizes: Tensor, counts: Tensor | None, pasting: Pasting) -> Iterator[Crop]:
    """What can be seen of each of the masks [N, D, M, M]; arguments as for the reference.  Synchronises."""
    mask_size = masks.shape[-1]
    seen = windows(boxes, sizes[:, None], mask_size, pasting)
    corners = reference.expanded(
        torch.where(reference.is_usable(boxes)[..., None], boxes, 0), mask_size, pasting.padding
    )
    number = [boxes.shape[1]] * len(boxes) if counts is None else counts.tolist()
    for i, (image_windows, image_corners) in enumerate(zip(seen.tolist(), corners.tolist(), strict=True)):
        for d in range(number[i]):
            left, top, right, bottom = image_windows[d]
            if left < right and top < bottom:
                window = (left, top, right, bottom)
                if pasting.detectron2:
                    soft = sampled(masks[i, d], boxes[i, d], window)
                else:
                    soft = enlarged(masks[i, d], boxes[i, d], image_corners[d], window, pasting)
                yield i, d, top, left, soft


def windows(boxes: Tensor, sizes: Tensor, mask_size: int, pasting: Pasting) -> Tensor:
    """Pixels of images of `sizes` [..., 2] beyond which masks are zero: x, y of the first and after the last, [..., 4].

    Both are the same where there are none.
    """
    usable = reference.is_usable(boxes)[..., None]
    boxes = torch.where(usable, boxes, 0)
    if pasting.detectron2:
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
        rounding = 1 + (low.abs() + high.abs()) * 2.0**-20  # what it may lose, and a pixel
        reach = (high - low) * (0.5 / mask_size) + rounding  # half a cell
        first, end = (low - reach).floor().to(torch.int64), (high + reach).ceil().to(torch.int64)
    else:
        first, last = reference.expanded(boxes, mask_size, pasting.padding).split(2, dim=-1)
        end = last + 1
    first, end = first.clamp(min=0), torch.minimum(end, sizes.flip(-1))
    end = torch.where(usable, torch.maximum(first, end), first)
    return torch.cat((first, end), dim=-1)


def enlarged(mask: Tensor, box: Tensor, corners: list[int], window: Window, pasting: Pasting) -> Tensor:
    """A `window` of a mask [M, M] that torchvision enlarges to a box of integer `corners`, ends inclusive."""
    left, top, right, bottom = window
    width, height = corners[2] - corners[0] + 1, corners[3] - corners[1] + 1
    if width * height > max(AFFORDABLE, WASTE * (right - left) * (bottom - top)):
        y, x = (torch.arange(*ends, device=mask.device) for ends in ((top, bottom), (left, right)))
        return reference.paste(mask, box, y, x, pasting)
    padded = functional.pad(mask[None, None], (pasting.padding,) * 4)
    full = functional.interpolate(padded, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    return full[top - corners[1] : bottom - corners[1], left - corners[0] : right - corners[0]]


def sampled(mask: Tensor, box: Tensor, window: Window) -> Tensor:
    """A `window` of a mask [M, M] that detectron2 samples in its `box`; NaN, as of boxes without extent, is 0."""
    left, top, right, bottom = window
    x, y = (torch.arange(*ends, device=mask.device, dtype=box.dtype) + 0.5 for ends in ((left, right), (top, bottom)))
    x, y = ((pixel - box[i]) / (box[i + 2] - box[i]) * 2 - 1 for i, pixel in enumerate((x, y)))
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
    return functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0].nan_to_num(nan=0.0)


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in the memory of a CPU they cost nothing until they are read or written."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, str(dtype).removeprefix("torch.")))


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    canvas: tuple[int, int],
    sizes: Tensor | None,
    counts: Tensor | None,
    pasting: Pasting,
    out: str,
) -> Tensor:
    """See `fastmrcnn.ops.paste_masks`; synchronises."""
    shape, dtype = layout(canvas, out, masks.dtype)
    if sizes is None:
        sizes = torch.tensor(canvas, device=masks.device).expand(len(masks), 2)
    pack_bits = numpy_bits.pack_bits if masks.device.type == "cpu" else reference_bits.pack_bits
    result = blank((*boxes.shape[:2], *shape), dtype, masks.device)
    for i, d, top, left, soft in crops(masks, boxes, sizes, counts, pasting):
        bottom, right = top + soft.shape[0], left + soft.shape[1]
        if out == "soft":
            result[i, d, top:bottom, left:right] = soft
        elif out == "bool":
            result[i, d, top:bottom, left:right] = reference.is_inside(soft, pasting)
        else:
            inside = functional.pad(reference.is_inside(soft, pasting), (left % WORD, 0))
            result[i, d, top:bottom, left // WORD : -(-right // WORD)] = pack_bits(inside)
    return result


def encode_masks(
    masks: Tensor, boxes: Tensor, sizes: Sequence[tuple[int, int]], counts: Tensor | None, pasting: Pasting
) -> Callable[[], list[Encoded]]:
    """See `fastmrcnn.ops.begin_encoding`; nothing is left to be done later."""
    number = [boxes.shape[1]] * len(boxes) if counts is None else counts.tolist()
    runs = [[np.array([height * width])] * n for (height, width), n in zip(sizes, number, strict=True)]
    on_device = torch.tensor(sizes, dtype=torch.int64, device=masks.device).view(-1, 2)
    for i, d, top, left, soft in crops(masks, boxes, on_device, counts, pasting):
        pixels = reference.is_inside(soft, pasting).cpu().numpy()
        runs[i][d] = run_lengths(pixels, top, left, *sizes[i])
    found = [encoded(x, *size) for x, size in zip(runs, sizes, strict=True)]
    return lambda: found
