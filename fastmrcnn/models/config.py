"""A model as plain data: what a command line or a checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fastmrcnn.models import builders
from fastmrcnn.models.architectures import Architecture, build
from fastmrcnn.models.conventions import CONVENTIONS, Library
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.norms import Norm, replace_norms
from fastmrcnn.models.small import maskrcnn_resnet18_fpn
from fastmrcnn.models.surgery import (
    add_mask_iou_head,
    freeze,
    keep_first_stages,
    replace_first_convolution,
    replace_heads,
)

ModelName = Literal[
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet18_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet101_fpn",
    "maskrcnn_resnext101_32x4d_fpn",
    "maskrcnn_resnext101_32x8d_fpn",
    "maskrcnn_resnext101_64x4d_fpn",
    "maskrcnn_resnet50_c4",
    "maskrcnn_resnet101_c4",
    "maskrcnn_resnet50_dc5",
    "maskrcnn_resnet101_dc5",
    "fasterrcnn_resnet101_fpn",
    "fasterrcnn_resnext101_32x4d_fpn",
    "fasterrcnn_resnext101_32x8d_fpn",
    "fasterrcnn_resnext101_64x4d_fpn",
    "fasterrcnn_resnet50_c4",
    "fasterrcnn_resnet101_c4",
    "fasterrcnn_resnet50_dc5",
    "fasterrcnn_resnet101_dc5",
    "keypointrcnn_resnet101_fpn",
    "keypointrcnn_resnext101_32x8d_fpn",
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
        norm: norms of the backbone and its pyramid: frozen ones, batch norms, batch norms over all processes (sync), or
            group norms; by default the architecture's. Stages that do not learn keep frozen ones. Batch norms in heads
            stay, and take their statistics per process, since they leave out its unused samples.
        freeze: names of layers or weights that do not learn, such as backbone.body.layer1 or roi_heads.box_head, with
            all that is in them; the statistics of their batch norms stay, too.
        class_agnostic: all classes share box deltas and masks.
        channels: of the images; for other than 3 the first layer is new, of pretrained weights the mean of the old.
        image_mean: mean per channel of images in 0 to 1; by default that of ImageNet, for other than 3 channels 0.5.
        image_std: deviation per channel; by default that of ImageNet, for other than 3 channels 0.25.
        mask_iou: learn how good masks are, too, for their scores (Mask Scoring R-CNN).
        conventions: library whose rules hold for all that weights do not say: how images are resized and normalised,
            anchors, RoIAlign, box losses, pasted masks. Loading a file of that library sets it.
        stride_in_1x1: bottlenecks halve maps in their 1x1 convolution; by default as the library has it.
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
    norm: Norm | None = None
    freeze: list[str] = field(default_factory=list)
    class_agnostic: bool = False
    channels: int = 3
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    mask_iou: bool = False
    conventions: Library = "torchvision"
    stride_in_1x1: bool | None = None


def build_model(
    config: ModelConfig, num_classes: int, num_keypoints: int = 0, *, pretrained: bool = True
) -> GeneralizedRCNN:
    """The network `config` describes, for `num_classes` classes (with the background).

    Without `pretrained` the weights that `config` names are not read, but all else is as with them: for a `state_dict`
    that is to be loaded.

    Raises:
        ValueError: a setting that does not exist, or that the architecture does not have.
    """
    trained = bool(config.weights or config.weights_backbone)
    if trained and not pretrained:
        unnamed = replace(config, weights=None, weights_backbone=None, trainable_backbone_layers=None)
        model = _architecture(unnamed, num_classes, num_keypoints)
        _as_trained(model, config)
    else:
        model = _architecture(config, num_classes, num_keypoints)
    if config.norm is not None:
        replace_norms(model.backbone, config.norm)
    if config.channels != 3:
        replace_first_convolution(model, config.channels, trained and pretrained)
    replace_heads(model, num_classes, num_keypoints, config.class_agnostic)
    if config.mask_iou:
        add_mask_iou_head(model, num_classes)
    freeze(model, config.freeze)
    return model


def _architecture(config: ModelConfig, num_classes: int, num_keypoints: int) -> GeneralizedRCNN:
    """What torchvision's builder, or ours, makes of `config`."""
    kwargs: dict[str, Any] = {"box_detections_per_img": config.detections_per_image, **_normalization(config)}
    kwargs |= {k: v for k in ("min_size", "max_size") if (v := getattr(config, k)) is not None}
    if config.proposals is not None:
        counts = (f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test"))
        kwargs |= dict.fromkeys(counts, config.proposals)
    if config.box_samples is not None:
        kwargs["box_batch_size_per_image"] = config.box_samples

    architecture = Architecture.of(config.name)
    if architecture is not None and not _is_published(config):
        return _on_resnet(architecture, config, num_classes, num_keypoints, kwargs)
    if config.conventions != "torchvision":
        raise ValueError(f"{config.name} has torchvision's conventions, not those of {config.conventions}")
    if config.stride_in_1x1 is not None:
        raise ValueError(f"stride_in_1x1: {config.name} with torchvision's conventions has none")
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
        return build(**kwargs)
    if "keypoint" in config.name:
        kwargs["num_keypoints"] = num_keypoints or 17
    return build(num_classes=num_classes, **kwargs)


def _is_published(config: ModelConfig) -> bool:
    """Whether torchvision has a builder of it."""
    return config.conventions == "torchvision" and hasattr(builders, config.name)


def _on_resnet(
    architecture: Architecture, config: ModelConfig, num_classes: int, num_keypoints: int, options: dict[str, Any]
) -> GeneralizedRCNN:
    """What torchvision has no builder of."""
    if config.weights is not None:
        raise ValueError(f"{config.name} with conventions of {config.conventions} has no weights of torchvision's")
    model = build(
        architecture,
        CONVENTIONS[config.conventions],
        num_classes,
        num_keypoints or 17,
        weights_backbone=config.weights_backbone,
        stride_in_1x1=config.stride_in_1x1,
        anchor_sizes=config.anchor_sizes,
        **options,
    )
    if config.trainable_backbone_layers is not None:
        keep_first_stages(cast(nn.Module, model.backbone.body), config.trainable_backbone_layers)
    return model


def _normalization(config: ModelConfig) -> dict[str, list[float]]:
    """The arguments `image_mean` and `image_std` of a detector, where they are not the usual."""
    if config.channels < 1:
        raise ValueError(f"channels: expected 1 or more, got {config.channels}")
    arguments = {}
    for name, default in (("image_mean", 0.5), ("image_std", 0.25)):
        values = getattr(config, name)
        if values is None and config.channels != 3:
            values = [default] * config.channels
        if values is None:
            continue
        if len(values) != config.channels:
            raise ValueError(f"{name}: expected a number for each of {config.channels} channels, got {values}")
        arguments[name] = list(values)
    if min(arguments.get("image_std", [1.0])) <= 0:
        raise ValueError(f"image_std: expected positive numbers, got {config.image_std}")
    return arguments


def _as_trained(model: GeneralizedRCNN, config: ModelConfig) -> None:
    """Do to a new network what torchvision does to a pretrained one: keep its first stages, and freeze norms."""
    if config.name == "maskrcnn_resnet18_fpn":
        return
    trainable = config.trainable_backbone_layers
    if not _is_published(config):
        if trainable is not None:
            keep_first_stages(cast(nn.Module, model.backbone.body), trainable)
        return
    keep_first_stages(cast(nn.Module, model.backbone.body), 3 if trainable is None else trainable)
    if config.name.endswith("_v2"):
        return
    replace_norms(model.backbone, "frozen")
    if config.weights and "resnet50" in config.name:
        choice = get_model_weights(config.name)[config.weights.rpartition(".")[-1]]
        if choice.name == "COCO_V1":
            overwrite_eps(model, 0.0)
