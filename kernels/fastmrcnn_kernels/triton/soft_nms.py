"""Soft non-maximum suppression: one scan of the scores per box that is taken.

Scores, too, are float32 in the order of operations of the reference: with the linear decay, both are bit-equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.elementary import exp, swap_order
from fastmrcnn_kernels.triton.launch import next_power_of_2, on_device_of
from fastmrcnn_kernels.triton.suppression import LAUNCH_OPTIONS, finish, iou

LEAST_BLOCK, BLOCK = 128, 1024
BOXES_PER_WARP = 128

NOTHING = tl.constexpr(-(1 << 63))


@triton.jit
def _decay(overlap, iou_threshold, sigma, GAUSSIAN: tl.constexpr):
    """What a score is multiplied by."""
    if GAUSSIAN:
        factor = exp(tl.div_rn(-(overlap * overlap), sigma))
        factor = tl.where(factor == factor, factor, 1.0)
    else:
        factor = tl.where(overlap > iou_threshold, 1.0 - overlap, 1.0)
    return factor


@triton.jit
def _as_key(score, slot, min_score):
    """Score and slot as one int64: the largest is that of the highest score, of equal ones that of the first slot.

    NOTHING, which is less than all keys, is that of a score which is NaN or below `min_score`.
    """
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # one zero, one key
    return tl.where(score >= min_score, (swap_order(bits).to(tl.int64) << 32) - slot, NOTHING)


@triton.jit
def _of_key(key):
    """Score and slot, int64, of a key."""
    slot = -key & 0xFFFFFFFF
    ordered = ((key + slot) >> 32).to(tl.int32)
    return swap_order(ordered).to(tl.float32, bitcast=True), slot


@triton.jit
def _load_boxes(boxes_ptr, index, count, usable):
    """Coordinates x1, y1, x2, y2 of boxes number `index` (int64) of [4, `count`]; NaN, which decays nothing, elsewhere.

    Not [count, 4]: neighbouring threads read neighbouring addresses.
    """
    x1 = tl.load(boxes_ptr + index, mask=usable, other=float("nan"))
    y1 = tl.load(boxes_ptr + count + index, mask=usable, other=float("nan"))
    x2 = tl.load(boxes_ptr + count * 2 + index, mask=usable, other=float("nan"))
    y2 = tl.load(boxes_ptr + count * 3 + index, mask=usable, other=float("nan"))
    return x1, y1, x2, y2


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _soft_nms_kernel(
    indices_ptr,
    taken_ptr,
    count_ptr,
    current_ptr,
    boxes_ptr,
    groups_ptr,
    iou_threshold,
    sigma,
    min_score,
    num_boxes,
    max_keep,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Indices and scores of boxes in the order taken.

    A program owns one segment, and its current scores in memory: NaN where there is no box, or none any more.  A step
    scans them in blocks: it lets them decay by the box taken last, and finds the one to be taken next.
    """
    segment = tl.program_id(0).to(tl.int64)
    all_boxes = tl.num_programs(0).to(tl.int64) * num_boxes
    last = segment * 0 - 1
    count = (segment * 0).to(tl.int32)
    key = segment * 0
    while (count < max_keep) & (key != NOTHING):
        source = segment * num_boxes + last
        tx1, ty1, tx2, ty2 = _load_boxes(boxes_ptr, source, all_boxes, last >= 0)
        its_group = last
        if groups_ptr is not None:
            its_group = tl.load(groups_ptr + source, mask=last >= 0, other=0)
        best = tl.full([BLOCK], NOTHING, tl.int64)
        for first in range(0, num_boxes, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            usable = slot < num_boxes
            place = segment * num_boxes + slot
            x1, y1, x2, y2 = _load_boxes(boxes_ptr, place, all_boxes, usable)
            factor = _decay(iou(tx1, ty1, tx2, ty2, x1, y1, x2, y2), iou_threshold, sigma, GAUSSIAN)
            if groups_ptr is not None:
                group = tl.load(groups_ptr + place, mask=usable, other=0)
                factor = tl.where(group == its_group, factor, 1.0)
            current = tl.load(current_ptr + place, mask=usable, other=float("nan")) * factor
            current = tl.where(slot == last, float("nan"), current)
            tl.store(current_ptr + place, current, mask=usable)
            best = tl.maximum(best, _as_key(current, slot, min_score))
        key = tl.max(best, axis=0)
        score, last = _of_key(key)
        found = key != NOTHING
        tl.store(indices_ptr + segment * max_keep + count, last, mask=found)
        tl.store(taken_ptr + segment * max_keep + count, score, mask=found)
        count += tl.where(found, 1, 0)
        tl.debug_barrier()  # the layouts of loads and stores may differ: others may read what a thread has written
    finish(indices_ptr, count_ptr, segment, count, max_keep, BLOCK)


def padded_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    groups: Tensor | None,
    gaussian: bool,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [S, max_keep], float32 scores [S, max_keep] and counts [S], as the reference returns them."""
    segments, num_boxes = valid.shape
    indices = torch.full((segments, max_keep), -1, dtype=torch.int64, device=boxes.device)
    taken = torch.zeros(segments, max_keep, dtype=torch.float32, device=boxes.device)
    if not (segments and num_boxes and max_keep):
        return indices, taken, indices.new_zeros(segments)
    count = indices.new_empty(segments)
    block = min(BLOCK, max(LEAST_BLOCK, next_power_of_2(num_boxes)))
    with on_device_of(boxes):
        _soft_nms_kernel[(segments,)](
            indices,
            taken,
            count,
            torch.where(valid, scores.float(), torch.nan).contiguous(),
            boxes.float().movedim(2, 0).contiguous(),
            None if groups is None else groups.contiguous(),
            iou_threshold,
            sigma,
            min_score,
            num_boxes,
            max_keep,
            gaussian,
            block,
            **LAUNCH_OPTIONS | {"num_warps": block // BOXES_PER_WARP},
        )
    return indices, taken, count
