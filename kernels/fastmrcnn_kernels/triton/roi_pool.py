"""RoIPool, forward and backward: the largest cell of each bin, and where it is.

Features, bins and their positions are dense NHWC (channels_last); R RoIs, P x Q bins each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.launch import LINE, cdiv, next_power_of_2, on_device_of
from fastmrcnn_kernels.triton.roi_geometry import LAUNCH_OPTIONS, load_roi
from fastmrcnn_kernels.triton.roi_tiles import GROUP, TILE, as_bits, lowest_bit


@triton.jit
def _round_half_away(value):
    """As C rounds: to the nearest integer, halves away from zero."""
    size = tl.abs(value)
    whole = tl.floor(size)
    whole += tl.where(size - whole >= 0.5, 1.0, 0.0)
    return tl.where(value < 0, -whole, whole)


@triton.jit
def _cells_of_roi(low, high, scale):
    """First cell of the pixels [low, high] along one axis, and how many: at least one; an overflow counts as NaN."""
    start = _round_half_away(low * scale)
    extent = _round_half_away(high * scale) - start + 1.0
    return start, tl.where(tl.abs(extent) < float("inf"), tl.maximum(extent, 1.0), float("nan"))


@triton.jit
def _cells_of_bin(b, start, size, length):
    """First cell of bin `b` on a map of `length` cells, and the one after its last."""
    first = tl.minimum(tl.maximum(start + tl.floor(b * size), 0.0), length)
    end = tl.minimum(tl.maximum(start + tl.ceil((b + 1.0) * size), 0.0), length)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit(do_not_specialize=["height", "width", "num_images"])
def _roi_pool_fwd_kernel(
    out_ptr,
    position_ptr,
    rois_ptr,
    features_ptr,
    height,
    width,
    scale,
    num_images,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r, p, q, c] = max of F[y, x, c] over the cells of bin (p, q); position[r, p, q, c] = y W + x of the first.

    A program owns BLOCK_BINS of the P Q bins of one RoI and BLOCK_C channels.  Its bins visit their cells together, row
    by row; the position is -1 where nothing exceeds -inf.
    """
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    BIN_BLOCKS: tl.constexpr = (P * Q + BLOCK_BINS - 1) // BLOCK_BINS
    program = tl.program_id(0)
    roi = (program // (C_BLOCKS * BIN_BLOCKS)).to(tl.int64)
    bins = program // C_BLOCKS % BIN_BLOCKS * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channels = program % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)

    image, _level, x1, y1, x2, y2, present = load_roi(rois_ptr, None, roi, True, num_images, (), 1)
    start_y, extent_y = _cells_of_roi(y1, y2, scale)
    start_x, extent_x = _cells_of_roi(x1, x2, scale)
    present = present & (extent_y == extent_y) & (extent_x == extent_x)
    usable = bins < tl.where(present, P * Q, 0)
    top, bottom = _cells_of_bin(bins // Q, start_y, tl.div_rn(extent_y, P * 1.0), height.to(tl.float32))
    left, right = _cells_of_bin(bins % Q, start_x, tl.div_rn(extent_x, Q * 1.0), width.to(tl.float32))
    usable = usable & (top < bottom) & (left < right)
    map_ptr = features_ptr + image.to(tl.int64) * height * width * C
    largest = tl.full([BLOCK_BINS, BLOCK_C], float("-inf"), tl.float32)
    position = tl.full([BLOCK_BINS, BLOCK_C], -1, tl.int32)

    for i in range(tl.max(tl.where(usable, bottom - top, 0), axis=0)):
        for j in range(tl.max(tl.where(usable, right - left, 0), axis=0)):
            y = top + i
            x = left + j
            reads = usable & (y < bottom) & (x < right)
            cell = y * width + x
            value = tl.load(
                map_ptr + (cell.to(tl.int64) * C)[:, None] + channels[None, :],
                mask=reads[:, None] & (channels < C)[None, :],
                other=float("-inf"),
            ).to(tl.float32)
            exceeds = value > largest
            largest = tl.where(exceeds, value, largest)
            position = tl.where(exceeds, cell[:, None], position)

    offset = ((roi * (P * Q) + bins) * C)[:, None] + channels[None, :]
    stored = (bins < P * Q)[:, None] & (channels < C)[None, :]
    largest = tl.where(usable[:, None], largest, 0.0)
    tl.store(out_ptr + offset, largest.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(position_ptr + offset, position, mask=stored)


@triton.jit
def _bins_over(first, corner_ptr, scale, BINS: tl.constexpr, TILE: tl.constexpr):
    """First bin, and the one after the last, that may cover one of the cells `first` .. `first` + TILE - 1.

    `corner_ptr` points at one coordinate of the RoI.  Conservative by one bin at either end, which is more than
    positions are rounded by.
    """
    start, extent = _cells_of_roi(tl.load(corner_ptr), tl.load(corner_ptr + 2), scale)
    size = tl.div_rn(extent, BINS * 1.0)
    low = tl.maximum(tl.floor(tl.div_rn(first - start, size)) - 1.0, 0.0)
    high = tl.minimum(tl.floor(tl.div_rn(first + TILE - start, size)) + 2.0, BINS * 1.0)
    return low.to(tl.int32), tl.maximum(high, 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["height", "width", "num_images", "num_rois"])
def _roi_pool_bwd_kernel(
    gradient_ptr,
    pooled_ptr,
    position_ptr,
    rois_ptr,
    height,
    width,
    scale,
    num_images,
    num_rois,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dF[y, x, c] = sum of d[r, p, q, c] over all bins whose position is (y, x), RoIs and bins in ascending order.

    A program owns TILE x TILE cells of one image and BLOCK_C channels.  It finds the RoIs that reach its tile, 1,024 at
    a time, and compares the positions of their bins with its cells: nothing is added atomically.
    """
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    tile = program // C_BLOCKS
    channels = program % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.cdiv(width, TILE)
    image = tile // (columns * tl.cdiv(height, TILE))
    y = tile // columns % tl.cdiv(height, TILE) * TILE
    x = tile % columns * TILE
    row = y + tl.arange(0, TILE * TILE) // TILE
    column = x + tl.arange(0, TILE * TILE) % TILE
    cell = row * width + column
    total = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)

    word = tl.arange(0, 32)
    for group in range(0, num_rois, GROUP):
        roi = group + word[:, None] * 32 + word[None, :]
        its_image, _level, x1, y1, x2, y2, present = load_roi(
            rois_ptr, None, roi.to(tl.int64), roi < num_rois, num_images, (), 1
        )
        start_y, extent_y = _cells_of_roi(y1, y2, scale)
        start_x, extent_x = _cells_of_roi(x1, x2, scale)
        # The last bin may end a cell later, when the size of bins is rounded up.
        reaches = present & (its_image == image)
        reaches = reaches & (start_y < y + TILE) & (start_y + extent_y >= y)
        reaches = reaches & (start_x < x + TILE) & (start_x + extent_x >= x)
        words, nonzero = as_bits(reaches)
        while nonzero != 0:
            w = lowest_bit(nonzero)
            nonzero &= nonzero - 1
            bits = tl.sum(tl.where(word == w, words, 0), axis=0)
            while bits != 0:
                found = (group + w * 32 + lowest_bit(bits)).to(tl.int64)
                bits &= bits - 1
                first_p, end_p = _bins_over(y, rois_ptr + found * 5 + 2, scale, P, TILE)
                first_q, end_q = _bins_over(x, rois_ptr + found * 5 + 1, scale, Q, TILE)
                for p in range(first_p, end_p):
                    for q in range(first_q, end_q):
                        offset = (found * (P * Q) + p * Q + q) * C + channels
                        position = tl.load(position_ptr + offset, mask=channels < C, other=-1)
                        value = tl.load(pooled_ptr + offset, mask=channels < C, other=0.0).to(tl.float32)
                        total += tl.where(cell[:, None] == position[None, :], value[None, :], 0.0)

    offset = ((image.to(tl.int64) * height + row) * width + column) * C
    tl.store(
        gradient_ptr + offset[:, None] + channels[None, :],
        total.to(gradient_ptr.dtype.element_ty),
        mask=((row < height) & (column < width))[:, None] & (channels < C)[None, :],
    )


def roi_pool_forward(features: Tensor, rois: Tensor, output_size: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Bins [R, C, P, Q] and the cell y W + x of each maximum, int32, -1 where there is none; both channels_last."""
    height, width = output_size
    num_images, channels = features.shape[:2]
    out = features.new_empty(len(rois), height, width, channels)
    position = torch.empty_like(out, dtype=torch.int32)
    bin_block = min(32, next_power_of_2(height * width))
    channel_block = min(LINE // out.element_size(), next_power_of_2(channels))
    programs = len(rois) * cdiv(height * width, bin_block) * cdiv(channels, channel_block)
    if programs:
        with on_device_of(out):
            _roi_pool_fwd_kernel[(programs,)](
                out,
                position,
                rois.float().contiguous(),
                features.contiguous(memory_format=torch.channels_last),
                features.shape[2],
                features.shape[3],
                scale,
                num_images,
                channels,
                height,
                width,
                bin_block,
                channel_block,
                num_warps=4,
                num_stages=1,
                **LAUNCH_OPTIONS,
            )
    return out.permute(0, 3, 1, 2), position.permute(0, 3, 1, 2)


def roi_pool_backward(
    pooled: Tensor, position: Tensor, rois: Tensor, num_images: int, height: int, width: int, scale: float
) -> Tensor:
    """Gradient of the features, [N, C, H, W] channels_last, from that of the bins, `pooled` [R, C, P, Q]."""
    num_rois, channels, bins_y, bins_x = pooled.shape
    gradient = pooled.new_empty(num_images, height, width, channels)
    channel_block = min(LINE // pooled.element_size(), next_power_of_2(channels))
    tiles = num_images * cdiv(height, TILE) * cdiv(width, TILE)
    if tiles * channels:
        with on_device_of(pooled):
            _roi_pool_bwd_kernel[(tiles * cdiv(channels, channel_block),)](
                gradient,
                pooled.contiguous(memory_format=torch.channels_last),
                position.contiguous(memory_format=torch.channels_last),
                rois.float().contiguous(),
                height,
                width,
                scale,
                num_images,
                num_rois,
                channels,
                bins_y,
                bins_x,
                TILE,
                GROUP,
                channel_block,
                num_warps=8 if channel_block > 32 else 4,
                num_stages=1,
                **LAUNCH_OPTIONS,
            )
    return gradient.permute(0, 3, 1, 2)
