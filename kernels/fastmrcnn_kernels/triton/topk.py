"""The anchors of highest score, of every level and image: a radix select, then a sort by counting.

The logits are read in place, NHWC or NCHW.  Scores become unsigned keys that sort as they do, NaN as -inf, one zero;
an anchor's number breaks ties, so that the selection does not depend on the order in which programs run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.elementary import swap_order
from fastmrcnn_kernels.triton.launch import cdiv, on_device_of, runtime_ints
from fastmrcnn_kernels.triton.roi_geometry import int_of, select, select_int

BLOCK = 2048  # anchors that a program looks at
RANKED, COMPARED = 32, 128  # selected anchors that a program ranks, and how many it compares them with at a time
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}

_RUNTIME = ["num_images", "k"]  # beside tuples of `runtime_ints`


@triton.jit
def _locate(program, sizes, num_images, BLOCK: tl.constexpr):
    """Level, image and block of a program, which are numbered level by level, image by image."""
    level = program * 0
    for i in tl.static_range(len(sizes) - 1):
        blocks = num_images * tl.cdiv(int_of(sizes[i]), BLOCK)
        beyond = (level == i) & (program >= blocks)
        level = tl.where(beyond, i + 1, level)
        program = tl.where(beyond, program - blocks, program)
    blocks = tl.cdiv(select_int(sizes, level), BLOCK)
    return level, program // blocks, program % blocks


@triton.jit
def _load(logits, image_strides, anchor_strides, cell_strides, anchors, level, image, index, usable):
    """Logits number `index`, (y W + x) A + a, of an image and level, as float32."""
    count = select_int(anchors, level)
    place = image.to(tl.int64) * select_int(image_strides, level)
    place += (index % count).to(tl.int64) * select_int(anchor_strides, level)
    place += (index // count).to(tl.int64) * select_int(cell_strides, level)
    return tl.load(select(logits, level) + place, mask=usable, other=0.0)


@triton.jit
def sort_key(value):
    """A uint32 that sorts as `value` does; of a 16-bit value the lower 16 bits are used."""
    number = value.to(tl.float32)
    number = tl.where(number == number, number, float("-inf")) + 0.0
    if value.dtype.primitive_bitwidth == 16:
        bits = number.to(value.dtype).to(tl.int16, bitcast=True).to(tl.int32)
        return ((bits ^ ((bits >> 31) & 0x7FFF)) + 0x8000).to(tl.uint32)
    bits = number.to(tl.int32, bitcast=True)
    return swap_order(bits).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def packed_key(key, index):
    """An int64 that sorts as the uint32 `key` does, and among equal ones by descending `index`."""
    return ((key.to(tl.int64) - 0x80000000) << 32) + (0x7FFFFFFF - index)


@triton.jit
def _leading_digits(counts_ptr, segment, segments, rank, PASSES: tl.constexpr):
    """The first PASSES digits of the key of `rank` (from 1) in a segment, and its rank among keys that share them."""
    digit = tl.arange(0, 256)
    prefix = (rank * 0).to(tl.uint32)
    for i in tl.static_range(PASSES):
        counts = tl.load(counts_ptr + (i * segments + segment) * 256 + digit)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        is_it = (above < rank) & (above + counts >= rank)
        prefix = prefix * 256 + tl.sum(tl.where(is_it, digit, 0), axis=0).to(tl.uint32)
        rank -= tl.sum(tl.where(is_it, above, 0), axis=0)
    return prefix, rank


@triton.jit(do_not_specialize=_RUNTIME)
def _topk_count_kernel(
    counts_ptr,
    block_counts_ptr,
    logits,
    image_strides,
    anchor_strides,
    cell_strides,
    anchors,
    sizes,
    num_images,
    k,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[p, s, d]: how many keys of segment s that begin with its leading p digits have d as the next, in base 256.

    A program owns BLOCK anchors of one image and level.  The last pass also leaves what each program counted.
    """
    SHIFT: tl.constexpr = 8 * (PASSES - 1 - PASS)
    level, image, block = _locate(tl.program_id(0), sizes, num_images, BLOCK)
    segment = image * len(sizes) + level
    size = select_int(sizes, level)
    index = block * BLOCK + tl.arange(0, BLOCK)
    value = _load(logits, image_strides, anchor_strides, cell_strides, anchors, level, image, index, index < size)
    prefix, _rank = _leading_digits(counts_ptr, segment, num_images * len(sizes), tl.minimum(k, size), PASS)
    key = sort_key(value) >> SHIFT
    counted = index < size
    if PASS > 0:
        counted = counted & (key // 256 == prefix)
    digit = tl.arange(0, 256)
    counts = tl.histogram((key % 256).to(tl.int32), 256, mask=counted)
    place = (PASS * num_images * len(sizes) + segment) * 256 + digit
    tl.atomic_add(counts_ptr + place, counts, mask=counts > 0, sem="relaxed")
    if PASS == PASSES - 1:
        tl.store(block_counts_ptr + tl.program_id(0).to(tl.int64) * 256 + digit, counts)


@triton.jit(do_not_specialize=_RUNTIME)
def _topk_collect_kernel(
    packed_ptr,
    taken_ptr,
    counts_ptr,
    block_counts_ptr,
    logits,
    image_strides,
    anchor_strides,
    cell_strides,
    anchors,
    sizes,
    num_images,
    k,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[s]: key and number of each selected anchor of segment s, unordered, the larger the better.

    A program owns BLOCK anchors of one image and level.  It takes all above the least selected key, wherever there is
    room, and of those equal to it as many as the blocks before it leave.
    """
    level, image, block = _locate(tl.program_id(0), sizes, num_images, BLOCK)
    segment = image * len(sizes) + level
    size = select_int(sizes, level)
    index = block * BLOCK + tl.arange(0, BLOCK)
    value = _load(logits, image_strides, anchor_strides, cell_strides, anchors, level, image, index, index < size)
    selected = tl.minimum(k, size)
    least, ties = _leading_digits(counts_ptr, segment, num_images * len(sizes), selected, PASSES)
    key = sort_key(value)

    earlier = (block * 0).to(tl.int32)
    for first in range(0, block, 128):
        other = first + tl.arange(0, 128)
        program = (tl.program_id(0) - block + other).to(tl.int64)
        count = tl.load(block_counts_ptr + program * 256 + (least % 256).to(tl.int32), mask=other < block, other=0)
        earlier += tl.sum(count, axis=0)

    above = tl.where((index < size) & (key > least), 1, 0)
    equal = tl.where((index < size) & (key == least), 1, 0)
    room = tl.atomic_add(taken_ptr + segment, tl.sum(above, axis=0), sem="relaxed")
    tie = earlier + tl.cumsum(equal, axis=0) - 1
    slot = tl.where(above != 0, room + tl.cumsum(above, axis=0) - 1, selected - ties + tie)
    taken = (above != 0) | ((equal != 0) & (tie < ties))
    tl.store(packed_ptr + segment.to(tl.int64) * k + slot, packed_key(key, index), mask=taken)


@triton.jit(do_not_specialize=_RUNTIME)
def _topk_rank_kernel(
    scores_ptr,
    indices_ptr,
    packed_ptr,
    logits,
    image_strides,
    anchor_strides,
    cell_strides,
    anchors,
    sizes,
    num_images,
    k,
    RANKED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Scores and numbers of the selected anchors in order: each goes where the count of better ones says.

    A program owns RANKED slots of one image and level; slots without an anchor get -inf and -1.
    """
    blocks = tl.cdiv(k, RANKED)
    segment = tl.program_id(0) // blocks
    slot = tl.program_id(0) % blocks * RANKED + tl.arange(0, RANKED)
    level = segment % len(sizes)
    selected = tl.minimum(k, select_int(sizes, level))
    base = segment.to(tl.int64) * k
    mine = tl.load(packed_ptr + base + slot, mask=slot < selected, other=0)
    rank = tl.zeros([RANKED], tl.int32)
    for first in range(0, selected, COMPARED):
        other = first + tl.arange(0, COMPARED)
        packed = tl.load(packed_ptr + base + other, mask=other < selected, other=-0x8000000000000000)
        rank += tl.sum(tl.where(packed[None, :] > mine[:, None], 1, 0), axis=1)
    index = (0x7FFFFFFF - (mine & 0x7FFFFFFF)).to(tl.int32)
    image = segment // len(sizes)
    value = _load(logits, image_strides, anchor_strides, cell_strides, anchors, level, image, index, slot < selected)
    rank = tl.where(slot < selected, rank, slot)
    tl.store(scores_ptr + base + rank, tl.where(slot < selected, value.to(tl.float32), float("-inf")), mask=slot < k)
    tl.store(indices_ptr + base + rank, tl.where(slot < selected, index, -1).to(tl.int64), mask=slot < k)


def topk_anchors(logits: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Scores, float32, and numbers, int64, of the best anchors, [N, L, k]; see `fastmrcnn.ops.topk_anchors`."""
    num_images, levels, device = logits[0].shape[0], len(logits), logits[0].device
    scores = torch.empty(num_images, levels, k, device=device)
    indices = torch.empty(num_images, levels, k, dtype=torch.int64, device=device)
    sizes = [math.prod(x.shape[1:]) for x in logits]
    if num_images * k == 0:
        return scores, indices
    rows = tuple(x if x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous() for x in logits)
    maps = (
        rows,
        runtime_ints(x.stride(0) for x in rows),
        runtime_ints(x.stride(1) for x in rows),
        runtime_ints(x.stride(3) for x in rows),
        runtime_ints(x.shape[1] for x in rows),
        runtime_ints(sizes),
        num_images,
        k,
    )
    segments, passes = num_images * levels, rows[0].element_size()
    programs = num_images * sum(cdiv(size, BLOCK) for size in sizes)
    counts = torch.zeros((passes * 256 + 1) * segments, dtype=torch.int32, device=device)
    counts, taken = counts[: passes * 256 * segments], counts[passes * 256 * segments :]
    block_counts = torch.empty(programs, 256, dtype=torch.int32, device=device)
    packed = torch.empty(segments, k, dtype=torch.int64, device=device)
    with on_device_of(scores):
        for i in range(passes):
            _topk_count_kernel[(programs,)](counts, block_counts, *maps, i, passes, BLOCK, **LAUNCH_OPTIONS)
        _topk_collect_kernel[(programs,)](packed, taken, counts, block_counts, *maps, passes, BLOCK, **LAUNCH_OPTIONS)
        ranking = (segments * cdiv(k, RANKED),)
        _topk_rank_kernel[ranking](scores, indices, packed, *maps, RANKED, COMPARED, **LAUNCH_OPTIONS)
    return scores, indices
