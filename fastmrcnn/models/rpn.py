"""The region proposal network: head outputs to proposals, and its losses.

N images, L levels, A anchors per cell, K proposals per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision.models.detection.rpn as torchvision_rpn
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fastmrcnn import ops
from fastmrcnn.batches import ImageBatch, ProposalBatch, TargetBatch, trim, widen
from fastmrcnn.models.anchors import FixedStrideAnchors
from fastmrcnn.models.sampling import BACKGROUND, IGNORED, gather, match, sample
from fastmrcnn_kernels.reference.canvases import cells
from fastmrcnn_kernels.reference.proposals import by_anchor


class RegionProposalNetwork(torchvision_rpn.RegionProposalNetwork):
    """torchvision's `RegionProposalNetwork` with a fixed-shape flow: `head`, then `propose` and `losses`."""

    smooth_l1_beta: float = 1 / 9
    """Where the box loss changes from quadratic to linear; 0 is L1."""

    def propose(self, images: ImageBatch, logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> ProposalBatch:
        """The best boxes of each image: top k per level, decoded, clipped, non-maximum suppression per level.

        `logits` [N, A, Hl, Wl] and `deltas` [N, 4 A, Hl, Wl] per level are what the head returns.  Only the boxes of
        the top k are decoded.  Gradients end here.
        """
        logits, deltas = [x.detach() for x in logits], [x.detach() for x in deltas]
        slots = min(self.pre_nms_top_n(), max(x[0].numel() for x in logits))
        if images.canvases is not None:
            logits = [ops.clear_beyond_(x, images.canvases, images.stride(x), -torch.inf) for x in logits]
        best, indices = ops.topk_anchors(logits, slots)
        if images.canvases is not None:
            indices = torch.where(best > -torch.inf, indices, -1)
        scores = best.sigmoid()
        boxes, valid = ops.decode_proposals(
            deltas,
            indices,
            self.base_anchors(logits[0].device),
            self.strides(images, logits),
            images.sizes,
            scores=scores,
            min_size=self.min_size,
            min_score=self.score_thresh,
        )
        levels, most = scores.shape[:2], min(self.post_nms_top_n(), slots)
        segments, its_scores, its_valid = (x.flatten(0, 1) for x in (boxes, scores, valid))
        kept, count = ops.padded_nms(segments, its_scores, its_valid, self.nms_thresh, most, presorted=True)
        kept, count = kept.unflatten(0, levels), count.view(levels)
        most = min(self.post_nms_top_n(), levels[1] * most)
        return trim(ProposalBatch(*ops.merge_levels(boxes, scores, kept, count, most)))

    def losses(
        self, images: ImageBatch, logits: Sequence[Tensor], deltas: Sequence[Tensor], targets: TargetBatch
    ) -> dict[str, Tensor]:
        """`loss_objectness` (binary cross entropy) and `loss_rpn_box_reg` (smooth L1) over sampled anchors."""
        anchors = self.all_anchors(images, logits)
        matched = match(targets, anchors, self.proposal_matcher)
        labels = torch.where(matched >= 0, 1, torch.where(matched == BACKGROUND, 0, IGNORED))
        samples = sample(labels, self.fg_bg_sampler)
        labels = gather(labels, samples.indices)
        positive = samples.valid & (labels > 0)

        objects = gather(targets.boxes, gather(matched, samples.indices).clamp(min=0))
        wanted = torch.where(positive[..., None], ops.encode_boxes(objects, anchors[0][samples.indices]), 0)
        all_logits = torch.cat([by_anchor(x) for x in logits], dim=1)
        all_deltas = torch.cat([by_anchor(x, 4) for x in deltas], dim=1)
        predicted, logit = (widen(gather(x, samples.indices)) for x in (all_deltas, all_logits))

        box_loss = functional.smooth_l1_loss(predicted, wanted, beta=self.smooth_l1_beta, reduction="none").sum(dim=-1)
        class_loss = functional.binary_cross_entropy_with_logits(logit, labels.to(logit.dtype), reduction="none")
        sampled = samples.valid.sum().clamp(min=1)
        return {
            "loss_objectness": torch.where(samples.valid, class_loss, 0).sum() / sampled,
            "loss_rpn_box_reg": torch.where(positive, box_loss, 0).sum() / sampled,
        }

    def base_anchors(self, device: torch.device) -> list[Tensor]:
        """Anchors [A, 4] of the cell at the origin, per level; copied to a new device once."""
        generator = self.anchor_generator
        own = type(generator)
        if own.forward is not AnchorGenerator.forward or own.grid_anchors is not AnchorGenerator.grid_anchors:
            raise TypeError(
                f"{own.__name__} overrides AnchorGenerator.forward or grid_anchors, but anchors are computed from "
                "their index: set `sizes`, `aspect_ratios` or `cell_anchors` instead"
            )
        generator.set_cell_anchors(torch.float32, device)
        return generator.cell_anchors

    def strides(self, images: ImageBatch, maps: Sequence[Tensor]) -> list[tuple[int, int]] | Tensor:
        """Pixels per cell of each level, (height, width): padded size // map size, as torchvision has it, or fixed.

        Of images with canvases of their own int64 [N, L, 2]: a map's side is not always the canvas's over a power of 2.
        """
        if isinstance(self.anchor_generator, FixedStrideAnchors):
            return [(stride, stride) for stride in self.anchor_generator.strides]
        height, width = images.tensors.shape[-2:]
        if images.canvases is None:
            return [(height // x.shape[-2], width // x.shape[-1]) for x in maps]
        own = [images.canvases // cells(images.canvases, images.stride(x)).clamp(min=1) for x in maps]
        return torch.stack(own, dim=1)

    def all_anchors(self, images: ImageBatch, maps: Sequence[Tensor]) -> Tensor:
        """Every anchor of every level, the same for all images: [1, sum of Hl Wl A, 4]."""
        if isinstance(self.anchor_generator, FixedStrideAnchors):
            self.base_anchors(maps[0].device)
            strides: Any = self.strides(images, maps)
            return torch.cat(self.anchor_generator.grid_anchors([x.shape[-2:] for x in maps], strides))[None]
        one_image = ImageList(images.tensors, [tuple(images.tensors.shape[-2:])])
        return self.anchor_generator(one_image, list(maps))[0][None]
