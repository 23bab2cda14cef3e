"""Multi-level RoIAlign, backward: every cell gathers what the bins over it send, so nothing is added atomically.

The gradients of all levels and images are cut into tiles of TILE x TILE cells.  One small launch finds, as bits, which
RoIs reach each tile; the main one owns a tile and a block of channels, visits those RoIs in ascending order, adds up in
float32 and stores once.  Two runs give identical bits, and nothing needs to be set to zero first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.sampler import Sampler
from fastmrcnn_kernels.triton.launch import INTERPRETED, LINE, cdiv, next_power_of_2, on_device_of, runtime_ints
from fastmrcnn_kernels.triton.roi_geometry import (
    LAUNCH_OPTIONS,
    bin_weight,
    interval,
    samples_per_bin,
    select,
    select_int,
)
from fastmrcnn_kernels.triton.roi_tiles import GROUP, TILE, TILES_PER_PROGRAM, find_rois_kernel, locate_tile, lowest_bit

BLOCK_BINS = 16
WARPS = 8  # for blocks of more than 32 channels; half of them for others


@triton.jit
def _bins_over(
    first, start, size, length, count, BINS: tl.constexpr, CUBIC: tl.constexpr, CORNER: tl.constexpr, TILE: tl.constexpr
):
    """First bin, and how many from there on, whose samples may reach one of the cells `first` .. `first` + TILE - 1.

    Conservative by 1/16 of a cell and the rounding of positions: a bin too many has weights of zero.
    """
    reach: tl.constexpr = 2 if CUBIC else 1
    slack = 0.0625 + (tl.abs(start) + tl.abs(size) * BINS) * 1e-6
    one_end = tl.div_rn(first - reach - slack - start, size)
    other_end = tl.div_rn(first + (TILE - 1 + reach) + slack - start, size)
    # In bin b, samples lie at b + inset .. b + 1 - inset, in units of bins; or at b if they lie at corners.
    if CORNER:
        before = size * 0.0
        after = size * 0.0
    else:
        after = tl.div_rn(0.5, tl.maximum(count, 1.0))
        before = 1.0 - after
    low = tl.maximum(tl.ceil(tl.minimum(one_end, other_end) - before), 0.0)
    high = tl.minimum(tl.floor(tl.maximum(one_end, other_end) - after), BINS - 1.0)
    low = tl.where(size == 0, 0.0, tl.minimum(low, BINS * 1.0))
    high = tl.where(size == 0, BINS - 1.0, tl.maximum(high, -1.0))
    return low.to(tl.int32), tl.maximum(high - low + 1, 0.0).to(tl.int32)


@triton.jit
def _dot(a, b, total):
    """`total` + `a` @ `b` of 16-bit operands; the interpreter, which has no bfloat16, multiplies them in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _gather_roi(
    total,
    pooled_ptr,
    rois_ptr,
    roi,
    scale,
    tall,
    wide,
    y,
    x,
    channels,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUBIC: tl.constexpr,
    CORNER: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
):
    """`total` [TILE^2, channels] + weights [TILE^2, bins] @ gradients [bins, channels] of one RoI's bins over a tile.

    In 16-bit dtypes the weights are split into two such numbers, which together are as good as 16 bits of mantissa.
    """
    x1 = tl.load(rois_ptr + roi * 5 + 1)
    y1 = tl.load(rois_ptr + roi * 5 + 2)
    x2 = tl.load(rois_ptr + roi * 5 + 3)
    y2 = tl.load(rois_ptr + roi * 5 + 4)
    start_y, size_y = interval(y1, y2, scale, P, ALIGNED, CORNER)
    start_x, size_x = interval(x1, x2, scale, Q, ALIGNED, CORNER)
    count_y = samples_per_bin(size_y, SAMPLING_RATIO, CORNER)
    count_x = samples_per_bin(size_x, SAMPLING_RATIO, CORNER)
    first_p, bins_p = _bins_over(y, start_y, size_y, tall, count_y, P, CUBIC, CORNER, TILE)
    first_q, bins_q = _bins_over(x, start_x, size_x, wide, count_x, Q, CUBIC, CORNER, TILE)
    cells = tl.arange(0, TILE)
    for block in range(0, bins_p * bins_q, BLOCK_BINS):
        b = block + tl.arange(0, BLOCK_BINS)
        p = first_p + b // bins_q
        q = first_q + b % bins_q
        weight_y = bin_weight((y + cells)[:, None], p[None, :], start_y, size_y, tall, SAMPLING_RATIO, CUBIC, CORNER)
        weight_x = bin_weight((x + cells)[:, None], q[None, :], start_x, size_x, wide, SAMPLING_RATIO, CUBIC, CORNER)
        weights = tl.reshape(weight_y[:, None, :] * weight_x[None, :, :], [TILE * TILE, BLOCK_BINS])
        gradients = tl.load(
            pooled_ptr + ((roi * (P * Q) + p * Q + q) * C)[:, None] + channels[None, :],
            mask=(b < bins_p * bins_q)[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        if gradients.dtype == tl.float32:
            total = tl.dot(weights, gradients, total, input_precision="ieee")
        else:
            high = weights.to(gradients.dtype)
            low = (weights - high.to(tl.float32)).to(gradients.dtype)
            total = _dot(low, gradients, _dot(high, gradients, total))
    return total


@triton.jit(do_not_specialize=["heights", "widths", "scales", "num_images", "groups"])
def _roi_align_bwd_kernel(
    gradients,
    pooled_ptr,
    rois_ptr,
    words_ptr,
    nonzero_ptr,
    heights,
    widths,
    scales,
    num_images,
    groups,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUBIC: tl.constexpr,
    CORNER: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dF[y, x, c] = sum over RoIs of sum_p sum_q Wy[p, y] d[p, q, c] Wx[q, x].

    A program owns TILE x TILE cells of one level of one image, and BLOCK_C channels.
    """
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    tile = program // C_BLOCKS
    channels = program % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    level, image, y, x = locate_tile(tile, heights, widths, num_images, TILE)
    height = select_int(heights, level)
    width = select_int(widths, level)
    scale = select(scales, level)
    tall = height.to(tl.float32)
    wide = width.to(tl.float32)
    total = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)

    for group in range(groups):
        place = tile.to(tl.int64) * groups + group
        nonzero = tl.load(nonzero_ptr + place)
        while nonzero != 0:
            word = lowest_bit(nonzero)
            nonzero &= nonzero - 1
            bits = tl.load(words_ptr + place * 32 + word)
            while bits != 0:
                roi = group * 1024 + word * 32 + lowest_bit(bits)
                bits &= bits - 1
                total = _gather_roi(
                    total,
                    pooled_ptr,
                    rois_ptr,
                    roi.to(tl.int64),
                    scale,
                    tall,
                    wide,
                    y,
                    x,
                    channels,
                    C,
                    P,
                    Q,
                    SAMPLING_RATIO,
                    ALIGNED,
                    CUBIC,
                    CORNER,
                    TILE,
                    BLOCK_BINS,
                )

    cell = tl.arange(0, TILE * TILE)
    row = y + cell // TILE
    column = x + cell % TILE
    offset = ((image.to(tl.int64) * height + row) * width + column) * C
    gradient_ptr = select(gradients, level)
    on_tile = (row < height) & (column < width)
    tl.store(
        gradient_ptr + offset[:, None] + channels[None, :],
        total.to(gradient_ptr.dtype.element_ty),
        mask=on_tile[:, None] & (channels < C)[None, :],
    )


def roi_align_backward(
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    scales: Sequence[float],
    sampler: Sampler,
    bounds: Sequence[float],
) -> list[Tensor]:
    """Gradients of the feature maps, [N, C, Hl, Wl] channels_last, from that of the bins, `pooled` [R, C, P, Q]."""
    num_rois, channels, bins_y, bins_x = pooled.shape
    pooled = pooled.permute(0, 2, 3, 1).contiguous()
    rois = rois.float().contiguous()
    shapes = list(zip(heights, widths, strict=True))
    maps = [pooled.new_empty(num_images, height, width, channels) for height, width in shapes]
    tiles = sum(num_images * cdiv(height, TILE) * cdiv(width, TILE) for height, width in shapes)
    groups = cdiv(num_rois, GROUP)
    words = torch.empty(tiles, groups, 32, dtype=torch.int32, device=pooled.device)
    nonzero = torch.empty(tiles, groups, dtype=torch.int32, device=pooled.device)
    channel_block = max(16, min(LINE // pooled.element_size(), next_power_of_2(channels)))
    if tiles * channels:
        with on_device_of(pooled):
            if groups:
                find_rois_kernel[(cdiv(tiles, TILES_PER_PROGRAM), groups)](
                    words,
                    nonzero,
                    rois,
                    levels,
                    runtime_ints(heights),
                    runtime_ints(widths),
                    tuple(scales),
                    tuple(bounds),
                    num_images,
                    num_rois,
                    tiles,
                    bins_y,
                    bins_x,
                    *sampler,
                    TILE,
                    TILES_PER_PROGRAM,
                    num_warps=4,
                    **LAUNCH_OPTIONS,
                )
            _roi_align_bwd_kernel[(tiles * cdiv(channels, channel_block),)](
                tuple(maps),
                pooled,
                rois,
                words,
                nonzero,
                runtime_ints(heights),
                runtime_ints(widths),
                tuple(scales),
                num_images,
                groups,
                channels,
                bins_y,
                bins_x,
                *sampler,
                TILE,
                BLOCK_BINS,
                channel_block,
                num_warps=WARPS if channel_block > 32 else WARPS // 2,
                num_stages=1,
                **LAUNCH_OPTIONS,
            )
    return [gradient.permute(0, 3, 1, 2) for gradient in maps]
