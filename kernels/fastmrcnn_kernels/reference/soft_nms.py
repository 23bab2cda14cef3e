"""Soft non-maximum suppression of padded segments (Bodla et al. 2017): scores decay where boxes overlap."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmrcnn_kernels.reference.boxes import pairwise_iou

Method = Literal["linear", "gaussian"]


def padded_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    groups: Tensor | None,
    method: Method,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Box after box of highest score, each of which multiplies the scores of the others by a decay of their IoU.

    Args:
        boxes: [S, K, 4].
        scores: [S, K]; a box whose score is NaN is never taken.
        valid: which slots hold a box, bool [S, K].
        groups: int64 [S, K]; only boxes of the same group decay each other.  None: all of them do.
        method: "linear", 1 - IoU where that exceeds `iou_threshold`, or "gaussian", exp(-IoU^2 / `sigma`).  Where the
            IoU is NaN nothing decays.
        iou_threshold: for "linear".
        sigma: for "gaussian".
        min_score: boxes are taken while the highest score is at least this.
        max_keep: at most so many boxes are taken per segment.

    Returns:
        Indices into the K slots in the order taken (equal scores by index), int64 [S, max_keep], -1 after the last;
        their scores when taken, float32 (float64 for float64 inputs) [S, max_keep], 0 after the last; and how many
        there are, int64 [S].  Scores that are not negative come in descending order.
    """
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    boxes, current = boxes.to(dtype), torch.where(valid, scores.to(dtype), torch.nan)
    indices = torch.full((len(boxes), max_keep), -1, dtype=torch.int64, device=boxes.device)
    taken = current.new_zeros(indices.shape)
    slots = torch.arange(boxes.shape[1], device=boxes.device)
    for i in range(min(max_keep, boxes.shape[1])):
        enough = current >= min_score
        highest = current.masked_fill(~enough, -torch.inf).amax(dim=1, keepdim=True)
        index = (enough & (current == highest)).int().argmax(dim=1, keepdim=True)  # the first of them
        found = enough.any(dim=1, keepdim=True)
        indices[:, i : i + 1] = torch.where(found, index, -1)
        taken[:, i : i + 1] = highest.masked_fill(~found, 0)
        iou = pairwise_iou(boxes.gather(1, index[..., None].expand(-1, -1, 4)), boxes).squeeze(1)
        decays = found
        if groups is not None:
            decays = decays & (groups == groups.gather(1, index))
        decayed = torch.where(decays, current * decay(iou, method, iou_threshold, sigma), current)
        current = torch.where(found & (slots == index), torch.nan, decayed)  # taken: never again
    return indices, taken, (indices >= 0).sum(dim=1)


def decay(iou: Tensor, method: Method, iou_threshold: float, sigma: float) -> Tensor:
    """What a score is multiplied by, for any `iou`."""
    if method == "linear":
        return torch.where(iou > iou_threshold, 1 - iou, 1)
    factor = torch.exp(-(iou * iou) / sigma)
    return torch.where(factor.isnan(), 1, factor)
