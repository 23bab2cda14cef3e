"""Which RoIs reach which tile of the maps, as bits: what a backward pass that gathers visits, in ascending order."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmrcnn_kernels.triton.roi_geometry import (
    int_of,
    interval,
    load_roi,
    on_map,
    sample_position,
    samples_per_bin,
    select,
    select_int,
)

TILE = 8  # cells along either side
GROUP = 1024  # RoIs per group: 32 words of 32 bits, and one word more that says which of those are not zero
TILES_PER_PROGRAM = 8


@triton.jit
def as_bits(marks):
    """`marks` [32, 32] as 32 words of 32 bits, and one word whose bits say which of them are not zero."""
    bit = tl.arange(0, 32)
    words = tl.sum(tl.where(marks, 1, 0) << bit[None, :], axis=1)
    return words, tl.sum(tl.where(words != 0, 1, 0) << bit, axis=0)


@triton.jit
def lowest_bit(word):
    """Number of the lowest bit that is set in an int32: the exponent of that bit as a float."""
    return (((word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def locate_tile(tile, heights, widths, num_images, TILE: tl.constexpr):
    """Level, image, first row and first column of tile number `tile`; levels, images, rows, columns in this order."""
    level = tile * 0
    for i in tl.static_range(len(heights) - 1):
        tiles = num_images * tl.cdiv(int_of(heights[i]), TILE) * tl.cdiv(int_of(widths[i]), TILE)
        beyond = (level == i) & (tile >= tiles)
        level = tl.where(beyond, i + 1, level)
        tile = tl.where(beyond, tile - tiles, tile)
    rows = tl.cdiv(select_int(heights, level), TILE)
    columns = tl.cdiv(select_int(widths, level), TILE)
    return level, tile // (rows * columns), tile // columns % rows * TILE, tile % columns * TILE


@triton.jit
def _reached(
    start,
    size,
    length,
    count,
    BINS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,
    CORNER: tl.constexpr,
):
    """First and last cell, floats, that may have a weight in some bin; the first is beyond the last if none has."""
    reach: tl.constexpr = 2 if CUBIC else 1
    one_end = sample_position(start, size, 0, 0, count, SAMPLING_RATIO, CORNER)
    other_end = sample_position(start, size, BINS - 1, count - 1, count, SAMPLING_RATIO, CORNER)
    low = tl.minimum(one_end, other_end)
    high = tl.maximum(one_end, other_end)
    exists = (low <= length) & (high >= -1) & (count > 0)
    first = tl.where(exists, tl.floor(on_map(low, length)) - (reach - 1), 1.0)
    last = tl.where(exists, tl.floor(on_map(high, length)) + reach, 0.0)
    return first, last


@triton.jit(do_not_specialize=["heights", "widths", "scales", "bounds", "num_images", "num_rois", "num_tiles"])
def find_rois_kernel(
    words_ptr,
    nonzero_ptr,
    rois_ptr,
    levels_ptr,
    heights,
    widths,
    scales,
    bounds,
    num_images,
    num_rois,
    num_tiles,
    P: tl.constexpr,
    Q: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUBIC: tl.constexpr,
    CORNER: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
):
    """Bit b of words[t, g, w] says whether RoI 1024 g + 32 w + b reaches tile t; bit w of nonzero[t, g], if any does.

    A program owns TILES_PER_PROGRAM tiles and one group g of 1024 RoIs, a 32 x 32 block.
    """
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    word = tl.arange(0, 32)
    roi = group * 1024 + word[:, None] * 32 + word[None, :]
    image, level, x1, y1, x2, y2, present = load_roi(
        rois_ptr, levels_ptr, roi.to(tl.int64), roi < num_rois, num_images, bounds, len(heights)
    )
    scale = select(scales, level)
    tall = select_int(heights, level).to(tl.float32)
    wide = select_int(widths, level).to(tl.float32)
    start_y, size_y = interval(y1, y2, scale, P, ALIGNED, CORNER)
    start_x, size_x = interval(x1, x2, scale, Q, ALIGNED, CORNER)
    count_y = samples_per_bin(size_y, SAMPLING_RATIO, CORNER)
    count_x = samples_per_bin(size_x, SAMPLING_RATIO, CORNER)
    top, bottom = _reached(start_y, size_y, tall, count_y, P, SAMPLING_RATIO, CUBIC, CORNER)
    left, right = _reached(start_x, size_x, wide, count_x, Q, SAMPLING_RATIO, CUBIC, CORNER)
    level = tl.where(present, level, -1)

    first = tl.program_id(0) * TILES_PER_PROGRAM
    for i in range(tl.minimum(TILES_PER_PROGRAM, num_tiles - first)):
        tile = first + i
        its_level, its_image, y, x = locate_tile(tile, heights, widths, num_images, TILE)
        reaches = (level == its_level) & (image == its_image)
        reaches = reaches & (top < y + TILE) & (bottom >= y) & (top <= bottom)
        reaches = reaches & (left < x + TILE) & (right >= x) & (left <= right)
        words, nonzero = as_bits(reaches)
        place = tile.to(tl.int64) * groups + group
        tl.store(words_ptr + place * 32 + word, words)
        tl.store(nonzero_ptr + place, nonzero)
