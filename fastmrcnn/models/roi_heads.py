"""Second stage: classify and refine proposals, then segment (or find keypoints in) what was detected.

N images, K proposals, D detections, P pooled size.  Heads see the RoIs of all images in one batch, [N K, C, P, P].
"""

from __future__ import annotations

from typing import Literal

import torch
import torchvision.models.detection.roi_heads as torchvision_heads
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch, trim, widen
from fastmrcnn.models import losses
from fastmrcnn.models.mask_scoring import iou_targets, mask_iou_loss
from fastmrcnn.models.padded_norm import ignoring_padding
from fastmrcnn.models.sampling import BACKGROUND, IGNORED, gather, match, sample

Features = dict[str, Tensor]


class RoIHeads(torchvision_heads.RoIHeads):
    """torchvision's `RoIHeads` with a fixed-shape flow: `detect` in inference, `losses` in training."""

    min_size: float = 1e-2
    """Shortest side of a detection, in pixels of the resized image."""

    smooth_l1_beta: float = 1 / 9
    """Where the box loss changes from quadratic to linear; 0 is L1."""

    keypoint_scores: Literal["logit", "probability"] = "logit"
    """What the score of a keypoint is: the height of its peak, as in torchvision, or, as in detectron2, that after a
    softmax over the heatmap."""

    def detect(self, features: Features, proposals: ProposalBatch, images: ImageBatch) -> DetectionBatch:
        """Detections, with mask probabilities [N, D, M, M] and keypoints where the model has those branches."""
        logits, deltas = self._classify(features, proposals.boxes, proposals.valid, images)
        detections = trim(self.select(logits, deltas, proposals, images))
        if self.has_mask():
            detections.masks, detections.mask_scores = self.masks(features, detections, images)
        if self.has_keypoint():
            heatmaps = widen(self._branch("keypoint", features, detections.boxes, detections.valid, images))
            canvas = (images.tensors.shape[-2], images.tensors.shape[-1])
            keypoints, scores = ops.heatmaps_to_keypoints(
                heatmaps.flatten(0, 1), detections.boxes.flatten(0, 1), canvas
            )
            if self.keypoint_scores == "probability":
                flat = heatmaps.flatten(0, 1).flatten(2)
                scores = 1 / (flat - scores[..., None]).exp().sum(dim=-1)
            found = torch.cat((keypoints, scores[..., None]), dim=-1)
            detections.keypoints = found.unflatten(0, detections.scores.shape)
        return detections

    def masks(self, features: Features, detections: DetectionBatch, images: ImageBatch) -> tuple[Tensor, Tensor | None]:
        """Mask probabilities [N, D, M, M] of detections, each of its class; and scores [N, D], if that is learned."""
        pooled = self._pool("mask", features, detections.boxes, detections.valid, images)
        logits = of_label(self._run_branch("mask", pooled, detections.valid), detections.labels)
        return widen(logits).sigmoid(), self.mask_scores(pooled, logits, detections)

    def mask_scores(self, pooled: Tensor, logits: Tensor, detections: DetectionBatch) -> Tensor | None:
        """Scores [N, D] of masks by what their head saw, and their `logits` [N, D, M, M]; None without such a head."""
        iou = self._mask_iou(pooled, logits, detections.labels)
        return None if iou is None else detections.scores * widen(iou)

    def _mask_iou(self, pooled: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
        """The IoU [N, S] that masks are told to have."""
        head = getattr(self, "mask_iou_head", None)
        if head is None:
            return None
        iou = head(pooled, logits.flatten(0, 1)).unflatten(0, labels.shape)
        return iou.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)

    def select(self, logits: Tensor, deltas: Tensor, proposals: ProposalBatch, images: ImageBatch) -> DetectionBatch:
        """The best boxes over all classes but the background: threshold, non-maximum suppression per class, top D.

        `logits` are [N, K, classes] and `deltas` [N, K, classes, 4].
        """
        candidates = logits.shape[1] * (logits.shape[2] - 1)
        selected = ops.select_detections(
            logits,
            deltas,
            proposals.boxes,
            proposals.count,
            images.sizes,
            score_threshold=self.score_thresh,
            iou_threshold=self.nms_thresh,
            max_detections=min(self.detections_per_img, candidates),
            min_size=self.min_size,
            weights=self.box_coder.weights,
        )
        return DetectionBatch(*selected)

    def losses(
        self, features: Features, proposals: ProposalBatch, images: ImageBatch, targets: TargetBatch
    ) -> dict[str, Tensor]:
        """Losses of all branches over sampled proposals; ground-truth boxes are among the proposals."""
        boxes = torch.cat((proposals.boxes, targets.boxes), dim=1)
        present = torch.cat((proposals.valid, targets.valid), dim=1)
        matched = match(targets, boxes, self.proposal_matcher)
        labels = gather(targets.labels, matched.clamp(min=0))
        labels = torch.where(matched == BACKGROUND, 0, labels)
        labels = torch.where(present & (matched != IGNORED), labels, -1)
        samples = sample(labels, self.fg_bg_sampler)
        boxes, labels, matched = (gather(x, samples.indices) for x in (boxes, labels, matched))
        matched = matched.clamp(min=0)

        logits, deltas = self._classify(features, boxes, samples.valid, images)
        wanted = ops.encode_boxes(gather(targets.boxes, matched), boxes, self.box_coder.weights)
        result = losses.box_losses(widen(logits), widen(deltas), labels, wanted, samples.valid, self.smooth_l1_beta)

        # Only positives reach the other branches, and they are the first samples.
        positive = samples.valid & (labels > 0)
        positives = samples.positives
        boxes, labels, matched, positive = (x[:, :positives] for x in (boxes, labels, matched, positive))
        if self.has_mask():
            pooled = self._pool("mask", features, boxes, positive, images)
            mask_logits = of_label(self._run_branch("mask", pooled, positive), labels)
            result["loss_mask"] = losses.mask_loss(mask_logits, boxes, matched, positive, targets)
            iou = self._mask_iou(pooled, mask_logits, labels)
            if iou is not None:
                wanted = iou_targets(mask_logits.detach(), boxes, matched, positive, targets)
                result["loss_mask_iou"] = mask_iou_loss(iou, wanted)
        if self.has_keypoint():
            heatmaps = self._branch("keypoint", features, boxes, positive, images)
            result["loss_keypoint"] = losses.keypoint_loss(heatmaps, boxes, matched, positive, targets)
        return result

    def _classify(self, features: Features, boxes: Tensor, valid: Tensor, images: ImageBatch) -> tuple[Tensor, Tensor]:
        """Class logits [N, K, classes] and box deltas [N, K, classes, 4] of `boxes` [N, K, 4].

        Deltas that all classes share are repeated in a view, without memory of their own.
        """
        pooled = pool(self.box_roi_pool, features, boxes, valid, images)
        with ignoring_padding(valid, self.box_head, self.box_predictor):
            logits, deltas = self.box_predictor(self.box_head(pooled))
        logits, deltas = logits.unflatten(0, boxes.shape[:2]), deltas.unflatten(0, boxes.shape[:2])
        deltas = deltas.unflatten(2, (-1, 4))
        return logits, deltas.expand(*logits.shape, 4) if deltas.shape[2] == 1 else deltas

    def _branch(self, name: str, features: Features, boxes: Tensor, valid: Tensor, images: ImageBatch) -> Tensor:
        """Output [N, D, channels, M, M] of the mask or keypoint branch for `boxes` [N, D, 4]."""
        return self._run_branch(name, self._pool(name, features, boxes, valid, images), valid)

    def _pool(self, name: str, features: Features, boxes: Tensor, valid: Tensor, images: ImageBatch) -> Tensor:
        """What that branch sees, [N D, C, P, P]."""
        pooled = pool(getattr(self, f"{name}_roi_pool"), features, boxes, valid, images)
        return pooled.contiguous(memory_format=torch.channels_last)

    def _run_branch(self, name: str, pooled: Tensor, valid: Tensor) -> Tensor:
        """What it makes of that."""
        head: nn.Module = getattr(self, f"{name}_head")
        predictor: nn.Module = getattr(self, f"{name}_predictor")
        with ignoring_padding(valid, head, predictor):
            return predictor(head(pooled)).unflatten(0, valid.shape)


def pool(pooler: MultiScaleRoIAlign, features: Features, boxes: Tensor, valid: Tensor, images: ImageBatch) -> Tensor:
    """RoI features [N K, C, P, P] of `boxes` [N, K, 4] by the options of `pooler`, a `MultiScaleRoIAlign`.

    Slots that are not `valid` have batch index -1, which pools to zeros.
    """
    image = torch.arange(len(boxes), device=boxes.device)[:, None]
    index = torch.where(valid, image, -1).to(boxes.dtype)
    rois = torch.cat((index[..., None], boxes), dim=-1).flatten(0, 1)
    if (own := getattr(pooler, "pool", None)) is not None:
        return own(features, rois, images)
    return ops.pool_like(pooler, features, rois, images.tensors.shape[-2], images.canvases)


def of_label(masks: Tensor, labels: Tensor) -> Tensor:
    """The mask of each RoI's class (in padding, which may have none, any): [N, D, M, M] of [N, D, classes, M, M].

    The only one, if all classes share it.
    """
    if masks.shape[2] == 1:
        return masks[:, :, 0]
    index = labels.clamp(min=0)[..., None, None, None].expand(*labels.shape, 1, *masks.shape[-2:])
    return masks.gather(2, index).squeeze(2)
