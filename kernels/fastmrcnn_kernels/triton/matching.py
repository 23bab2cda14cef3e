"""Boxes matched to the objects of their image: overlaps are computed where they are used, and none of them is kept.

Overlaps are float32 in the order of operations of `reference/boxes.py`, divisions correctly rounded.  Launched without
fused multiply-add (`LAUNCH_OPTIONS`) they are bit-equal to the reference's, so that ties and thresholds decide alike.

What it takes: 2 images that share 268,569 anchors, 20 objects each, are 10.7 million pairs of about 50 instructions,
19 us of an H100 that issues 29e12 of them per second; anchors that are read once and matches, 8.6 MB, are 3 us of its
memory.  Arithmetic being the limit, overlaps are not computed twice: the second kernel looks at what the first one left
of each block, the highest overlap with each object, and only then at blocks that hold an object's best, a few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.box_coding import load_rows
from fastmrcnn_kernels.triton.launch import cdiv, on_device_of

BLOCK = 256  # boxes of a program
OBJECTS = 4  # objects whose overlaps with them a program computes at a time
CHUNK = 128  # objects whose best overlaps are compared with those of a block at a time
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}

NOT_A_NUMBER = tl.constexpr(0x7FC00000)
"""The key of an overlap that is NaN, above all others: as PyTorch's maximum has it."""


@triton.jit
def _overlap_keys(truth_ptr, first, count, x1, y1, x2, y2, usable, OBJECTS: tl.constexpr):
    """Keys [OBJECTS, BLOCK] of the overlaps of the objects from `first` on with the boxes of a block.

    A key is the bits of an overlap, which is never negative: int32 that sort as the floats do, and can be the largest
    of many whatever the order in which programs run.  -1 where there is no object, or no box that is `usable`.
    """
    index = first + tl.arange(0, OBJECTS)
    ax1, ay1, ax2, ay2 = load_rows(truth_ptr, index.to(tl.int64), index < count)
    ax1, ay1, ax2, ay2 = ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None]
    bx1, by1, bx2, by2 = x1[None, :], y1[None, :], x2[None, :], y2[None, :]
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    overlap = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    # Most pairs are apart.  A GPU divides zeros, as all that is not an everyday number, by a slow subroutine.
    apart = overlap == 0.0
    iou = tl.div_rn(tl.where(apart, 1.0, overlap), union)
    key = tl.where(iou == iou, iou.to(tl.int32, bitcast=True), NOT_A_NUMBER)
    key = tl.where(apart, tl.where(tl.abs(union) > 0.0, 0, NOT_A_NUMBER), key)
    return tl.where((index < count)[:, None] & usable[None, :], key, -1)


@triton.jit
def _closest(best, matched, keys, first):
    """The highest key of each box and the object that has it, the lowest of those: so far, and among `keys`."""
    index = first + tl.arange(0, keys.shape[0])
    highest = tl.max(keys, axis=0)
    its_object = tl.min(tl.where(keys == highest[None, :], index[:, None], 0x7FFFFFFF), axis=0)
    closer = highest > best
    return tl.where(closer, highest, best), tl.where(closer, its_object, matched)


@triton.jit
def _load_block(boxes_ptr, truth_ptr, count_ptr, num_boxes, num_objects, image_step, BLOCK: tl.constexpr):
    """What a program works on.

    Its image and block, its boxes (number, coordinates, which exist), the objects of its image and how many there are.
    """
    blocks = tl.cdiv(num_boxes, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    box = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x1, y1, x2, y2 = load_rows(boxes_ptr, image * image_step + box, box < num_boxes)
    count = tl.minimum(tl.load(count_ptr + image), num_objects).to(tl.int32)
    return image, box, x1, y1, x2, y2, box < num_boxes, truth_ptr + image * num_objects * 4, count


@triton.jit(do_not_specialize=["num_boxes", "num_objects", "image_step"])
def _match_boxes_kernel(
    matched_ptr,
    best_ptr,
    block_best_ptr,
    boxes_ptr,
    truth_ptr,
    count_ptr,
    num_boxes,
    num_objects,
    image_step,
    high,
    low,
    BLOCK: tl.constexpr,
    OBJECTS: tl.constexpr,
):
    """matched[n, b] = the object of image n that overlaps box b most, or -1 below `low`, or -2 below `high`.

    A program owns BLOCK boxes of one image and goes through its objects.  If someone will ask, it leaves the highest
    key of each object in its block, block_best[n, block, g], and raises best[n, g] to it, which was 0.
    """
    image, box, x1, y1, x2, y2, usable, its_truth_ptr, count = _load_block(
        boxes_ptr, truth_ptr, count_ptr, num_boxes, num_objects, image_step, BLOCK
    )
    best = tl.full([BLOCK], -1, tl.int32)
    matched = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, OBJECTS):
        keys = _overlap_keys(its_truth_ptr, first, count, x1, y1, x2, y2, usable, OBJECTS)
        best, matched = _closest(best, matched, keys, first)
        if best_ptr is not None:
            index = first + tl.arange(0, OBJECTS)
            highest = tl.max(keys, axis=1)
            tl.store(block_best_ptr + tl.program_id(0).to(tl.int64) * num_objects + index, highest, mask=index < count)
            raised = (index < count) & (highest > 0)
            tl.atomic_max(best_ptr + image * num_objects + index, highest, mask=raised, sem="relaxed")
    iou = best.to(tl.float32, bitcast=True)
    result = tl.where(iou < high, -2, matched)
    result = tl.where((iou < low) | (best < 0), -1, result)
    tl.store(matched_ptr + image * num_boxes + box, result.to(tl.int64), mask=usable)


