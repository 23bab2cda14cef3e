"""Mask R-CNN, read top-down: `forward` is what users call, `detect` and `losses` are the network.

    images, targets --preprocess--> ImageBatch, TargetBatch
                    --backbone--->  feature maps, finest first
                    --rpn-------->  ProposalBatch
                    --roi_heads-->  DetectionBatch, or losses
                    --postprocess-> one dict per image, in its own pixels

Between the two ends every shape is fixed by the size of the batch and nothing waits for the device.  The classes derive
from torchvision's: their constructors build the parts, with torchvision's arguments, defaults, checks and `state_dict`
keys; the flow between the parts is ours (`rpn.py`, `roi_heads.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision.models.detection as torchvision_detection
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN as TorchvisionGeneralizedRCNN

from fastmrcnn.batches import DetectionBatch, ImageBatch, TargetBatch
from fastmrcnn.models.adopt import adopt
from fastmrcnn.models.checks import check_images, check_targets
from fastmrcnn.models.preprocess import Preprocess
from fastmrcnn.models.roi_heads import RoIHeads
from fastmrcnn.models.rpn import RegionProposalNetwork


class GeneralizedRCNN(TorchvisionGeneralizedRCNN):
    """A two-stage detector of `backbone`, `rpn`, `roi_heads` and `transform`, as torchvision builds them."""

    transform: Preprocess
    rpn: RegionProposalNetwork
    roi_heads: RoIHeads
    info: Any = None
    """What `fastmrcnn.load` knows of a model beside its weights: its `ModelInfo`."""

    def __init__(self, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module, transform: nn.Module) -> None:
        super().__init__(
            backbone,
            adopt(rpn, RegionProposalNetwork),
            adopt(roi_heads, RoIHeads),
            adopt(transform, Preprocess),
        )

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation: torchvision's contract.

        Args:
            images: float [3, H, W] in 0 .. 1, of any sizes.
            targets: one dict per image: `boxes` float [G, 4], `labels` int64 [G] (from 1), and for the branches that
                the model has `masks` [G, H, W] of 0 and 1, `keypoints` float32 [G, K, 3].  They are not changed.

        Returns:
            In training a dict of losses.  In evaluation one dict per image, best detection first: `boxes` float32
            [D, 4], `labels` int64 [D], `scores` float32 [D], and `masks` float32 [D, 1, H, W] in 0 .. 1 or
            `keypoints` float32 [D, K, 3] and `keypoints_scores` [D, K] by the branches of the model; and of one that
            learns them, `mask_scores` float32 [D].

        Raises:
            ValueError, TypeError: for what is missing or malformed in `images` or `targets`.
        """
        check_images(images, len(self.transform.image_mean))
        if targets is not None:
            check_targets(targets, images, self.roi_heads)
        elif self.training:
            raise ValueError("targets: needed in training mode; call model.eval() for detections")
        batch, target_batch, sizes = self.transform.batch(images, targets)
        if self.training:
            assert target_batch is not None
            return self.losses(batch, target_batch)
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return self.transform.results(self.detect(batch), sizes, original_sizes)

    def detect(self, images: ImageBatch) -> DetectionBatch:
        """Detections of a preprocessed batch, in its pixels; masks not pasted.  Never waits for the device."""
        features = self.features(images)
        logits, deltas = self.rpn.head(list(features.values()))
        proposals = self.rpn.propose(images, logits, deltas)
        return self.roi_heads.detect(features, proposals, images)

    def losses(self, images: ImageBatch, targets: TargetBatch) -> dict[str, Tensor]:
        """Training losses of a preprocessed batch, by torchvision's names.  Never waits for the device."""
        features = self.features(images)
        logits, deltas = self.rpn.head(list(features.values()))
        proposals = self.rpn.propose(images, logits, deltas)
        second_stage = self.roi_heads.losses(features, proposals, images, targets)
        return second_stage | self.rpn.losses(images, logits, deltas, targets)

    def features(self, images: ImageBatch) -> dict[str, Tensor]:
        """Feature maps [N, C, Hl, Wl] by name, finest first."""
        features = self.backbone(images.tensors)
        return {"0": features} if isinstance(features, torch.Tensor) else features


class FasterRCNN(torchvision_detection.FasterRCNN, GeneralizedRCNN):
    """Boxes.  Arguments, defaults and checks of `torchvision.models.detection.FasterRCNN`."""


class MaskRCNN(torchvision_detection.MaskRCNN, FasterRCNN):
    """Boxes and masks.  Arguments, defaults and checks of `torchvision.models.detection.MaskRCNN`."""


class KeypointRCNN(torchvision_detection.KeypointRCNN, FasterRCNN):
    """Boxes and keypoints.  Arguments, defaults and checks of `torchvision.models.detection.KeypointRCNN`."""
