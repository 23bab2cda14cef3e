"""Which anchors and proposals learn what: matching to ground truth and balanced sampling, in fixed shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher

from fastmrcnn import ops
from fastmrcnn.batches import TargetBatch
from fastmrcnn_kernels.host import on_host

BACKGROUND, IGNORED = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS


def match(targets: TargetBatch, boxes: Tensor, matcher: Matcher) -> Tensor:
    """The ground-truth object that each of `boxes` [N, B, 4] (or [1, B, 4], shared by all images) belongs to.

    Returns int64 [N, B]: the object with the highest IoU if that reaches `matcher.high_threshold`, BACKGROUND if it is
    below `matcher.low_threshold`, else IGNORED.  With `matcher.allow_low_quality_matches`, every box that no other box
    exceeds in IoU with some object keeps its object too.  Thresholds and ties as torchvision's `Matcher`.
    """
    return ops.match_boxes(
        boxes,
        targets.boxes,
        targets.count,
        high=matcher.high_threshold,
        low=matcher.low_threshold,
        allow_low_quality=matcher.allow_low_quality_matches,
    )


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
    wanted = torch.stack((labels > 0, labels == 0), dim=1)  # [N, 2, B]: positives, negatives
    key = torch.rand(labels.shape, device=labels.device)
    best = torch.where(wanted, key[:, None], -1.0).topk(slots, dim=2)
    positives, negatives = (best.values >= 0).sum(dim=2).unbind(dim=1)
    positives = positives.clamp(max=most_positives)
    count = positives + negatives
    if on_host(labels):  # no arithmetic on slots that no image uses
        most_positives = max(positives.tolist(), default=0)
        used = min(slots, max(count.tolist(), default=0))
    else:
        used = slots
    slot = torch.arange(used, device=labels.device)
    # Of the 2 S candidates: the first positives, and the first negatives, which begin at S, in the slots after them.
    place = torch.where(slot < positives[:, None], slot, slots + slot - positives[:, None])
    return Samples(best.indices.flatten(1).gather(1, place), slot < count[:, None], most_positives)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N, S] of `values` [N, B, ...]: [N, S, ...]."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]
