"""Where masks lie in images, and what their pixels are, as device code shared by pasting and encoding.

The arithmetic is that of `reference/paste.py`, bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmrcnn_kernels.pasting import REACH
from fastmrcnn_kernels.triton.elementary import fma

REACHED = tl.constexpr(REACH)
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@triton.jit
def load_mask(boxes_ptr, sizes_ptr, counts_ptr, mask, slots, height, width):
    """Box and size of the image of mask number `mask` (int64), of `slots` per image; size 0 where there is no mask."""
    image = mask // slots
    x1 = tl.load(boxes_ptr + mask * 4)
    y1 = tl.load(boxes_ptr + mask * 4 + 1)
    x2 = tl.load(boxes_ptr + mask * 4 + 2)
    y2 = tl.load(boxes_ptr + mask * 4 + 3)
    if sizes_ptr is not None:
        height = tl.minimum(tl.load(sizes_ptr + image * 2).to(tl.int32), height)
        width = tl.minimum(tl.load(sizes_ptr + image * 2 + 1).to(tl.int32), width)
    reach = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2)))
    usable = (reach <= REACHED) & (x1 + y1 + x2 + y2 == x1 + y1 + x2 + y2)
    if counts_ptr is not None:
        usable = usable & (mask % slots < tl.load(counts_ptr + image))
    return x1, y1, x2, y2, tl.where(usable, height, 0), tl.where(usable, width, 0)


@triton.jit
def window(low, high, size, expansion, M: tl.constexpr, DETECTRON2: tl.constexpr):
    """Pixels of an axis of an image of `size` beyond which a mask is zero: the first, and the one after the last.

    `expansion` is what a box grows by with the border around its mask.  Empty where `size` is 0.
    """
    if DETECTRON2:
        rounding = 1.0 + (tl.abs(low) + tl.abs(high)) * 9.5367431640625e-7  # what it may lose, 2^-20, and a pixel
        reach = tl.abs(high - low) * (0.5 / M) + rounding  # half a cell
        first = tl.floor(tl.minimum(low, high) - reach)
        end = tl.ceil(tl.maximum(low, high) + reach)
    else:
        centre = (high + low) * 0.5
        half = (high - low) * 0.5 * expansion
        first = centre - half
        end = centre + half
    first = tl.where(size > 0, first, 0.0).to(tl.int64)
    end = tl.where(size > 0, end, 0.0).to(tl.int64)
    if not DETECTRON2:
        end += 1
    first = tl.maximum(first, 0)
    return first.to(tl.int32), tl.maximum(first, tl.minimum(end, size)).to(tl.int32)


@triton.jit
def taps(pixel, low, high, expansion, M: tl.constexpr, PADDING: tl.constexpr, DETECTRON2: tl.constexpr):
    """The two cells that each `pixel` (int32) of an axis lies between, -1 where that is no cell, and their weights."""
    if DETECTRON2:
        place = (
            tl.div_rn(pixel.to(tl.float32) + 0.5 - low, high - low + tl.zeros_like(pixel).to(tl.float32)) * 2.0 - 1.0
        )
        place = ((place + 1.0) * M - 1.0) * 0.5
        inside = (place > -1.0) & (place < M)
        place = tl.where(inside, place, 0.0)
        cell = tl.floor(place)
        second = cell + 1.0
    else:
        centre = (high + low) * 0.5
        half = (high - low) * 0.5 * expansion
        first = (centre - half).to(tl.int64)
        last = (centre + half).to(tl.int64)
        CELLS: tl.constexpr = M + 2 * PADDING
        count = tl.maximum(last - first + 1, 1).to(tl.float32)
        step = tl.div_rn(count * 0.0 + CELLS, count)
        place = tl.maximum(fma((pixel - first).to(tl.float32) + 0.5, step, step * 0.0 - 0.5), 0.0)
        inside = (pixel >= first) & (pixel <= last)
        cell = tl.minimum(tl.floor(place), CELLS - 1.0)
        second = tl.minimum(cell + 1.0, CELLS - 1.0) - PADDING
    share = tl.minimum(tl.maximum(place - cell, 0.0), 1.0)
    if not DETECTRON2:
        cell -= PADDING
    cell = tl.where(inside & (cell >= 0) & (cell < M), cell, -1.0)
    second = tl.where(inside & (second >= 0) & (second < M), second, -1.0)
    return cell.to(tl.int32), second.to(tl.int32), 1.0 - share, share


@triton.jit
def _corner(mask_ptr, y, x, M: tl.constexpr):
    """Cells [Y, X] in rows `y` and columns `x` of a mask, 0 where one of them is -1."""
    return tl.load(mask_ptr + y[:, None] * M + x[None, :], mask=(y >= 0)[:, None] & (x >= 0)[None, :], other=0.0)


@triton.jit
def sample(
    mask_ptr,
    y,
    x,
    x1,
    y1,
    x2,
    y2,
    expansion,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    DETECTRON2: tl.constexpr,
):
    """Pixels in rows `y` [Y] and columns `x` [X] of a pasted mask: float32 [Y, X]."""
    top, bottom, top_weight, bottom_weight = taps(y, y1, y2, expansion, M, PADDING, DETECTRON2)
    left, right, left_weight, right_weight = taps(x, x1, x2, expansion, M, PADDING, DETECTRON2)
    lw = left_weight[None, :]
    rw = right_weight[None, :]
    above = fma(_corner(mask_ptr, top, left, M), lw, _corner(mask_ptr, top, right, M) * rw)
    below = fma(_corner(mask_ptr, bottom, left, M), lw, _corner(mask_ptr, bottom, right, M) * rw)
    return fma(above, top_weight[:, None], below * bottom_weight[:, None])


@triton.jit
def exceeds(value, threshold, DETECTRON2: tl.constexpr):
    """Whether pixels belong to a mask."""
    if DETECTRON2:
        result = value >= threshold
    else:
        result = value > threshold
    return result
