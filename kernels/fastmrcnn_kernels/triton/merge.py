"""What the levels of a pyramid kept, merged into one list per image, best first."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.launch import cdiv, on_device_of
from fastmrcnn_kernels.triton.topk import packed_key, sort_key

BLOCK, COMPARED = 32, 64  # boxes that a program ranks, and how many it compares them with at a time


@triton.jit(do_not_specialize=["levels", "slots", "most", "max_keep"])
def _merge_levels_kernel(
    out_boxes_ptr,
    out_scores_ptr,
    out_count_ptr,
    boxes_ptr,
    scores_ptr,
    kept_ptr,
    counts_ptr,
    levels,
    slots,
    most,
    max_keep,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Each kept box goes where the number of better ones of its image says, if that is below `max_keep`.

    A program owns BLOCK of the L * `most` kept boxes of an image, and as many slots of the result, which it fills with
    zeros where no box goes.  Equal scores rank by level, then by their order in it.
    """
    blocks = tl.cdiv(levels * most, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    level = slot // most
    inside = level < levels
    present = inside & (slot % most < tl.load(counts_ptr + image * levels + level, mask=inside, other=0))
    index = tl.load(kept_ptr + image * levels * most + slot, mask=present, other=0)
    place = (image * levels + level) * slots + index
    score = tl.load(scores_ptr + place, mask=present, other=0.0)
    mine = packed_key(sort_key(score), slot)

    rank = tl.zeros([BLOCK], tl.int32)
    total = (levels * 0).to(tl.int32)
    for other_level in range(levels):
        count = tl.load(counts_ptr + image * levels + other_level).to(tl.int32)
        total += count
        for first in range(0, count, COMPARED):
            other = first + tl.arange(0, COMPARED)
            its_slot = other_level * most + other
            its_index = tl.load(kept_ptr + image * levels * most + its_slot, mask=other < count, other=0)
            its_place = (image * levels + other_level) * slots + its_index
            its_score = tl.load(scores_ptr + its_place, mask=other < count, other=float("-inf"))
            its_key = packed_key(sort_key(its_score), its_slot)
            better = (its_key[None, :] > mine[:, None]) & (other < count)[None, :]
            rank += tl.sum(tl.where(better, 1, 0), axis=1)

    total = tl.minimum(total, max_keep)
    placed = present & (rank < max_keep)
    empty = (slot >= total) & (slot < max_keep)
    tl.store(out_scores_ptr + image * max_keep + rank, score, mask=placed)
    tl.store(out_scores_ptr + image * max_keep + slot, 0.0, mask=empty)
    for side in tl.static_range(4):
        value = tl.load(boxes_ptr + place * 4 + side, mask=placed, other=0.0)
        tl.store(out_boxes_ptr + (image * max_keep + rank) * 4 + side, value, mask=placed)
        tl.store(out_boxes_ptr + (image * max_keep + slot) * 4 + side, 0.0, mask=empty)
    if tl.program_id(0) % blocks == 0:
        tl.store(out_count_ptr + image, total.to(tl.int64))


def merge_levels(
    boxes: Tensor, scores: Tensor, kept: Tensor, counts: Tensor, max_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [N, max_keep, 4], scores [N, max_keep] and counts [N]; see `fastmrcnn.ops.merge_levels`."""
    num_images, levels, slots = scores.shape
    most = kept.shape[2]
    if max_keep > levels * most:
        raise ValueError(f"max_keep={max_keep}: only {levels} x {most} boxes were kept")
    out_boxes = boxes.new_empty(num_images, max_keep, 4)
    out_scores = scores.new_empty(num_images, max_keep)
    out_count = counts.new_empty(num_images)
    programs = num_images * cdiv(levels * most, BLOCK)
    if programs == 0:
        out_count.zero_()
    else:
        with on_device_of(boxes):
            _merge_levels_kernel[(programs,)](
                out_boxes,
                out_scores,
                out_count,
                boxes.contiguous(),
                scores.contiguous(),
                kept.contiguous(),
                counts.contiguous(),
                levels,
                slots,
                most,
                max_keep,
                BLOCK,
                COMPARED,
                num_warps=4,
                num_stages=1,
                enable_fp_fusion=False,
            )
    return out_boxes, out_scores, out_count
