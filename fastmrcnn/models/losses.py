"""Second-stage losses over padded samples: [N, S] slots of which `valid` ones count.

Each equals torchvision's loss over the valid slots alone; a loss over none of them is 0 and still has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastmrcnn import ops
from fastmrcnn.batches import TargetBatch, widen
from fastmrcnn.models.sampling import gather


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the `valid` ones of `values`, both of one shape; 0 if there are none."""
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def box_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor, valid: Tensor, beta: float
) -> dict[str, Tensor]:
    """`loss_classifier` (cross entropy) and `loss_box_reg` (smooth L1 of the positives, per sample).

    `logits` [N, S, classes], `deltas` [N, S, classes, 4], `labels` [N, S] (0 background), `wanted` [N, S, 4]; `beta` is
    where smooth L1 changes from quadratic to linear.
    """
    labels = labels.clamp(min=0)
    class_loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    positive = valid & (labels > 0)
    predicted = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    wanted = torch.where(positive[..., None], wanted, 0)  # padding must not be NaN: its gradient would be, too
    box_loss = functional.smooth_l1_loss(predicted, wanted, beta=beta, reduction="none").sum(dim=-1)
    return {
        "loss_classifier": mean_over(class_loss, valid.flatten()),
        "loss_box_reg": torch.where(positive, box_loss, 0).sum() / valid.sum().clamp(min=1),
    }


def mask_loss(logits: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, targets: TargetBatch) -> Tensor:
    """Binary cross entropy of `logits` [N, S, M, M] against the matched masks inside `boxes` [N, S, 4]."""
    if targets.masks is None:
        raise ValueError("targets: a model with a mask branch needs 'masks' in every target")
    masks = targets.masks
    wanted = ops.mask_targets(masks.words, masks.offsets, masks.views, boxes, matched, valid, logits.shape[-1])
    wanted = wanted.to(boxes.dtype)
    loss = functional.binary_cross_entropy_with_logits(widen(logits), wanted, reduction="none")
    return mean_over(loss, valid[..., None, None].expand_as(loss))


def keypoint_loss(heatmaps: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, targets: TargetBatch) -> Tensor:
    """Cross entropy of `heatmaps` [N, S, K, M, M] over their cells, for visible keypoints inside their box."""
    if targets.keypoints is None:
        raise ValueError("targets: a model with a keypoint branch needs 'keypoints' in every target")
    cells = heatmaps.shape[-1]
    cell, inside = keypoint_cells(gather(targets.keypoints, matched), boxes, cells)
    logits = widen(heatmaps).flatten(3)
    loss = functional.cross_entropy(logits.flatten(0, 2), cell.flatten(), reduction="none").view(cell.shape)
    return mean_over(loss, inside & valid[..., None])


def keypoint_cells(keypoints: Tensor, boxes: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Heatmap cell of each keypoint, int64 [N, S, K], and whether it is visible and inside its box, bool [N, S, K].

    `keypoints` [N, S, K, 3] (x, y, visibility) in `boxes` [N, S, 4] of `cells` x `cells` cells, numbered row by row; a
    keypoint on the right or lower edge belongs to the last cell.
    """
    start, end = boxes[..., None, :2], boxes[..., None, 2:]
    xy = keypoints[..., :2]
    cell = ((xy - start) * (cells / (end - start))).floor()
    cell = torch.where(xy == end, cells - 1.0, cell)
    inside = ((cell >= 0) & (cell < cells)).all(dim=-1) & (keypoints[..., 2] > 0)
    cell = torch.where(inside[..., None], cell, 0).to(torch.int64)
    return cell[..., 1] * cells + cell[..., 0], inside
