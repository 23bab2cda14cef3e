"""Checkpoints of Mask Scoring R-CNN, and of maskrcnn-benchmark, which it is built on: Faster and Mask R-CNN, too.

The sources of the names are their `modeling` folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.checkpoints.weights import Weights, count_blocks, info_of, model_name, resnet_of, translated
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.models.maskrcnn_benchmark import CornerAnchors
from fastmrcnn.models.resnets import BODIES

RULES = [
    (r"^backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"backbone.fpn.fpn_inner{0}."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"backbone.fpn.fpn_layer{0}."),
    (r"^rpn\.head\.conv\.0\.0\.", r"rpn.head.conv."),
    (r"^roi_heads\.box_head\.", r"roi_heads.box.feature_extractor."),
    (r"^roi_heads\.box_predictor\.", r"roi_heads.box.predictor."),
    (r"^roi_heads\.mask_head\.(\d)\.0\.", r"roi_heads.mask.feature_extractor.mask_fcn{0}."),
    (r"^roi_heads\.mask_predictor\.", r"roi_heads.mask.predictor."),
    (r"^roi_heads\.mask_iou_head\.convs\.(\d)\.", r"roi_heads.maskiou.feature_extractor.maskiou_fcn{0}."),
    (r"^roi_heads\.mask_iou_head\.fcs\.(\d)\.", r"roi_heads.maskiou.feature_extractor.maskiou_fc{0}."),
    (r"^roi_heads\.mask_iou_head\.fc_mask_iou\.", r"roi_heads.maskiou.predictor.maskiou."),
]
"""What the beginnings of our names are there; a number in braces is one more than the first group."""

SIZES, STRIDES = (32, 64, 128, 256, 512), (4, 8, 16, 32, 64)
ANCHORS = "rpn.anchor_generator.cell_anchors."


def name_of(name: str) -> str:
    """The name there of a parameter of ours."""
    for pattern, replacement in RULES:
        if found := re.match(pattern, name):
            number = int(found[1]) + 1 if "{0}" in replacement else 0
            return found.expand(replacement.format(number)) + name[found.end() :]
    return name


def recognises(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are of a detector of maskrcnn-benchmark."""
    return any(name.startswith("roi_heads.box.feature_extractor.") for name in names)


def convert(given: dict[str, Tensor]) -> Weights:
    """The detector whose tensors, by name, a file holds.

    Raises:
        ValueError: it is none that this library has; the message says what is lacking or left over.
    """
    last = "roi_heads.box.predictor.cls_score.weight"
    for name in ("backbone.body.layer1.0.conv2.weight", "backbone.fpn.fpn_inner1.weight", last):
        if name not in given:
            raise ValueError(f"it is no detector with a pyramid on a ResNet: it lacks {name}")
    body = resnet_of(given["backbone.body.layer1.0.conv2.weight"], count_blocks(given, "backbone.body.layer3."))
    kind = "maskrcnn" if any(name.startswith("roi_heads.mask.") for name in given) else "fasterrcnn"
    config = ModelConfig(model_name(f"{kind}_{body}_fpn"), conventions="maskrcnn_benchmark")
    config.stride_in_1x1 = BODIES[body].groups == 1
    config.mask_iou = any(name.startswith("roi_heads.maskiou.") for name in given)
    cells = sorted(name for name in given if name.startswith(ANCHORS))
    if cells:
        config.anchor_sizes = _anchor_sizes([given[name] for name in cells])
    info = info_of(config, len(given[last]) - 1)

    def change(name: str, value: Tensor) -> Tensor:
        return value.flip(1) if name == "backbone.body.conv1.weight" else value  # it sees BGR

    return Weights("maskscoring_rcnn", info, *translated(info, given, name_of, change, cells))


def _anchor_sizes(cells: list[Tensor]) -> list[int]:
    """Sizes of anchors [3, 4] per level, which hold both their corners."""
    sizes = []
    for level, stride in zip(cells, STRIDES, strict=False):
        size = round((level[1, 2] - level[1, 0] + 1).item()) if level.shape == (3, 4) else 0
        sizes.append(size)
        expected = CornerAnchors([(size,)], [stride]).cell_anchors[0] - torch.tensor([0, 0, 1, 1])
        if len(cells) != len(STRIDES) or level.shape != (3, 4) or not torch.allclose(level, expected):
            raise ValueError("its anchors have other ratios than 1 : 2, 1 : 1 and 2 : 1, or other strides than 4 to 64")
    return sizes
