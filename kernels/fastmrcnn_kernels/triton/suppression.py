"""What all kernels of non-maximum suppression share: overlaps, suppression as bits, and greedy choice within a block.

Overlaps are float32 in the order of operations of `reference/boxes.py`, with a correctly rounded division.  Launched
without fused multiply-add (`LAUNCH_OPTIONS`) they are bit-equal to the reference's, and both decide alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAUNCH_OPTIONS = {"enable_fp_fusion": False, "num_warps": 8, "num_stages": 1}

BLOCK = 64  # boxes whose suppression fits the bits of one word
CHUNK = 32  # kept boxes that a block is compared with at a time


@triton.jit
def iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Intersection over union of boxes a and boxes b, broadcast; NaN if a coordinate is, or both boxes have no area."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    overlap = width * height
    return tl.div_rn(overlap, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap)


@triton.jit
def load_boxes(boxes_ptr, index, usable):
    """Coordinates x1, y1, x2, y2 of boxes number `index` (int64) of [..., 4]; elsewhere NaN, which overlaps nothing."""
    x1 = tl.load(boxes_ptr + index * 4, mask=usable, other=float("nan"))
    y1 = tl.load(boxes_ptr + index * 4 + 1, mask=usable, other=float("nan"))
    x2 = tl.load(boxes_ptr + index * 4 + 2, mask=usable, other=float("nan"))
    y2 = tl.load(boxes_ptr + index * 4 + 3, mask=usable, other=float("nan"))
    return x1, y1, x2, y2


@triton.jit
def as_word(marks):
    """Up to 64 `marks`, or rows of them, as the bits of one int64 each, the first lowest."""
    bit = tl.arange(0, marks.shape[-1]).to(tl.int64)
    if len(marks.shape) == 2:
        bit = bit[None, :]
    return tl.sum(tl.where(marks, 1, 0).to(tl.int64) << bit, axis=len(marks.shape) - 1)


@triton.jit
def bit_of(word, place):
    """Whether the bits of an int64 at `place` are set."""
    return (word >> place) & 1 != 0


@triton.jit
def resolve(suppresses, candidates):
    """Greedy choice among up to 64 boxes in order: which of the `candidates`, bits of an int64, are kept.

    Bit j of suppresses[i] says that box i, if kept, suppresses box j > i.  What is kept is the fixed point of "a
    candidate that nothing kept suppresses", reached from any start: each round settles at least the first box that is
    not settled, and usually all, so there are as many rounds as the longest chain of suppressions has links.
    """
    box = tl.arange(0, suppresses.shape[0]).to(tl.int64)
    kept = candidates
    before = ~candidates
    while kept != before:
        before = kept
        kept = candidates & ~tl.reduce_or(tl.where(bit_of(before, box), suppresses, 0), axis=0)
    return kept


@triton.jit
def suppressed_in_block(x1, y1, x2, y2, group, threshold, GROUPED: tl.constexpr):
    """Words of bits j: whether box i of a block suppresses the later box j, for `resolve`."""
    place = tl.arange(0, x1.shape[0])
    above = iou(x1[:, None], y1[:, None], x2[:, None], y2[:, None], x1[None, :], y1[None, :], x2[None, :], y2[None, :])
    marks = (above > threshold) & (place[:, None] < place[None, :])
    if GROUPED:
        marks = marks & (group[:, None] == group[None, :])
    return as_word(marks)


@triton.jit
def suppressed_by(
    boxes_ptr, groups_ptr, first, end, x1, y1, x2, y2, group, threshold, GROUPED: tl.constexpr, CHUNK: tl.constexpr
):
    """Whether one of the boxes `first` .. `end` - 1 at `boxes_ptr` suppresses each box of a block."""
    found = tl.zeros(x1.shape, tl.int32)
    for start in range(first, end, CHUNK):
        other = start + tl.arange(0, CHUNK)
        ox1, oy1, ox2, oy2 = load_boxes(boxes_ptr, other.to(tl.int64), other < end)
        above = iou(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None], ox1[None, :], oy1[None, :], ox2[None, :], oy2[None, :]
        )
        marks = above > threshold
        if GROUPED:
            marks = marks & (group[:, None] == tl.load(groups_ptr + other, mask=other < end, other=0)[None, :])
        found = tl.maximum(found, tl.max(tl.where(marks, 1, 0), axis=1))
    return found != 0


@triton.jit
def survivors(
    boxes_ptr,
    groups_ptr,
    alive_ptr,
    kept_boxes_ptr,
    kept_groups_ptr,
    segment,
    position,
    first,
    end,
    num_boxes,
    max_keep,
    threshold,
    CHUNK: tl.constexpr,
):
    """The boxes of a block at `position`, their groups, and which are alive after kept boxes `first` .. `end` - 1."""
    usable = position < num_boxes
    source = segment * num_boxes + position
    x1, y1, x2, y2 = load_boxes(boxes_ptr, source, usable)
    group = source
    if groups_ptr is not None:
        group = tl.load(groups_ptr + source, mask=usable, other=0)
    alive = tl.load(alive_ptr + source, mask=usable, other=0) != 0
    found = suppressed_by(
        kept_boxes_ptr + segment * max_keep * 4,
        kept_groups_ptr + segment * max_keep if groups_ptr is not None else None,
        first,
        end,
        x1,
        y1,
        x2,
        y2,
        group,
        threshold,
        groups_ptr is not None,
        CHUNK,
    )
    return x1, y1, x2, y2, group, alive & ~found


@triton.jit
def keep(
    kept_ptr,
    order_ptr,
    kept_boxes_ptr,
    kept_groups_ptr,
    boxes_ptr,
    groups_ptr,
    segment,
    position,
    kept,
    count,
    num_boxes,
    max_keep,
):
    """Append the boxes of a block at `position` that the bits of `kept` name; returns how many are kept now.

    Their index goes to `kept_ptr`; where someone will compare boxes with them, a copy of each to `kept_boxes_ptr`.
    """
    chosen = tl.where(bit_of(kept, tl.arange(0, position.shape[0]).to(tl.int64)), 1, 0)
    rank = count + tl.cumsum(chosen, axis=0) - 1
    stored = (chosen != 0) & (rank < max_keep)
    slot = segment * max_keep + rank
    source = segment * num_boxes + position
    index = position.to(tl.int64)
    if order_ptr is not None:
        index = tl.load(order_ptr + source, mask=stored, other=0)
    tl.store(kept_ptr + slot, index, mask=stored)
    if kept_boxes_ptr is not None:
        for side in tl.static_range(4):
            value = tl.load(boxes_ptr + source * 4 + side, mask=stored, other=0.0)
            tl.store(kept_boxes_ptr + slot * 4 + side, value, mask=stored)
        if groups_ptr is not None:
            tl.store(kept_groups_ptr + slot, tl.load(groups_ptr + source, mask=stored, other=0), mask=stored)
    return tl.minimum(count + tl.sum(chosen, axis=0), max_keep)


@triton.jit
def finish(kept_ptr, count_ptr, segment, count, max_keep, BLOCK: tl.constexpr):
    """Store the count, and -1 to the slots that no box took."""
    tl.store(count_ptr + segment, count.to(tl.int64))
    for first in range(count, max_keep, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        tl.store(kept_ptr + segment * max_keep + slot, -1, mask=slot < max_keep)
