"""Which object each box belongs to: torchvision's `Matcher` over `box_iou`, for padded objects, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.host import on_host

BELOW_LOW, BETWEEN = -1, -2
"""Results that are no object, numbered as torchvision's `Matcher` numbers them."""

PAIRS_AT_A_TIME = 1 << 17  # of a box and an object; few enough that their overlaps stay in a cache


def match_boxes(
    boxes: Tensor, truth: Tensor, count: Tensor, high: float, low: float, allow_low_quality: bool
) -> Tensor:
    """See `fastmrcnn.ops.match_boxes`.  Of the overlaps, those of a part of the boxes exist at a time."""
    num_images, num_objects = truth.shape[:2]
    if num_images * num_objects * boxes.shape[1] == 0:
        return boxes.new_full((num_images, boxes.shape[1]), BELOW_LOW, dtype=torch.int64)
    present = (torch.arange(num_objects, device=truth.device) < count[:, None])[..., None]  # [N, G, 1]
    parts = boxes.split(max(1, PAIRS_AT_A_TIME // (num_images * num_objects)), dim=1)

    closest, results, highest_of_parts = [], [], []
    for part in parts:
        iou = torch.where(present, _overlaps(truth, part), -1.0)  # [N, G, boxes of the part]
        best, matched = iou.max(dim=1)
        result = torch.where(best < high, BETWEEN, matched)
        results.append(torch.where(best < low, BELOW_LOW, result))
        if allow_low_quality:
            closest.append(matched)
            highest_of_parts.append(iou.amax(dim=2, keepdim=True))

    if allow_low_quality:
        highest = torch.stack(highest_of_parts).amax(dim=0)
        highest = torch.where(present, highest, torch.nan)  # to which nothing is equal
        for i, part in enumerate(parts):
            if len(parts) > 1:
                if on_host(boxes) and not (highest_of_parts[i] == highest).any():
                    continue  # no object has its best box here
                iou = _overlaps(truth, part)
            results[i] = torch.where((iou == highest).any(dim=1), closest[i], results[i])
    return torch.cat(results, dim=1)


def _overlaps(truth: Tensor, boxes: Tensor) -> Tensor:
    """IoU [N, G, B] of `truth` [N, G, 4] and `boxes` [N, B, 4] or [1, B, 4], to the bit that of `pairwise_iou`.

    A coordinate at a time, each of them contiguous, it takes a CPU a quarter of the time.
    """
    ax1, ay1, ax2, ay2 = truth[:, :, None].unbind(-1)
    bx1, by1, bx2, by2 = boxes.mT.contiguous()[:, :, None].unbind(1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = width * height
    return overlap / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap)
