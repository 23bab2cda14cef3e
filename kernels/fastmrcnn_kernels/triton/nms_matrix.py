"""Non-maximum suppression by a bit matrix: all pairs of a panel in parallel, then a walk over each segment's blocks.

S segments of K boxes, sorted by score.  More than one panel of boxes takes turns: what a panel keeps sweeps the boxes
after it.  Nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.launch import cdiv, next_power_of_2, on_device_of
from fastmrcnn_kernels.triton.suppression import (
    BLOCK,
    CHUNK,
    LAUNCH_OPTIONS,
    as_word,
    bit_of,
    finish,
    iou,
    keep,
    load_boxes,
    resolve,
    survivors,
)

PANEL = 4096  # boxes whose pairs are compared at a time: 2 MB of bits per segment at most


@triton.jit(do_not_specialize=["num_boxes", "start", "blocks"])
def _nms_mask_kernel(words_ptr, boxes_ptr, groups_ptr, threshold, num_boxes, start, blocks, BLOCK: tl.constexpr):
    """words[s, b, i]: bit j says whether box i of a panel suppresses its box 64 b + j, which comes later.

    A program owns 64 x 64 pairs of one segment, on or above the diagonal; words below it are neither written nor read.
    """
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    column_block = tl.program_id(0) % blocks
    row_block = tl.program_id(1)
    if row_block <= column_block:
        row = row_block * BLOCK + tl.arange(0, BLOCK)
        column = column_block * BLOCK + tl.arange(0, BLOCK)
        first = segment * num_boxes + start
        ax1, ay1, ax2, ay2 = load_boxes(boxes_ptr, first + row, start + row < num_boxes)
        bx1, by1, bx2, by2 = load_boxes(boxes_ptr, first + column, start + column < num_boxes)
        overlap = iou(
            ax1[:, None],
            ay1[:, None],
            ax2[:, None],
            ay2[:, None],
            bx1[None, :],
            by1[None, :],
            bx2[None, :],
            by2[None, :],
        )
        marks = (overlap > threshold) & (row[:, None] < column[None, :])
        if groups_ptr is not None:
            row_group = tl.load(groups_ptr + first + row, mask=start + row < num_boxes, other=0)
            column_group = tl.load(groups_ptr + first + column, mask=start + column < num_boxes, other=0)
            marks = marks & (row_group[:, None] == column_group[None, :])
        place = (segment * blocks + column_block) * blocks * BLOCK
        tl.store(words_ptr + place + row, as_word(marks))


@triton.jit(do_not_specialize=["num_boxes", "start", "blocks", "max_keep"])
def _nms_walk_kernel(
    kept_ptr,
    count_ptr,
    count_before_ptr,
    kept_boxes_ptr,
    kept_groups_ptr,
    words_ptr,
    boxes_ptr,
    groups_ptr,
    alive_ptr,
    order_ptr,
    num_boxes,
    start,
    blocks,
    max_keep,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Kept boxes of a panel, in order, after those of the panels before it.

    A program owns one segment.  A block of 64 boxes loses those that kept boxes of earlier blocks suppress, one masked
    union of words, which do not depend on what was kept and are loaded ahead; `resolve` chooses among the rest.
    """
    segment = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, BLOCK)
    chosen = tl.zeros([ROWS], tl.int32)
    count = (segment * 0).to(tl.int32)
    if count_before_ptr is not None:
        count = tl.load(count_before_ptr + segment).to(tl.int32)
    block = count * 0
    while (block < blocks) & (count < max_keep):
        first = block * BLOCK
        column_ptr = words_ptr + (segment * blocks + block) * blocks * BLOCK
        earlier = tl.load(column_ptr + row, mask=row < first, other=0)
        within = tl.load(column_ptr + first + place)
        position = start + first + place
        alive = tl.load(alive_ptr + segment * num_boxes + position, mask=position < num_boxes, other=0) != 0
        removed = tl.reduce_or(tl.where(chosen != 0, earlier, 0), axis=0)
        kept = resolve(within, as_word(alive) & ~removed)
        chosen = tl.where(row // BLOCK == block, tl.where(bit_of(kept, (row % BLOCK).to(tl.int64)), 1, 0), chosen)
        count = keep(
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
        )
        block += 1
    finish(kept_ptr, count_ptr, segment, count, max_keep, BLOCK)


@triton.jit(do_not_specialize=["num_boxes", "start", "blocks", "max_keep"])
def _nms_sweep_kernel(
    alive_ptr,
    kept_boxes_ptr,
    kept_groups_ptr,
    count_before_ptr,
    count_ptr,
    boxes_ptr,
    groups_ptr,
    threshold,
    num_boxes,
    start,
    blocks,
    max_keep,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Whether boxes from `start` on are alive still, after what the panel before them has kept.

    A program owns BLOCK boxes of one segment.
    """
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    position = start + tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    _x1, _y1, _x2, _y2, _group, alive = survivors(
        boxes_ptr,
        groups_ptr,
        alive_ptr,
        kept_boxes_ptr,
        kept_groups_ptr,
        segment,
        position,
        tl.load(count_before_ptr + segment).to(tl.int32),
        tl.load(count_ptr + segment).to(tl.int32),
        num_boxes,
        max_keep,
        threshold,
        CHUNK,
    )
    place = alive_ptr + segment * num_boxes + position
    tl.store(place, tl.where(alive, 1, 0).to(tl.uint8), mask=position < num_boxes)


def nms_by_matrix(
    boxes: Tensor, alive: Tensor, groups: Tensor | None, order: Tensor | None, threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """Indices [S, max_keep] and counts [S], as `sorted_nms` returns them; one panel of boxes after the other."""
    segments, num_boxes = alive.shape
    kept = torch.empty(segments, max_keep, dtype=torch.int64, device=boxes.device)
    blocks = cdiv(min(num_boxes, PANEL), BLOCK)
    rows = next_power_of_2(blocks * BLOCK)
    words = torch.empty(segments, blocks, blocks * BLOCK, dtype=torch.int64, device=boxes.device)
    several = num_boxes > PANEL
    if several:
        alive = alive.clone()
    kept_boxes = boxes.new_empty(segments, max_keep, 4) if several else None
    kept_groups = groups.new_empty(kept.shape) if several and groups is not None else None
    before = kept.new_zeros(segments) if several else None
    count = kept.new_empty(segments)
    with on_device_of(boxes):
        for start in range(0, num_boxes, PANEL):
            if start:
                later = cdiv(num_boxes - start, BLOCK)
                _nms_sweep_kernel[(segments * later,)](
                    alive,
                    kept_boxes,
                    kept_groups,
                    before,
                    count,
                    boxes,
                    groups,
                    threshold,
                    num_boxes,
                    start,
                    later,
                    max_keep,
                    BLOCK,
                    CHUNK,
                    **LAUNCH_OPTIONS,
                )
                before, count = count, torch.empty_like(count)
            _nms_mask_kernel[(segments * blocks, blocks)](
                words,
                boxes,
                groups,
                threshold,
                num_boxes,
                start,
                blocks,
                BLOCK,
                **LAUNCH_OPTIONS,
            )
            _nms_walk_kernel[(segments,)](
                kept,
                count,
                before,
                kept_boxes,
                kept_groups,
                words,
                boxes,
                groups,
                alive,
                order,
                num_boxes,
                start,
                blocks,
                max_keep,
                rows,
                BLOCK,
                **LAUNCH_OPTIONS | {"num_warps": 4 if rows <= 2048 else 8},
            )
    return kept, count
