"""Multi-level RoIAlign, forward: one launch for all levels and images.

Features and pooled bins are dense NHWC (channels_last); R RoIs, P x Q bins each.  Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.sampler import Sampler
from fastmrcnn_kernels.triton.launch import LINE, cdiv, next_power_of_2, on_device_of, runtime_ints
from fastmrcnn_kernels.triton.roi_geometry import (
    LAUNCH_OPTIONS,
    interval,
    is_inside,
    load_roi,
    on_map,
    sample_position,
    samples_per_bin,
    select,
    select_int,
    tap_weight,
)

BLOCK_BINS = 32
WARPS = 4


@triton.jit
def _add_cell(total, map_ptr, row, column, weight, reads, width, channels, C: tl.constexpr):
    """`total` + `weight` * the features of cell (row, column), for the bins that `reads` marks: no others are read."""
    offset = (row.to(tl.int32).to(tl.int64) * width + column.to(tl.int32)) * C
    reads = reads & (weight != 0)
    value = tl.load(
        map_ptr + offset[:, None] + channels[None, :], mask=reads[:, None] & (channels < C)[None, :], other=0.0
    )
    return tl.fma(tl.where(reads, weight, 0.0)[:, None], value.to(tl.float32), total)


@triton.jit
def _samples_on_map(start, size, b, count, length, SAMPLING_RATIO: tl.constexpr, CORNER: tl.constexpr):
    """First sample to visit of bin `b`, and how many from there on, for all bins; those left out lie outside the map.

    A fixed number of samples is visited whole.  An adaptive one grows with the RoI, but its samples are more than half
    a cell apart, or there is just one: those on the map are no more than the map's cells allow.
    """
    if SAMPLING_RATIO > 0 or CORNER:
        first = b * 0.0
        samples = 1 if CORNER else SAMPLING_RATIO
    else:
        step = tl.maximum(tl.div_rn(size, count), 0.5)
        first = tl.maximum(tl.floor(tl.div_rn(-1 - (start + b * size), step)) - 2, 0.0)
        samples = tl.minimum(count, tl.floor(tl.div_rn(length + 1, step)) + 4).to(tl.int32)
    return first, samples


@triton.jit(do_not_specialize=["heights", "widths", "scales", "bounds", "num_images"])
def _roi_align_fwd_kernel(
    out_ptr,
    rois_ptr,
    levels_ptr,
    extents_ptr,
    features,
    heights,
    widths,
    scales,
    bounds,
    num_images,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUBIC: tl.constexpr,
    CORNER: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r, p, q, c] = sum_y sum_x Wy[p, y] F[y, x, c] Wx[q, x].

    A program owns BLOCK_BINS of the P Q bins of one RoI and BLOCK_C channels; the programs of a RoI are neighbours, so
    that they find its cells in the cache.  All its bins visit their samples together, one after the other, and each
    sample reads the 2 x 2 (bicubic: 4 x 4) cells around it.  Maps are as large as extents[image, level] says, if given.
    """
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    BIN_BLOCKS: tl.constexpr = (P * Q + BLOCK_BINS - 1) // BLOCK_BINS
    REACH: tl.constexpr = 2 if CUBIC else 1
    ADAPTIVE: tl.constexpr = SAMPLING_RATIO <= 0 and not CORNER
    program = tl.program_id(0)
    roi = (program // (C_BLOCKS * BIN_BLOCKS)).to(tl.int64)
    bins = program // C_BLOCKS % BIN_BLOCKS * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channels = program % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    p = bins // Q
    q = bins % Q

    image, level, x1, y1, x2, y2, present = load_roi(rois_ptr, levels_ptr, roi, True, num_images, bounds, len(features))
    height = select_int(heights, level)
    width = select_int(widths, level)
    scale = select(scales, level)
    map_ptr = select(features, level) + image.to(tl.int64) * height * width * C
    if extents_ptr is not None:
        extent_ptr = extents_ptr + (image.to(tl.int64) * len(features) + level) * 2
        tall, wide = tl.load(extent_ptr).to(tl.float32), tl.load(extent_ptr + 1).to(tl.float32)
        present = present & (tall > 0) & (wide > 0)
    else:
        tall, wide = height.to(tl.float32), width.to(tl.float32)
    start_y, size_y = interval(y1, y2, scale, P, ALIGNED, CORNER)
    start_x, size_x = interval(x1, x2, scale, Q, ALIGNED, CORNER)
    count_y = samples_per_bin(size_y, SAMPLING_RATIO, CORNER)
    count_x = samples_per_bin(size_x, SAMPLING_RATIO, CORNER)
    usable = bins < tl.where(present, P * Q, 0)
    first_y, samples_y = _samples_on_map(start_y, size_y, p, count_y, tall, SAMPLING_RATIO, CORNER)
    first_x, samples_x = _samples_on_map(start_x, size_x, q, count_x, wide, SAMPLING_RATIO, CORNER)
    total = tl.zeros([BLOCK_BINS, BLOCK_C], tl.float32)

    # The number of samples is known at run time only, so that no compiler unrolls beyond one sample's cells.
    for i in range(tl.where(present, samples_y, 0)):
        y = sample_position(start_y, size_y, p, first_y + i, count_y, SAMPLING_RATIO, CORNER)
        inside_y = usable & is_inside(y, tall, CORNER)
        if ADAPTIVE:
            inside_y = inside_y & (first_y + i < count_y)
        y = on_map(y, tall)
        for j in range(samples_x):
            x = sample_position(start_x, size_x, q, first_x + j, count_x, SAMPLING_RATIO, CORNER)
            inside = inside_y & is_inside(x, wide, CORNER)
            if ADAPTIVE:
                inside = inside & (first_x + j < count_x)
            x = on_map(x, wide)
            for ty in range(1 - REACH, 1 + REACH):
                cell_y = tl.floor(y) + ty
                weight_y = tap_weight(cell_y, y, CUBIC)
                for tx in tl.static_range(1 - REACH, 1 + REACH):
                    cell_x = tl.floor(x) + tx
                    weight = weight_y * tap_weight(cell_x, x, CUBIC)
                    row = on_map(cell_y, tall)
                    column = on_map(cell_x, wide)
                    total = _add_cell(total, map_ptr, row, column, weight, inside, width, channels, C)
    share = tl.div_rn(1.0, tl.maximum(count_y, 1.0) * tl.maximum(count_x, 1.0))
    total *= tl.where(share <= 1, share, 0.0)  # NaN for a box that is not finite

    out = out_ptr + ((roi * (P * Q) + bins) * C)[:, None] + channels[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(bins < P * Q)[:, None] & (channels < C)[None, :])


def roi_align_forward(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampler: Sampler,
    bounds: Sequence[float],
    extents: Tensor | None = None,
) -> Tensor:
    """Bins [R, C, P, Q], channels_last.  `bounds` separate the levels where `levels` [R] are not given.

    `extents`, int64 [N, L, 2], are the rows and columns of the maps that belong to each image; by default all.
    """
    height, width = output_size
    num_images, channels = features[0].shape[:2]
    out = features[0].new_empty(len(rois), height, width, channels)
    bin_block = min(BLOCK_BINS, next_power_of_2(height * width))
    channel_block = min(LINE // out.element_size(), next_power_of_2(channels))
    programs = len(rois) * cdiv(height * width, bin_block) * cdiv(channels, channel_block)
    if programs:
        with on_device_of(out):
            _roi_align_fwd_kernel[(programs,)](
                out,
                rois.float().contiguous(),
                levels,
                None if extents is None else extents.contiguous(),
                tuple(feature.contiguous(memory_format=torch.channels_last) for feature in features),
                runtime_ints(feature.shape[2] for feature in features),
                runtime_ints(feature.shape[3] for feature in features),
                tuple(scales),
                tuple(bounds),
                num_images,
                channels,
                height,
                width,
                *sampler,
                bin_block,
                channel_block,
                num_warps=WARPS,
                num_stages=1,
                **LAUNCH_OPTIONS,
            )
    return out.permute(0, 3, 1, 2)
