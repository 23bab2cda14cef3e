"""Where a RoI lies on its feature map and what a cell weighs in one of its bins: device code of RoIAlign.

Everything is elementwise, for scalars and blocks alike, in float32 and in the order of operations of
`reference/roi_align.py`, divisions and square roots correctly rounded.  Launched without fused multiply-add
(`LAUNCH_OPTIONS`), positions are bit-equal to the reference's, and both decide alike which samples and levels count.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAUNCH_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def select(values, level):
    """`values[level]` of a tuple, where the level is known at run time only."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(level == i, values[i], chosen)
    return chosen


@triton.jit
def int_of(value):
    """What `runtime_ints` made `value` of."""
    return (value >> 1) - 1


@triton.jit
def select_int(values, level):
    """`values[level]` of what `runtime_ints` made."""
    return int_of(select(values, level))


@triton.jit
def load_roi(rois_ptr, levels_ptr, roi, usable, num_images, bounds, LEVELS: tl.constexpr):
    """A RoI's image, level and corners (x1, y1, x2, y2), and whether it is `usable`, in an image, and finite.

    `bounds[i]` is the least square root of an area, in pixels, that belongs to level i + 1.
    """
    image = tl.load(rois_ptr + roi * 5, mask=usable, other=-1.0)
    x1 = tl.load(rois_ptr + roi * 5 + 1, mask=usable, other=0.0)
    y1 = tl.load(rois_ptr + roi * 5 + 2, mask=usable, other=0.0)
    x2 = tl.load(rois_ptr + roi * 5 + 3, mask=usable, other=0.0)
    y2 = tl.load(rois_ptr + roi * 5 + 4, mask=usable, other=0.0)
    present = (image >= 0) & (image < num_images)
    largest = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2)))
    present = present & (largest < float("inf")) & (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    image = tl.where(present, image, 0.0).to(tl.int32)
    if levels_ptr is not None:
        level = tl.load(levels_ptr + roi, mask=usable, other=0).to(tl.int32)
        present = present & (level >= 0) & (level < LEVELS)
    else:
        size = tl.sqrt_rn((x2 - x1) * (y2 - y1))
        level = (size != size).to(tl.int32) * 0
        for i in tl.static_range(LEVELS - 1):
            level += (size >= bounds[i]).to(tl.int32)
    return image, level, x1, y1, x2, y2, present


@triton.jit
def interval(low, high, scale, BINS: tl.constexpr, ALIGNED: tl.constexpr, CORNER: tl.constexpr):
    """First coordinate and bin size, in cells, of the pixels [low, high] along one axis."""
    start = low * scale
    end = high * scale
    if ALIGNED:
        start -= 0.5
        end -= 0.5
    extent = end - start
    if CORNER:
        if BINS == 1:
            start += extent * 0.5
            size = extent * 0.0
        else:
            size = tl.div_rn(extent, BINS - 1.0)
    else:
        if not ALIGNED:
            extent = tl.maximum(extent, 1.0)
        size = tl.div_rn(extent, BINS * 1.0)
    return start, size


@triton.jit
def samples_per_bin(size, SAMPLING_RATIO: tl.constexpr, CORNER: tl.constexpr):
    """Samples of a bin of `size` cells along one axis, a float; NaN for an infinite size.

    Not positive for an inverted bin that is sampled adaptively.
    """
    if CORNER:
        count = size * 0.0 + 1.0
    elif SAMPLING_RATIO > 0:
        count = size * 0.0 + SAMPLING_RATIO
    else:
        count = tl.ceil(size)
    return count


@triton.jit
def per_sample(value, count, SAMPLING_RATIO: tl.constexpr):
    """`value` / `count`, the samples per bin; where a product is the same number, that."""
    if SAMPLING_RATIO == 1 or SAMPLING_RATIO == 2 or SAMPLING_RATIO == 4:
        share = value * (1.0 / SAMPLING_RATIO)
    else:
        share = tl.div_rn(value, count)
    return share


@triton.jit
def sample_position(start, size, b, s, count, SAMPLING_RATIO: tl.constexpr, CORNER: tl.constexpr):
    """Coordinate of sample `s` of `count` in bin `b`, in cells."""
    position = start + b * size
    if not CORNER:
        position += per_sample((s + 0.5) * size, count, SAMPLING_RATIO)
    return position


@triton.jit
def is_inside(position, length, CORNER: tl.constexpr):
    """Whether a sample counts: at most one cell outside a map of `length` cells (corner samples: not outside)."""
    if CORNER:
        inside = (position >= 0) & (position <= length - 1)
    else:
        inside = (position >= -1) & (position <= length)
    return inside


@triton.jit
def on_map(position, length):
    """The nearest coordinate on a map of `length` cells."""
    return tl.minimum(tl.maximum(position, 0.0), length - 1)


@triton.jit
def keys_cubic(distance):
    """Keys' interpolation kernel with a = -0.75, PyTorch's."""
    near = (1.25 * distance - 2.25) * distance * distance + 1.0
    far = ((-0.75 * distance + 3.75) * distance - 6.0) * distance + 3.0
    return tl.where(distance <= 1, near, tl.where(distance < 2, far, 0.0))


@triton.jit
def tap_weight(cell, position, CUBIC: tl.constexpr):
    """Weight of `cell`, on the map or beyond its border, in the interpolation at `position`."""
    distance = tl.abs(cell - position)
    if CUBIC:
        weight = keys_cubic(distance)
    else:
        weight = tl.maximum(1 - distance, 0.0)
    return weight


@triton.jit
def cell_weight(cell, position, length, CUBIC: tl.constexpr):
    """Weight of `cell`, 0 .. length - 1; border cells stand for those beyond, which only cubic taps reach."""
    weight = tap_weight(cell, position, CUBIC)
    if CUBIC:
        weight += tl.where(cell == 0, keys_cubic(position + 1), 0.0)
        weight += tl.where(cell == length - 1, keys_cubic(length - position), 0.0)
    return weight


@triton.jit
def bin_weight(
    cell,
    b,
    start,
    size,
    length,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,
    CORNER: tl.constexpr,
):
    """Weight of `cell` in bin `b` along one axis: the mean over the bin's samples of their interpolation weights.

    Where the number of samples depends on the RoI, only those are visited that can reach the cell: see `axis_weights`
    of the reference.
    """
    count = samples_per_bin(size, SAMPLING_RATIO, CORNER)
    if SAMPLING_RATIO > 0 or CORNER:
        first = 0.0
        candidates = 1 if CORNER else SAMPLING_RATIO
    else:
        reach: tl.constexpr = 2 if CUBIC else 1
        step = tl.div_rn(size, count)
        first = tl.maximum(tl.floor(tl.div_rn(cell - reach - (start + b * size), step) - 0.5), 0.0)
        candidates = tl.minimum(count, 4.0 * reach + 2).to(tl.int32)
    total = (cell + b) * 0.0
    for i in range(candidates):
        s = first + i
        position = sample_position(start, size, b, s, count, SAMPLING_RATIO, CORNER)
        counts = is_inside(position, length, CORNER)
        if SAMPLING_RATIO <= 0 and not CORNER:
            counts = counts & (s < count)
        total += tl.where(counts, cell_weight(cell, on_map(position, length), length, CUBIC), 0.0)
    if CORNER:
        weight = total
    else:
        weight = per_sample(total, tl.maximum(count, 1.0), SAMPLING_RATIO)
    return weight
