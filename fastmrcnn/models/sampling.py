"""Which anchors and proposals learn what: matching to ground truth and balanced sampling, in fixed shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher

from fastmrcnn.batches import TargetBatch
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.reference.boxes import pairwise_iou

BACKGROUND, IGNORED = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS


def match(targets: TargetBatch, boxes: Tensor, matcher: Matcher) -> Tensor:
    """The ground-truth object that each of `boxes` [N, B, 4] (or [1, B, 4], shared by all images) belongs to.

    Returns int64 [N, B]: the object with the highest IoU if that reaches `matcher.high_threshold`, BACKGROUND if it is
    below `matcher.low_threshold`, else IGNORED.  With `matcher.allow_low_quality_matches`, every box that no other box
    exceeds in IoU with some object keeps its object too.  Thresholds and ties as torchvision's `Matcher`.
    """
    iou = pairwise_iou(targets.boxes, boxes).masked_fill(~targets.valid[..., None], -1.0)  # [N, G, B]
    best, matched = iou.max(dim=1)
    result = torch.where(best < matcher.high_threshold, IGNORED, matched)
    result = torch.where(best < matcher.low_threshold, BACKGROUND, result)
    if matcher.allow_low_quality_matches:
        closest = (iou == iou.amax(dim=2, keepdim=True)) & targets.valid[..., None]
        result = torch.where(closest.any(dim=1), matched, result)
    return result


class Samples(NamedTuple):
    """A random selection of S boxes per image, positives first.

    Attributes:
        indices: int64 [N, S] into the boxes that were sampled from.
        valid: which slots are used, bool [N, S].
        positives: positives are within so many of the first slots (which may hold others, too).
    """

    indices: Tensor
    valid: Tensor
    positives: int


def sample(labels: Tensor, sampler: BalancedPositiveNegativeSampler) -> Samples:
    """`sampler.batch_size_per_image` of the boxes labelled `labels` [N, B]: > 0 positive, 0 negative, < 0 neither.

    At most the share `sampler.positive_fraction` of them positive, the rest negative, both chosen uniformly, as
    torchvision's sampler does; but by the largest of random keys instead of a permutation of the selected, so that
    shapes do not depend on the labels.
    """
    slots = min(sampler.batch_size_per_image, labels.shape[1])
    most_positives = min(int(sampler.batch_size_per_image * sampler.positive_fraction), slots)
    key = torch.rand(labels.shape, device=labels.device)  # in [0, 1): 2 .. 3 chosen positives, 1 .. 2 negatives
    chance = torch.where(labels > 0, key, -1.0).topk(most_positives, dim=1)
    positive = torch.zeros_like(key).scatter(1, chance.indices, (chance.values >= 0).to(key.dtype)) > 0
    key = torch.where(positive, key + 2, torch.where(labels == 0, key + 1, 0.0))
    if on_host(labels):  # no arithmetic on slots that no image uses
        most_positives = int(positive.sum(dim=1).max())
        slots = int((key > 0).sum(dim=1).max().clamp(max=slots))
    chosen = key.topk(slots, dim=1)
    return Samples(chosen.indices, chosen.values > 0, most_positives)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, S] of `values` [N, B, ...]: [N, S, ...]."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]
