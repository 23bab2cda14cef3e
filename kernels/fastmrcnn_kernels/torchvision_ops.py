"""torchvision's C++ operations behind our padded signatures: the fast implementation on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor

from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.reference.boxes import clip_boxes, decode_deltas, large_enough
from fastmrcnn_kernels.selection import Selection

# As they are now: once `fastmrcnn.patch_torchvision` has put ours in their place, these must not come back to us.
_roi_align, _roi_pool, _nms = torchvision.ops.roi_align, torchvision.ops.roi_pool, torchvision.ops.nms

FEW_BOXES = 1000  # of which all pairs are compared at no more cost than groups are taken one by one


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """`torchvision.ops.roi_align`, safe for padding."""
    return _pool_present(_roi_align, features, rois, output_size, spatial_scale, sampling_ratio, aligned)


def roi_pool(features: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float) -> Tensor:
    """`torchvision.ops.roi_pool`, safe for padding."""
    return _pool_present(_roi_pool, features, rois, output_size, spatial_scale)


def _pool_present(run: Callable[..., Tensor], features: Tensor, rois: Tensor, *semantics: object) -> Tensor:
    """`run`, with zeros for RoIs whose batch index names no image, or that are not finite.

    torchvision would read outside the features for either.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)  # boxes need it, and bfloat16 is not supported
    present = (rois[:, 0] >= 0) & (rois[:, 0] < len(features)) & rois.isfinite().all(dim=1)
    safe = torch.where(present[:, None], rois, 0).to(dtype)
    pooled = run(features.to(dtype), safe, *semantics)
    if not (on_host(present) and present.all()):
        pooled = torch.where(present[:, None, None, None], pooled, 0)
    return pooled.to(features.dtype)


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Each level pools its own RoIs where selecting them is free; elsewhere all of them, and keeps its own.

    The second form does the work of all levels, and needs no synchronisation.
    """
    if len(features) == 1:
        return roi_align(features[0], rois, output_size, spatial_scales[0], sampling_ratio, aligned)
    selecting = on_host(rois)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], *output_size)
    for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
        here = levels == level
        if selecting:
            index = here.nonzero().squeeze(1)
            pooled[index] = roi_align(feature, rois[index], output_size, scale, sampling_ratio, aligned)
        else:
            masked = torch.cat((torch.where(here, rois[:, 0], -1)[:, None], rois[:, 1:]), dim=1)
            pooled = pooled + roi_align(feature, masked, output_size, scale, sampling_ratio, aligned)
    return pooled


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.nms`, which wants one dtype, of boxes and scores of any."""
    if boxes.dtype != scores.dtype:
        dtype = torch.promote_types(boxes.dtype, scores.dtype)
        boxes, scores = boxes.to(dtype), scores.to(dtype)
    return _nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.nms` of all groups at once where they can be moved apart without rounding, else group by group.

    `torchvision.ops.batched_nms` moves them in float32, and rounds.  In float64 the usual coordinates have room; but
    boxes of different groups are compared, too, which does not pay for many.
    """
    if 0 < len(boxes) <= FEW_BOXES:
        wide, (_, number) = boxes.double(), idxs.unique(return_inverse=True)
        offset = (number * (wide.max() - wide.min() + 1).ceil())[:, None]
        moved = wide + offset
        if torch.equal(moved - offset, wide):
            return _nms(moved, scores.double(), iou_threshold)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for group in idxs.unique().tolist():
        members = (idxs == group).nonzero().flatten()
        keep[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    kept = keep.nonzero().flatten()
    return kept[scores[kept].sort(descending=True, stable=True).indices]


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
    """`torchvision.ops.nms` segment by segment; synchronises once per segment on a GPU."""
    if presorted:
        scores = torch.arange(scores.shape[1], 0, -1, device=scores.device).to(boxes.dtype).expand_as(scores)
    indices = torch.full((len(boxes), max_keep), -1, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for segment in valid.any(dim=1).nonzero().flatten().tolist():
        candidates = valid[segment].nonzero().flatten()
        its_boxes, its_scores = boxes[segment, candidates], scores[segment, candidates]
        if groups is None:
            kept = nms(its_boxes, its_scores, iou_threshold)[:max_keep]
        else:
            kept = batched_nms(its_boxes, its_scores, groups[segment, candidates], iou_threshold)[:max_keep]
        indices[segment, : len(kept)] = candidates[kept]
        count[segment] = len(kept)
    return indices, count


def select_detections(
    logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image by image, only the candidates decoded, as many as there are; synchronises."""
    max_detections = selection.max_detections
    dtype = torch.promote_types(logits.dtype, torch.float32)
    boxes = logits.new_zeros(len(logits), max_detections, 4, dtype=dtype)
    scores = logits.new_zeros(len(logits), max_detections, dtype=dtype)
    labels = torch.zeros_like(scores, dtype=torch.int64)
    kept_counts = torch.zeros_like(counts)
    for i, count in enumerate(counts.tolist()):
        shares = logits[i, :count].to(dtype).softmax(dim=-1)
        proposal, label = (shares[:, 1:] > selection.score_threshold).nonzero().unbind(1)
        label = label + 1
        anchors = proposals[i, proposal].to(dtype)
        found = decode_deltas(deltas[i, proposal, label].to(dtype), anchors, selection.weights)
        found = clip_boxes(found[None], sizes[i : i + 1])[0]
        large = large_enough(found, selection.min_size)
        share = shares[proposal, label][large]
        found, label = found[large], label[large]
        groups = torch.zeros_like(label) if selection.class_agnostic else label
        kept = batched_nms(found, share, groups, selection.iou_threshold)[:max_detections]
        boxes[i, : len(kept)], scores[i, : len(kept)], labels[i, : len(kept)] = found[kept], share[kept], label[kept]
        kept_counts[i] = len(kept)
    return boxes, scores, labels, kept_counts
