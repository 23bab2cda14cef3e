"""Greedy non-maximum suppression of padded segments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.reference.boxes import pairwise_iou


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    iou_threshold: float,
    max_keep: int,
    *,
    groups: Tensor | None = None,
    presorted: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `fastmrcnn.ops.padded_nms`; `valid` is the bool mask [S, K]."""
    slots = torch.arange(boxes.shape[1], device=boxes.device)
    order = slots.expand_as(valid)
    if not presorted:
        order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order[..., None].expand_as(boxes))
    alive = valid.gather(1, order)
    groups = None if groups is None else groups.gather(1, order)
    for i in range(boxes.shape[1]):
        overlaps = pairwise_iou(boxes[:, i : i + 1], boxes).squeeze(1) > iou_threshold
        if groups is not None:
            overlaps = overlaps & (groups == groups[:, i : i + 1])
        alive = alive & ~(alive[:, i : i + 1] & overlaps & (slots > i))
    return compact(order, alive, max_keep)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See `fastmrcnn.ops.nms`."""
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See `fastmrcnn.ops.batched_nms`: one segment, in which only boxes of the same group suppress each other."""
    valid = torch.ones_like(idxs, dtype=torch.bool)[None]
    kept, _ = padded_nms(boxes[None], scores[None], valid, iou_threshold, len(boxes), groups=idxs[None])
    return kept[kept >= 0]


def compact(values: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` of those `values` [S, K] that `keep` [S, K] marks, in order, then -1; and how many, [S]."""
    rank = keep.cumsum(dim=1) - 1
    slot = torch.where(keep & (rank < width), rank, width)  # everything else goes to a slot that is cut off
    out = values.new_full((len(values), width + 1), -1).scatter(1, slot, values)[:, :width]
    return out, keep.sum(dim=1).clamp(max=width)
