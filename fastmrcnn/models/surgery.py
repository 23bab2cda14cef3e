"""What is exchanged in a finished network: its first and last layers, and which of its weights learn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck

from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.mask_scoring import MaskIoUHead
from fastmrcnn.models.norms import AnyBatchNorm, converted, is_batch_norm


def replace_heads(
    model: GeneralizedRCNN, num_classes: int, num_keypoints: int = 0, class_agnostic: bool = False
) -> None:
    """Give `model` new last layers where it has others, as the published fine-tuning recipe does.

    With `class_agnostic` all classes share their box deltas and their mask: 4 deltas and 1 mask per RoI (detectron2's
    CLS_AGNOSTIC_BBOX_REG and CLS_AGNOSTIC_MASK).
    """
    heads = model.roi_heads
    boxes = 1 if class_agnostic else num_classes
    box = heads.box_predictor
    if (box.cls_score.out_features, box.bbox_pred.out_features) != (num_classes, 4 * boxes):
        heads.box_predictor = FastRCNNPredictor(box.cls_score.in_features, num_classes)
        if class_agnostic:
            heads.box_predictor.bbox_pred = nn.Linear(box.cls_score.in_features, 4)
    if heads.has_mask() and heads.mask_predictor.mask_fcn_logits.out_channels != boxes:
        hidden = heads.mask_predictor.conv5_mask
        heads.mask_predictor = MaskRCNNPredictor(hidden.in_channels, hidden.out_channels, boxes)
    if num_keypoints and heads.has_keypoint():
        last = heads.keypoint_predictor.kps_score_lowres
        if last.out_channels != num_keypoints:
            heads.keypoint_predictor = KeypointRCNNPredictor(last.in_channels, num_keypoints)


def add_mask_iou_head(model: GeneralizedRCNN, num_classes: int) -> None:
    """Give `model` a new head that learns how good its masks are.

    Raises:
        ValueError: it has no masks, or those of whole stages of a ResNet (C4).
    """
    heads, channels = model.roi_heads, model.backbone.out_channels
    if not heads.has_mask() or not isinstance(channels, int) or isinstance(heads.mask_head[0], Bottleneck):
        raise ValueError("mask_iou: only a model with masks of RoI features has such a head")
    heads.mask_iou_head = MaskIoUHead(channels, heads.mask_roi_pool.output_size[0], num_classes)


def first_convolution(model: GeneralizedRCNN) -> tuple[str, nn.Conv2d]:
    """The layer of `model` that sees the image, and its name."""
    convolutions = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    return next(convolutions)


def replace_first_convolution(model: GeneralizedRCNN, channels: int, trained: bool) -> None:
    """Give `model` a new first convolution, for images of `channels` channels.  It learns, also in a frozen stage.

    If the old one is `trained`, its weight is spread over the new channels, which a warning says; else the new one is
    initialised as torchvision's backbones are.
    """
    name, old = first_convolution(model)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        cast(tuple[int, int], old.kernel_size),
        cast(tuple[int, int], old.stride),
        cast(tuple[int, int], old.padding),
        bias=old.bias is not None,
    )
    if trained:
        with torch.no_grad():
            new.weight.copy_(spread(old.weight, channels))
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
        warnings.warn(
            f"{name}: the pretrained weight for {old.in_channels} channels is averaged over them, and spread over "
            f"{channels}; the layer learns",
            stacklevel=2,
        )
    else:
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, new)


def spread(weight: Tensor, channels: int) -> Tensor:
    """The weight [out, in, h, w] of a convolution for `channels` input channels instead.

    Each has the mean of the old ones, scaled so that the result is of the same size: a grey image in any number of
    channels gives what it gave in the old ones.
    """
    return (weight.sum(dim=1, keepdim=True) / channels).expand(-1, channels, -1, -1)


def keep_first_stages(body: nn.Module, trainable: int) -> None:
    """Keep all stages of a ResNet or MobileNetV3 but the last `trainable` as they are, as torchvision counts stages."""
    blocks = list(body.named_children())
    first_of_stage = [
        i
        for i, (name, block) in enumerate(blocks)
        if name.startswith(("conv", "layer")) or getattr(block, "_is_cn", False) or name in ("0", f"{len(blocks) - 1}")
    ]
    end = len(blocks) if trainable == 0 else first_of_stage[-trainable]
    for _, block in blocks[:end]:
        block.requires_grad_(False)


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Keep the parameters of `model` whose dotted names begin with one of `prefixes` as they are: none of them learns.

    Batch norms there become frozen ones, since in training their statistics would go on moving.

    Raises:
        ValueError: a prefix is the name of no module and no parameter; the message has those most like it.
    """
    named = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    names = {name: None for name, _ in named if name}
    for prefix in prefixes:
        if prefix not in names:
            close = get_close_matches(prefix, names, n=3, cutoff=0.4) or [name for name, _ in model.named_children()]
            raise ValueError(
                f"freeze: the model has no module or parameter {prefix!r}; there are, among others, {', '.join(close)}"
            )

    def kept(name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)

    for name, parameter in model.named_parameters():
        if kept(name):
            parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if kept(name) and is_batch_norm(module):
            model.set_submodule(name, converted(cast(AnyBatchNorm, module), "frozen"))
