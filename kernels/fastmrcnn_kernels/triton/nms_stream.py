"""Non-maximum suppression as a stream: block after block against what was kept, until enough is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.launch import on_device_of
from fastmrcnn_kernels.triton.suppression import (
    BLOCK,
    CHUNK,
    LAUNCH_OPTIONS,
    as_word,
    finish,
    keep,
    resolve,
    suppressed_in_block,
    survivors,
)


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _nms_stream_kernel(
    kept_ptr,
    count_ptr,
    kept_boxes_ptr,
    kept_groups_ptr,
    boxes_ptr,
    groups_ptr,
    alive_ptr,
    order_ptr,
    threshold,
    num_boxes,
    max_keep,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Kept boxes in order, as soon as there are `max_keep`.

    A program owns one segment.  A block of 64 boxes loses those that kept boxes suppress; `resolve` chooses among the
    rest, and they join the kept.
    """
    segment = tl.program_id(0).to(tl.int64)
    count = (segment * 0).to(tl.int32)
    first = count * 0
    while (first < num_boxes) & (count < max_keep):
        position = first + tl.arange(0, BLOCK)
        x1, y1, x2, y2, group, alive = survivors(
            boxes_ptr,
            groups_ptr,
            alive_ptr,
            kept_boxes_ptr,
            kept_groups_ptr,
            segment,
            position,
            0,
            count,
            num_boxes,
            max_keep,
            threshold,
            CHUNK,
        )
        within = suppressed_in_block(x1, y1, x2, y2, group, threshold, groups_ptr is not None)
        kept = resolve(within, as_word(alive))
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
        tl.debug_barrier()  # what is kept was written by other threads than will read it
        first += BLOCK
    finish(kept_ptr, count_ptr, segment, count, max_keep, BLOCK)


def nms_by_stream(
    boxes: Tensor, alive: Tensor, groups: Tensor | None, order: Tensor | None, threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """Indices [S, max_keep] and counts [S], as `sorted_nms` returns them."""
    segments, num_boxes = alive.shape
    kept = torch.empty(segments, max_keep, dtype=torch.int64, device=boxes.device)
    count = kept.new_empty(segments)
    with on_device_of(boxes):
        _nms_stream_kernel[(segments,)](
            kept,
            count,
            boxes.new_empty(segments, max_keep, 4),
            None if groups is None else groups.new_empty(kept.shape),
            boxes,
            groups,
            alive,
            order,
            threshold,
            num_boxes,
            max_keep,
            BLOCK,
            CHUNK,
            **LAUNCH_OPTIONS,
        )
    return kept, count
