"""Non-maximum suppression as PyTorch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.host import KERNEL_DEVICES
from fastmrcnn_kernels.library.launchers import implement

torch.library.define(
    "fastmrcnn::sorted_nms",
    "(Tensor boxes, Tensor alive, Tensor? groups, Tensor? order, float iou_threshold, SymInt max_keep) "
    "-> (Tensor, Tensor)",
)
torch.library.define("fastmrcnn::nms", "(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold) -> Tensor")


implement("sorted_nms", "nms", "sorted_nms")


@torch.library.register_fake("fastmrcnn::sorted_nms")
def _kept_shape(
    boxes: Tensor, alive: Tensor, groups: Tensor | None, order: Tensor | None, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    kept = torch.empty(alive.shape[0], max_keep, dtype=torch.int64, device=boxes.device)
    return kept, kept.new_empty(alive.shape[0])


@torch.library.impl("fastmrcnn::nms", KERNEL_DEVICES)
def _nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    valid = torch.ones_like(scores, dtype=torch.bool)[None]
    segment_groups = None if groups is None else groups[None]
    kept, count = padded_nms(boxes[None], scores[None], valid, iou_threshold, len(scores), groups=segment_groups)
    return kept[0, : int(count)].clone()


@torch.library.register_fake("fastmrcnn::nms")
def _nms_shape(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    return torch.empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64, device=boxes.device)


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
    """See `fastmrcnn.ops.padded_nms`; `valid` is the bool mask [S, K].

    The operator beneath takes boxes by descending score, those that are alive, and the index of each.
    """
    if presorted:
        return torch.ops.fastmrcnn.sorted_nms(boxes, valid, groups, None, iou_threshold, max_keep)
    order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order[..., None].expand_as(boxes))
    groups = None if groups is None else groups.gather(1, order)
    return torch.ops.fastmrcnn.sorted_nms(boxes, valid.gather(1, order), groups, order, iou_threshold, max_keep)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See `fastmrcnn.ops.nms`."""
    return torch.ops.fastmrcnn.nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See `fastmrcnn.ops.batched_nms`."""
    return torch.ops.fastmrcnn.nms(boxes, scores, idxs, iou_threshold)
