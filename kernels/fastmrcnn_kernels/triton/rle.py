"""Run-length encodings of masks that are never formed: where pixels change, down columns, as COCO's text.

Four kernels: how often pixels change in each column; the number before each column, and room for them all; where they
change; and the text.  Masks take room in whatever order their programs come by, so that the result does not depend on
the order but for where in the buffer it lies.

The result is one buffer of bytes, to be copied at once: a row of int32 of two counters, changes and characters of all
masks; a row per mask (`HEADER`); and the texts.  If it was too small for either, the counters tell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.pasting import HEADER, Pasting
from fastmrcnn_kernels.triton.launch import cdiv, on_device_of
from fastmrcnn_kernels.triton.mask_changes import FIELDS, region, rle_count_kernel, rle_write_kernel
from fastmrcnn_kernels.triton.mask_geometry import LAUNCH_OPTIONS

ROWS, COLUMNS = 16, 32  # pixels of a tile
PROGRAMS = 2048  # at least so many, where there are as many blocks of columns
SCANNED = 512  # columns, or run lengths, that a program looks at at a time
OPTIONS = {"num_warps": 4, **LAUNCH_OPTIONS}


@triton.jit(do_not_specialize=["slots", "height", "width"])
def _rle_scan_kernel(
    header_ptr,
    columns_ptr,
    boxes_ptr,
    sizes_ptr,
    counts_ptr,
    slots,
    height,
    width,
    expansion,
    M: tl.constexpr,
    DETECTRON2: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """columns[b, x] = the sum of those before x, and room for all of mask b.  A program owns one mask."""
    mask = tl.program_id(0).to(tl.int64)
    _view, _height, _top, _bottom, left, right = region(
        boxes_ptr, sizes_ptr, counts_ptr, mask, slots, height, width, expansion, 0.0, M, DETECTRON2
    )
    total = (mask * 0).to(tl.int32)
    for first in range(left, right, SCANNED):
        x = first + tl.arange(0, SCANNED)
        count = tl.load(columns_ptr + mask * width + x, mask=x < right, other=0)
        tl.store(columns_ptr + mask * width + x, total + tl.cumsum(count, axis=0) - count, mask=x < right)
        total += tl.sum(count, axis=0)
    start = tl.atomic_add(header_ptr, total, sem="relaxed")
    tl.store(header_ptr + (mask + 1) * FIELDS, start)
    tl.store(header_ptr + (mask + 1) * FIELDS + 1, total)


@triton.jit
def _end_of_run(changes_ptr, start, total, pixels, run):
    """Pixels of a mask up to the end of each `run`, of which it has `total` + 1; 0 of those before the first."""
    change = tl.load(changes_ptr + start + run, mask=(run >= 0) & (run < total), other=0)
    return tl.where(run < total, change, pixels)


@triton.jit
def _characters(changes_ptr, start, total, pixels, run):
    """What each `run` of a mask is written as, and in how many characters: none beyond the last run."""
    end = _end_of_run(changes_ptr, start, total, pixels, run)
    before = _end_of_run(changes_ptr, start, total, pixels, run - 1)
    length = end - before
    earlier = _end_of_run(changes_ptr, start, total, pixels, run - 2) - _end_of_run(
        changes_ptr, start, total, pixels, run - 3
    )
    number = length - tl.where(run > 2, earlier, 0)
    magnitude = number ^ (number >> 31)  # of -1 - number where that is negative
    count = tl.where(magnitude >= 1 << 4, 2, 1)
    for i in tl.static_range(1, 6):
        count = tl.where(magnitude >= 1 << (5 * i + 4), i + 2, count)
    return number, tl.where(run <= total, count, 0)


@triton.jit(do_not_specialize=["slots", "height", "width", "capacity"])
def _rle_text_kernel(
    text_ptr,
    header_ptr,
    changes_ptr,
    sizes_ptr,
    counts_ptr,
    slots,
    height,
    width,
    capacity,
    SCANNED: tl.constexpr,
):
    """Text, area and tight box of a mask.  A program owns one, and goes over its runs twice: for room, and to write.

    Runs are numbered from 0, those of even number are outside.  Run i is written as its length, less that of run i - 2
    from the fourth on, in characters of 5 bits and one that says whether more follow; the sign is the highest bit of
    the last.  A slot without a mask has no text.
    """
    mask = tl.program_id(0).to(tl.int64)
    row_ptr = header_ptr + (mask + 1) * FIELDS
    start = tl.load(row_ptr)
    total = tl.load(row_ptr + 1)
    if sizes_ptr is not None:
        height = tl.load(sizes_ptr + mask // slots * 2).to(tl.int32)
        width = tl.load(sizes_ptr + mask // slots * 2 + 1).to(tl.int32)
    pixels = height * width
    runs = tl.where(start + total <= capacity, total + 1, 0)
    total = tl.where(start + total <= capacity, total, 0)
    if counts_ptr is not None:
        runs = tl.where(mask % slots < tl.load(counts_ptr + mask // slots), runs, 0)
    lengths = tl.zeros([SCANNED], tl.int32)
    areas = tl.zeros([SCANNED], tl.int32)
    tops = tl.zeros([SCANNED], tl.int32) + height
    bottoms = tl.zeros([SCANNED], tl.int32)
    for first in range(0, runs, SCANNED):
        run = first + tl.arange(0, SCANNED)
        _number, count = _characters(changes_ptr, start, total, pixels, run)
        lengths += count
        begin = _end_of_run(changes_ptr, start, total, pixels, run - 1)
        end = _end_of_run(changes_ptr, start, total, pixels, run)
        is_inside = (run % 2 == 1) & (run <= total)
        areas += tl.where(is_inside, end - begin, 0)
        row = begin % height
        wraps = row + end - begin > height  # from the bottom of a column to the top of the next
        tops = tl.minimum(tops, tl.where(is_inside, tl.where(wraps, 0, row), height))
        bottoms = tl.maximum(bottoms, tl.where(is_inside, tl.where(wraps, height, row + end - begin), 0))
    length = tl.sum(lengths, axis=0)
    top = tl.min(tops, axis=0)
    last_inside = total - 1 + total % 2  # runs of odd number are; the last of them
    left = _end_of_run(changes_ptr, start, total, pixels, runs * 0) // height
    right = (_end_of_run(changes_ptr, start, total, pixels, last_inside) - 1) // height
    place = tl.atomic_add(header_ptr + 1, length, sem="relaxed")
    tl.store(row_ptr, place)
    tl.store(row_ptr + 1, length)
    tl.store(row_ptr + 2, tl.sum(areas, axis=0))
    any_inside = total > 0
    tl.store(row_ptr + 3, tl.where(any_inside, left, 0))
    tl.store(row_ptr + 4, tl.where(any_inside, top, 0))
    tl.store(row_ptr + 5, tl.where(any_inside, right - left + 1, 0))
    tl.store(row_ptr + 6, tl.where(any_inside, tl.max(bottoms, axis=0) - top, 0))
    for first in range(0, runs, SCANNED):
        run = first + tl.arange(0, SCANNED)
        number, count = _characters(changes_ptr, start, total, pixels, run)
        target = place + tl.cumsum(count, axis=0) - count
        for i in tl.static_range(7):
            digit = (number & 31) + tl.where(i + 1 < count, 32, 0) + 48
            stored = (i < count) & (target + i < capacity)
            tl.store(text_ptr + target + i, digit.to(tl.uint8), mask=stored)
            number = number >> 5
        place += tl.sum(count, axis=0)


def _encode(
    masks: Tensor,
    boxes: Tensor | None,
    sizes: Tensor | None,
    counts: Tensor | None,
    slots: int,
    size: tuple[int, int],
    capacity: int,
    pasting: Pasting,
) -> Tensor:
    """The buffer that the text of this module describes; without `boxes`, masks are images [D, H, W] of bytes."""
    height, width = size
    number = len(masks) if boxes is None else len(masks) * slots
    mask_size = 0 if boxes is None else masks.shape[-1]
    expansion = 1.0 if boxes is None else (mask_size + 2 * pasting.padding) / mask_size
    head = 4 * HEADER * (number + 1)
    buffer = torch.zeros(head + capacity, dtype=torch.uint8, device=masks.device)
    if not number:
        return buffer
    header, text = buffer[:head].view(torch.int32), buffer[head:]
    columns = torch.empty(number, width, dtype=torch.int32, device=masks.device)
    changes = torch.empty(capacity, dtype=torch.int32, device=masks.device)
    where = (boxes, sizes, counts, slots, height, width)
    constants = (mask_size, pasting.padding, pasting.detectron2, ROWS, COLUMNS)
    grid = (number, min(cdiv(width, COLUMNS), cdiv(PROGRAMS, number)))
    with on_device_of(masks):
        rle_count_kernel[grid](columns, masks, *where, expansion, pasting.threshold, *constants, **OPTIONS)
        _rle_scan_kernel[(number,)](
            header, columns, *where, expansion, mask_size, pasting.detectron2, SCANNED, **OPTIONS
        )
        rle_write_kernel[grid](
            changes, header, columns, masks, *where, capacity, expansion, pasting.threshold, *constants, **OPTIONS
        )
        _rle_text_kernel[(number,)](
            text, header, changes, sizes, counts, slots, height, width, capacity, SCANNED, **OPTIONS
        )
    return buffer


def encode_masks(
    masks: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    counts: Tensor | None,
    height: int,
    width: int,
    capacity: int,
    detectron2: bool,
    padding: int,
    threshold: float,
) -> Tensor:
    """Masks, float32 [N, D, M, M], in boxes [N, D, 4] of images of `sizes`, int64 [N, 2], none above `height`, `width`.

    Returns the buffer that the text of this module describes, with `capacity` bytes of text.
    """
    masks, boxes, sizes = masks.contiguous(), boxes.contiguous(), sizes.contiguous()
    pasting = Pasting(detectron2, padding, threshold)
    return _encode(masks, boxes, sizes, counts, masks.shape[1], (height, width), capacity, pasting)


def encode_bool(masks: Tensor, capacity: int) -> Tensor:
    """The same of masks, bool [D, H, W]."""
    pixels = masks.contiguous().view(torch.uint8)
    size = (masks.shape[1], masks.shape[2])
    return _encode(pixels, None, None, None, 1, size, capacity, Pasting(False, 0, 0.0))