@triton.jit(do_not_specialize=["num_boxes", "num_objects", "image_step"])
def _match_low_quality_kernel(
    matched_ptr,
    best_ptr,
    block_best_ptr,
    boxes_ptr,
    truth_ptr,
    count_ptr,
    num_boxes,
    num_objects,
    image_step,
    BLOCK: tl.constexpr,
    OBJECTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """matched[n, b] = the object that overlaps box b most, however little, if b is the best box of some object.

    A program owns BLOCK boxes of one image.  Most are done once they have seen that no object has its best among them.
    Keys of NaN are equal, as NaN is not; but a box with such a key has been matched to the object that it gets here.
    """
    image, box, x1, y1, x2, y2, usable, its_truth_ptr, count = _load_block(
        boxes_ptr, truth_ptr, count_ptr, num_boxes, num_objects, image_step, BLOCK
    )
    best_ptr += image * num_objects
    block_best_ptr += tl.program_id(0).to(tl.int64) * num_objects
    held = count * 0
    for first in range(0, count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        highest = tl.load(best_ptr + index, mask=index < count, other=NOT_A_NUMBER)
        here = tl.load(block_best_ptr + index, mask=index < count, other=-1)
        held += tl.sum(tl.where(here == highest, 1, 0), axis=0)
    if held > 0:
        best = tl.full([BLOCK], -1, tl.int32)
        matched = tl.zeros([BLOCK], tl.int32)
        kept = tl.zeros([BLOCK], tl.int32)
        for first in range(0, count, OBJECTS):
            keys = _overlap_keys(its_truth_ptr, first, count, x1, y1, x2, y2, usable, OBJECTS)
            best, matched = _closest(best, matched, keys, first)
            index = first + tl.arange(0, OBJECTS)
            highest = tl.load(best_ptr + index, mask=index < count, other=NOT_A_NUMBER)[:, None]
            equal = tl.where(keys == highest, 1, 0)
            kept = tl.maximum(kept, tl.max(equal, axis=0))
        tl.store(matched_ptr + image * num_boxes + box, matched.to(tl.int64), mask=kept != 0)


def match_boxes(
    boxes: Tensor, truth: Tensor, count: Tensor, high: float, low: float, allow_low_quality: bool
) -> Tensor:
    """int64 [N, B] of `boxes` [N, B, 4] or [1, B, 4] and `truth` [N, G, 4]; see `fastmrcnn.ops.match_boxes`."""
    num_images, num_objects = truth.shape[:2]
    num_boxes = boxes.shape[1]
    matched = torch.empty(num_images, num_boxes, dtype=torch.int64, device=boxes.device)
    programs = num_images * cdiv(num_boxes, BLOCK)
    if not (programs and num_objects):
        return matched.fill_(-1)
    best = block_best = None
    if allow_low_quality:
        best = torch.zeros(num_images, num_objects, dtype=torch.int32, device=boxes.device)
        block_best = torch.empty(programs, num_objects, dtype=torch.int32, device=boxes.device)
    arguments = (
        boxes.float().contiguous(),
        truth.float().contiguous(),
        count.contiguous(),
        num_boxes,
        num_objects,
        num_boxes if len(boxes) == num_images else 0,
    )
    with on_device_of(boxes):
        _match_boxes_kernel[(programs,)](
            matched, best, block_best, *arguments, float(high), float(low), BLOCK, OBJECTS, **LAUNCH_OPTIONS
        )
        if allow_low_quality:
            _match_low_quality_kernel[(programs,)](
                matched, best, block_best, *arguments, BLOCK, OBJECTS, CHUNK, **LAUNCH_OPTIONS
            )
    return matched
