"""Targets of the mask head: one launch for the boxes of all images, which reads bits and nothing else.

Wy V Wx^T of `reference/roi_align.py`, where the mask V that a view defines is never there: a cell of it is one bit of
one word.  What that costs follows from the boxes of a training step, 128 per image, 100 to 400 pixels wide, of 28 x 28
bins.  A bin of 10 x 10 pixels has weights for 12 x 12 cells, so that all bins of a box look at 28^2 * 144 = 113,000
bits, by ten instructions each.  A weight takes 150; columns have 28 * 12 of them, and rows as many.  So the weights of
columns stay in registers while the rows of several bins pass by; those of the rows of a bin are computed by the lanes
of a warp, one each, and summed up to be known to all when their row's turn comes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.pasting import WORD
from fastmrcnn_kernels.triton.launch import cdiv, next_power_of_2, on_device_of
from fastmrcnn_kernels.triton.roi_geometry import (
    LAUNCH_OPTIONS,
    bin_weight,
    interval,
    on_map,
    sample_position,
    samples_per_bin,
)
from fastmrcnn_kernels.views import COLUMNS

DOWN, ACROSS = 4, 32  # bins of a program
CELLS = 16  # columns of each bin that are visited together
LINES = 32  # rows of a bin whose weights are computed together
LANES = 256  # columns of bins per warp


@triton.jit
def _load_axis(axis_ptr):
    """What a view says of an axis: lengths of the mask and of it resized, start of the window, and its length, a float.

    The first three are int32.
    """
    size = tl.load(axis_ptr).to(tl.int32)
    resized = tl.load(axis_ptr + 2).to(tl.int32)
    start = tl.load(axis_ptr + 4).to(tl.int32)
    return size, resized, start, tl.load(axis_ptr + 6).to(tl.float32)


@triton.jit
def _cells_of_bin(start, size, b, count, length):
    """First cell that may have a weight in bin `b`, and how many there are from it on, floats: at least one."""
    low = on_map(sample_position(start, size, b, 0, count, 0, False), length)
    high = on_map(sample_position(start, size, b, count - 1, count, 0, False), length)
    first = tl.floor(low)
    return first, tl.minimum(tl.floor(high) + 1, length - 1) - first + 1


@triton.jit
def _nearest(cell, first, size, resized):
    """Which of the `size` pixels of an axis, resized to `resized`, cell `cell` of a window from `first` on shows."""
    ratio = tl.div_rn(size.to(tl.float32), resized.to(tl.float32))
    pixel = tl.floor((first.to(tl.float32) + cell) * ratio).to(tl.int32)
    return tl.minimum(tl.maximum(pixel, 0), size - 1)


@triton.jit(do_not_specialize=["total", "slots"])
def _mask_targets_kernel(
    out_ptr,
    words_ptr,
    offsets_ptr,
    views_ptr,
    boxes_ptr,
    matched_ptr,
    valid_ptr,
    total,
    slots,
    M: tl.constexpr,
    WORD: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    CELLS: tl.constexpr,
    LINES: tl.constexpr,
):
    """out[p, q] = sum_y Wy[p, y] sum_x bit(y, x) Wx[q, x], where bit(y, x) is one of the `total` words.

    A program owns DOWN x ACROSS of the M x M bins of one box.  A lane stands for one of ACROSS bins, and one of CELLS
    columns of that; bins are neighbours, and so are the words they read.  The rows of its DOWN rows of bins are added
    up one after the other.  Wider bins take several turns.  Boxes that are not usable have no columns.
    """
    BLOCKS_ACROSS: tl.constexpr = (M + ACROSS - 1) // ACROSS
    BLOCKS: tl.constexpr = (M + DOWN - 1) // DOWN * BLOCKS_ACROSS
    image = tl.program_id(0) // (BLOCKS * slots)
    box = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    lane = tl.arange(0, ACROSS * CELLS)
    q = block % BLOCKS_ACROSS * ACROSS + lane % ACROSS
    p_first = block // BLOCKS_ACROSS * DOWN

    valid = tl.load(valid_ptr + box) != 0
    view_ptr = views_ptr + image.to(tl.int64) * COLUMNS
    height, resized_height, top, tall = _load_axis(view_ptr)
    width, resized_width, left, wide = _load_axis(view_ptr + 1)
    usable = valid & (tl.minimum(tl.minimum(height, width), tl.minimum(resized_height, resized_width)) > 0)
    usable = usable & (tl.minimum(tall, wide) > 0)

    pitch = tl.cdiv(width, WORD)
    words = height.to(tl.int64) * pitch
    first_word = tl.load(offsets_ptr + image) + tl.load(matched_ptr + box, mask=valid, other=0) * words
    usable = usable & (first_word >= 0) & (first_word <= total - words)
    mask_ptr = words_ptr + tl.where(usable, first_word, 0)

    x1 = tl.load(boxes_ptr + box * 4, mask=valid, other=0.0)
    y1 = tl.load(boxes_ptr + box * 4 + 1, mask=valid, other=0.0)
    x2 = tl.load(boxes_ptr + box * 4 + 2, mask=valid, other=0.0)
    y2 = tl.load(boxes_ptr + box * 4 + 3, mask=valid, other=0.0)
    start_y, size_y = interval(y1, y2, 1.0, M, False, False)
    start_x, size_x = interval(x1, x2, 1.0, M, False, False)
    infinity = float("inf")
    usable = usable & (tl.abs(x1) < infinity) & (tl.abs(x2) < infinity) & (size_x < infinity)
    usable = usable & (tl.abs(y1) < infinity) & (tl.abs(y2) < infinity) & (size_y < infinity)
    count_y = samples_per_bin(size_y, 0, False)
    count_x = samples_per_bin(size_x, 0, False)

    first_x, columns = _cells_of_bin(start_x, size_x, q, count_x, wide)
    columns = tl.max(tl.where(usable & (q < M), columns, 0.0), axis=0).to(tl.int32)
    result = tl.zeros([DOWN, ACROSS], tl.float32)
    line = tl.arange(0, LINES)
    for begin in range(0, columns, CELLS):
        x = first_x + begin + lane // ACROSS
        weight_x = bin_weight(x, q, start_x, size_x, wide, 0, False, False)
        column = _nearest(x, left, width, resized_width)
        word = column // WORD
        bit = 1 << column % WORD
        for i in range(tl.minimum(DOWN, M - p_first)):
            p = p_first + i
            first_y, rows = _cells_of_bin(start_y, size_y, p, count_y, tall)
            rows = rows.to(tl.int32)
            sums = tl.zeros([CELLS * ACROSS], tl.float32)
            for above in range(0, rows, LINES):
                weight_y = bin_weight(first_y + above + line, p, start_y, size_y, tall, 0, False, False)
                for j in range(tl.minimum(rows - above, LINES)):
                    row = _nearest(first_y + above + j, top, height, resized_height)
                    found = tl.load(mask_ptr + (row * pitch + word))  # an object has fewer than 2^31 words
                    weight = tl.sum(tl.where(line == j, weight_y, 0.0), axis=0)
                    sums += tl.where(found & bit != 0, weight, 0.0)
            pooled = tl.sum((sums * weight_x).reshape(CELLS, ACROSS), axis=0)
            result += tl.where((tl.arange(0, DOWN) == i)[:, None], pooled[None, :], 0.0)

    p = p_first + tl.arange(0, DOWN)
    q = block % BLOCKS_ACROSS * ACROSS + tl.arange(0, ACROSS)
    out = out_ptr + box * (M * M) + p[:, None] * M + q[None, :]
    tl.store(out, result, mask=(p < M)[:, None] & (q < M)[None, :])


def mask_targets(
    words: Tensor, offsets: Tensor, views: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, size: int
) -> Tensor:
    """Targets [N, S, M, M], float32, as the reference returns them."""
    images, slots = boxes.shape[:2]
    targets = boxes.new_empty(images, slots, size, size)
    down, across = min(DOWN, next_power_of_2(size)), min(ACROSS, next_power_of_2(size))
    programs = images * slots * cdiv(size, down) * cdiv(size, across)
    if programs:
        with on_device_of(boxes):
            _mask_targets_kernel[(programs,)](
                targets,
                words.contiguous(),
                offsets.contiguous(),
                views.contiguous(),
                boxes.contiguous(),
                matched.contiguous(),
                valid.contiguous(),
                len(words),
                slots,
                size,
                WORD,
                COLUMNS,
                down,
                across,
                CELLS,
                LINES,
                num_warps=max(1, across * CELLS // LANES),
                num_stages=1,
                **LAUNCH_OPTIONS,
            )
    return targets
