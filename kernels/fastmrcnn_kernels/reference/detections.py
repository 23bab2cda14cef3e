"""From class logits and box deltas of proposals to detections, in fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.reference.boxes import clip_boxes, decode_deltas, large_enough
from fastmrcnn_kernels.reference.nms import padded_nms
from fastmrcnn_kernels.reference.topk import stable_topk
from fastmrcnn_kernels.selection import Selection


def select_detections(
    logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastmrcnn.ops.select_detections`."""
    max_detections = selection.max_detections
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype).softmax(dim=-1)[..., 1:]
    boxes = decode_deltas(deltas.to(dtype), proposals.to(dtype)[:, :, None], selection.weights)[:, :, 1:]
    boxes = clip_boxes(boxes, sizes)
    present = torch.arange(scores.shape[1], device=counts.device) < counts[:, None]
    valid = (scores > selection.score_threshold) & large_enough(boxes, selection.min_size) & present[..., None]

    classes = torch.arange(1, logits.shape[2], device=logits.device).expand_as(scores)
    if selection.class_agnostic:
        boxes, scores, valid, labels = (x.flatten(1, 2) for x in (boxes, scores, valid, classes))
        kept, count = padded_nms(boxes, scores, valid, selection.iou_threshold, max_detections)
        chosen = kept.clamp(min=0)
    else:
        survivors = _survivors(boxes, scores, valid, selection.iou_threshold)
        boxes, scores, survivors, labels = (x.flatten(1, 2) for x in (boxes, scores, survivors, classes))
        count = survivors.sum(dim=1).clamp(max=max_detections)
        chosen = stable_topk(scores.masked_fill(~survivors, -torch.inf), min(max_detections, scores.shape[1]))[1]
    used = torch.arange(chosen.shape[1], device=count.device) < count[:, None]
    pad = (0, max_detections - chosen.shape[1])
    boxes = torch.where(used[..., None], boxes.gather(1, chosen[..., None].expand(*chosen.shape, 4)), 0)
    scores, labels = (torch.where(used, x.gather(1, chosen), 0) for x in (scores, labels))
    functional_pad = torch.nn.functional.pad
    return functional_pad(boxes, (0, 0, *pad)), functional_pad(scores, pad), functional_pad(labels, pad), count


def _survivors(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Which of the boxes [N, K, C, 4] are left by suppression within each class: bool [N, K, C]."""
    per_class = [x.transpose(1, 2).flatten(0, 1) for x in (boxes, scores, valid)]
    slots = scores.shape[1]
    kept, count = padded_nms(per_class[0], per_class[1], per_class[2], iou_threshold, slots)
    used = torch.arange(slots, device=count.device) < count[:, None]
    survives = torch.zeros_like(kept).scatter_add(1, kept.clamp(min=0), used.long()) > 0
    return survives.unflatten(0, (scores.shape[0], scores.shape[2])).transpose(1, 2)
