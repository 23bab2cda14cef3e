"""Boxes matched to the objects of their image."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check, widen
from fastmrcnn.ops.implementations import Impl, choose_kernel


def match_boxes(
    boxes: Tensor,
    truth: Tensor,
    count: Tensor,
    *,
    high: float,
    low: float,
    allow_low_quality: bool,
    impl: Impl = "auto",
) -> Tensor:
    """The object that each box belongs to, by the highest IoU; as torchvision's `Matcher` over `box_iou`.

    No matrix of all boxes and objects is kept, and there are no gradients.

    Args:
        boxes: [N, B, 4]; or [1, B, 4], shared by all images, as anchors are.
        truth: boxes of the objects, [N, G, 4].
        count: how many of the first slots of each image hold an object, int64 [N].  What the other slots hold, NaN
            included, has no influence.
        high: least IoU of a box that belongs to an object.
        low: boxes whose highest IoU is below it belong to no object; 0 <= `low` <= `high`.
        allow_low_quality: boxes that no other box of their image exceeds in IoU with some object belong to an object
            however low their IoU: to the one with which it is highest, which need not be the one that they are best
            for.  All boxes that tie count, even at an IoU of 0.

    Returns:
        int64 [N, B]: index of the object with the highest IoU, the lowest of those that tie; -1 where that IoU is below
        `low`, -2 where it is not, but below `high`.  Where an image has no objects, -1.

        Boxes without area, or with x2 < x1 or y2 < y1, overlap nothing: their IoU is 0.  It is NaN where both areas
        add up to 0, or a coordinate is NaN, or infinities cancel.  As in torchvision, a NaN is above all numbers and
        below no threshold: such a box belongs to the first object with which its IoU is NaN.  And an object with a NaN
        among its IoUs has no best box.
    """
    check("truth", truth, None, None, 4)
    check("boxes", boxes, None, None, 4)
    check("count", count, len(truth), dtype=torch.int64)
    if len(boxes) not in (1, len(truth)):
        raise ValueError(f"boxes: expected those of {len(truth)} images, or of one, got {list(boxes.shape)}")
    if not 0 <= low <= high:
        raise ValueError(f"low={low}, high={high}: expected 0 <= low <= high")
    boxes, truth = widen(boxes.detach()), widen(truth.detach())
    dtype = torch.promote_types(boxes.dtype, truth.dtype)
    boxes, truth = boxes.to(dtype), truth.to(dtype)
    run = choose_kernel("match_boxes", impl, boxes, "reference", "boxes", (torch.float32,))[1]
    return run(boxes, truth, count, high, low, allow_low_quality)
