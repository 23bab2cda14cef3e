"""Where pixels of masks change, down columns, as device code: in masks pasted into their boxes, or in images of masks.

The two kernels that look at pixels are here: one counts the changes of each column, one writes where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmrcnn_kernels.pasting import HEADER
from fastmrcnn_kernels.triton.mask_geometry import exceeds, load_mask, sample, window

FIELDS = tl.constexpr(HEADER)


@triton.jit
def _inside(masks_ptr, view, y, x, M: tl.constexpr, PADDING: tl.constexpr, DETECTRON2: tl.constexpr):
    """Whether pixels [Y, X] in rows `y` and columns `x` are inside a mask; M is 0 for masks that are images already.

    A `view` is the number of a mask, its box, the size of its image, and what else `region` knows of it.
    """
    mask, x1, y1, x2, y2, height, width, expansion, threshold = view
    present = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None, :]
    if M == 0:
        place = (mask * height + y[:, None]) * width + x[None, :]
        result = tl.load(masks_ptr + place, mask=present, other=0) != 0
    else:
        value = sample(masks_ptr + mask * (M * M), y, x, x1, y1, x2, y2, expansion, M, PADDING, DETECTRON2)
        result = present & exceeds(value, threshold, DETECTRON2)
    return result


@triton.jit
def region(
    boxes_ptr,
    sizes_ptr,
    counts_ptr,
    mask,
    slots,
    height,
    width,
    expansion,
    threshold,
    M: tl.constexpr,
    DETECTRON2: tl.constexpr,
):
    """A view of a mask, the height of its image; rows and columns, first and after the last, where pixels may change.

    That is in its window, and one further: below, or at the top of the next column.
    """
    if M == 0:
        x1 = (mask * 0).to(tl.float32)
        y1 = x1
        x2 = x1
        y2 = x1
        top = height * 0
        bottom = height
        left = width * 0
        right = width
    else:
        x1, y1, x2, y2, height, width = load_mask(boxes_ptr, sizes_ptr, counts_ptr, mask, slots, height, width)
        top, bottom = window(y1, y2, height, expansion, M, DETECTRON2)
        left, right = window(x1, x2, width, expansion, M, DETECTRON2)
    right = tl.where(bottom > top, tl.minimum(right + 1, width), left)
    view = (mask, x1, y1, x2, y2, height, width, expansion, threshold)
    return view, height, tl.maximum(top, 1), tl.minimum(bottom + 1, height), left, right


@triton.jit
def _changes(masks_ptr, view, y, x, M: tl.constexpr, PADDING: tl.constexpr, DETECTRON2: tl.constexpr):
    """Whether pixels [Y, X] differ from those above them."""
    here = _inside(masks_ptr, view, y, x, M, PADDING, DETECTRON2)
    return here != _inside(masks_ptr, view, y - 1, x, M, PADDING, DETECTRON2)


@triton.jit
def _changes_at_top(masks_ptr, view, x, M: tl.constexpr, PADDING: tl.constexpr, DETECTRON2: tl.constexpr):
    """Whether the first pixels of columns `x` differ from the last ones of the columns before: 0 or 1, [X]."""
    _mask, _x1, _y1, _x2, _y2, height, width, _expansion, _threshold = view
    first = tl.zeros([1], tl.int32)
    here = _inside(masks_ptr, view, first, x, M, PADDING, DETECTRON2)
    before = _inside(masks_ptr, view, first + height - 1, x - 1, M, PADDING, DETECTRON2)
    return tl.max(tl.where((here != before) & (x < width)[None, :], 1, 0), axis=0)


@triton.jit(do_not_specialize=["slots", "height", "width"])
def rle_count_kernel(
    columns_ptr,
    masks_ptr,
    boxes_ptr,
    sizes_ptr,
    counts_ptr,
    slots,
    height,
    width,
    expansion,
    threshold,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    DETECTRON2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """columns[b, x] = how many pixels of column x of mask b differ from the one before, down columns.

    The programs of a mask take blocks of its columns in turn, those alone where pixels may change.
    """
    mask = tl.program_id(0).to(tl.int64)
    view, _height, top, bottom, left, right = region(
        boxes_ptr, sizes_ptr, counts_ptr, mask, slots, height, width, expansion, threshold, M, DETECTRON2
    )
    for first in range(left + tl.program_id(1) * COLUMNS, right, tl.num_programs(1) * COLUMNS):
        x = first + tl.arange(0, COLUMNS)
        count = _changes_at_top(masks_ptr, view, x, M, PADDING, DETECTRON2)
        for row in range(top, bottom, ROWS):
            y = row + tl.arange(0, ROWS)
            changes = _changes(masks_ptr, view, y, x, M, PADDING, DETECTRON2)
            count += tl.sum(tl.where(changes & (y < bottom)[:, None], 1, 0), axis=0)
        tl.store(columns_ptr + mask * width + x, count, mask=x < right)


@triton.jit(do_not_specialize=["slots", "height", "width", "capacity"])
def rle_write_kernel(
    changes_ptr,
    header_ptr,
    columns_ptr,
    masks_ptr,
    boxes_ptr,
    sizes_ptr,
    counts_ptr,
    slots,
    height,
    width,
    capacity,
    expansion,
    threshold,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    DETECTRON2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """changes[start of mask b + i] = x height + y of the i-th pixel (y, x) that differs from the one before.

    Programs own what those of `rle_count_kernel` do.
    """
    mask = tl.program_id(0).to(tl.int64)
    view, image_height, top, bottom, left, right = region(
        boxes_ptr, sizes_ptr, counts_ptr, mask, slots, height, width, expansion, threshold, M, DETECTRON2
    )
    start = tl.load(header_ptr + (mask + 1) * FIELDS)
    for first in range(left + tl.program_id(1) * COLUMNS, right, tl.num_programs(1) * COLUMNS):
        x = first + tl.arange(0, COLUMNS)
        place = start + tl.load(columns_ptr + mask * width + x, mask=x < right, other=0)
        at_top = _changes_at_top(masks_ptr, view, x, M, PADDING, DETECTRON2)
        stored = (at_top != 0) & (x < right) & (place < capacity)
        tl.store(changes_ptr + place, x * image_height, mask=stored)
        place += at_top
        for row in range(top, bottom, ROWS):
            y = row + tl.arange(0, ROWS)
            changes = _changes(masks_ptr, view, y, x, M, PADDING, DETECTRON2)
            marks = tl.where(changes & (y < bottom)[:, None] & (x < right)[None, :], 1, 0)
            target = place[None, :] + tl.cumsum(marks, axis=0) - marks
            position = x[None, :] * image_height + y[:, None]
            tl.store(changes_ptr + target, position, mask=(marks != 0) & (target < capacity))
            place += tl.sum(marks, axis=0)
