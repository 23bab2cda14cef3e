"""A Mask R-CNN small enough to train from scratch on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchvision.models import WeightsEnum, resnet18
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from fastmrcnn.models.mask_rcnn import MaskRCNN
from fastmrcnn.ops import MultiScaleRoIAlign

POOLED = 7


def maskrcnn_resnet18_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: WeightsEnum | str | None = None,
    channels: int = 64,
    head_features: int = 256,
    anchor_sizes: Sequence[int] = (16, 32, 64, 128, 256),
    **kwargs: Any,
) -> MaskRCNN:
    """Mask R-CNN, ResNet-18 and FPN, with narrow heads and one sample per RoI bin; nothing frozen.

    Args:
        num_classes: classes, with the background.
        weights_backbone: torchvision's weights for ResNet-18, by enum or name.
        channels: of the feature pyramid and the mask head.
        head_features: width of the two layers of the box head.
        anchor_sizes: one per pyramid level (strides 4, 8, 16, 32, 64), in pixels.
        **kwargs: of `MaskRCNN`, such as `min_size`.
    """
    body = resnet18(weights=weights_backbone)
    layers = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(body, layers, [64, 128, 256, 512], channels)
    maps = list(layers.values())
    anchors = AnchorGenerator(tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes))
    parts: dict[str, Any] = {  # torchvision's constructors have no type hints
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(maps, output_size=POOLED, sampling_ratio=1),
        "box_head": TwoMLPHead(channels * POOLED**2, head_features),
        "box_predictor": FastRCNNPredictor(head_features, num_classes),
        "mask_roi_pool": MultiScaleRoIAlign(maps, output_size=2 * POOLED, sampling_ratio=1),
        "mask_head": MaskRCNNHeads(channels, (channels, channels), dilation=1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes),
    }
    return MaskRCNN(backbone, **(parts | kwargs))
