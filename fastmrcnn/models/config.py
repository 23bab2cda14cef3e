"""A model as plain data: what a command line or a checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from fastmrcnn.models import builders
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.small import maskrcnn_resnet18_fpn

ModelName = Literal[
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet18_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "keypointrcnn_resnet50_fpn",
]


@dataclass
class ModelConfig:
    """Which network.

    Args:
        name: architecture; maskrcnn_resnet18_fpn is the small one for a CPU.
        weights: torchvision's pretrained weights of the whole detector, such as DEFAULT; for other classes the last
            layers are new.
        weights_backbone: torchvision's pretrained weights of the backbone alone, such as DEFAULT.
        trainable_backbone_layers: backbone stages that learn, 0 to 5; by default torchvision's choice.
        min_size: shorter side that images are resized to, in pixels; by default the architecture's.
        max_size: bound of the longer side; by default the architecture's.
        anchor_sizes: anchor size of each pyramid level, finest first; by default the architecture's.
        detections_per_image: detections that are kept.
        proposals: region proposals per image, before and after suppression; by default the architecture's.
        box_samples: proposals per image that the second stage learns from; by default the architecture's.
    """

    name: ModelName = "maskrcnn_resnet50_fpn"
    weights: str | None = None
    weights_backbone: str | None = None
    trainable_backbone_layers: int | None = None
    min_size: int | None = None
    max_size: int | None = None
    anchor_sizes: list[int] | None = None
    detections_per_image: int = 100
    proposals: int | None = None
    box_samples: int | None = None


def build_model(config: ModelConfig, num_classes: int, num_keypoints: int = 0) -> GeneralizedRCNN:
    """The network `config` describes, for `num_classes` classes (with the background).

    Raises:
        ValueError: a setting the architecture does not have.
    """
    kwargs: dict[str, Any] = {"box_detections_per_img": config.detections_per_image}
    kwargs |= {k: v for k in ("min_size", "max_size") if (v := getattr(config, k)) is not None}
    if config.proposals is not None:
        counts = (f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test"))
        kwargs |= dict.fromkeys(counts, config.proposals)
    if config.box_samples is not None:
        kwargs["box_batch_size_per_image"] = config.box_samples

    if config.name == "maskrcnn_resnet18_fpn":
        if config.weights or config.trainable_backbone_layers is not None:
            raise ValueError(f"{config.name} has neither weights of the whole detector nor trainable_backbone_layers")
        if config.anchor_sizes is not None:
            kwargs["anchor_sizes"] = config.anchor_sizes
        return maskrcnn_resnet18_fpn(num_classes=num_classes, weights_backbone=config.weights_backbone, **kwargs)

    build = getattr(builders, config.name)
    kwargs |= {"weights": config.weights, "weights_backbone": config.weights_backbone}
    if config.trainable_backbone_layers is not None:
        kwargs["trainable_backbone_layers"] = config.trainable_backbone_layers
    if config.anchor_sizes is not None:
        sizes = tuple((size,) for size in config.anchor_sizes)
        kwargs["rpn_anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    if config.weights is not None:
        model = build(**kwargs)
        replace_heads(model, num_classes, num_keypoints)
        return model
    if "keypoint" in config.name:
        kwargs["num_keypoints"] = num_keypoints or 17
    return build(num_classes=num_classes, **kwargs)


def replace_heads(model: GeneralizedRCNN, num_classes: int, num_keypoints: int = 0) -> None:
    """Give `model` new last layers for other classes or keypoints, as the published fine-tuning recipe does."""
    heads = model.roi_heads
    if heads.box_predictor.cls_score.out_features != num_classes:
        heads.box_predictor = FastRCNNPredictor(heads.box_predictor.cls_score.in_features, num_classes)
        if heads.has_mask():
            hidden = heads.mask_predictor.conv5_mask
            heads.mask_predictor = MaskRCNNPredictor(hidden.in_channels, hidden.out_channels, num_classes)
    if num_keypoints and heads.has_keypoint():
        last = heads.keypoint_predictor.kps_score_lowres
        if last.out_channels != num_keypoints:
            heads.keypoint_predictor = KeypointRCNNPredictor(last.in_channels, num_keypoints)
