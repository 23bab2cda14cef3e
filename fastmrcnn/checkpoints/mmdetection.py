"""Checkpoints of MMDetection 2 and 3: Faster, Mask and Mask Scoring R-CNN with a pyramid, of either style.

The "caffe" style has networks that see bytes, BGR, less their mean; "pytorch" torchvision's, RGB.  Which of them a file
is of is in the configuration that it holds as text, of which nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.checkpoints.weights import Weights, count_blocks, info_of, model_name, resnet_of, translated
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.models.conventions import CAFFE, RATIOS

RULES = [
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^roi_heads\.mask_iou_head\.", "roi_head.mask_iou_head."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
]
"""What the beginnings of our names are there."""

STRIDES = (4, 8, 16, 32, 64)


def name_of(name: str) -> str:
    """The name there of a parameter of ours."""
    for pattern, replacement in RULES:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            break
    return name


def recognises(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are of a two-stage detector of MMDetection."""
    return "rpn_head.rpn_conv.weight" in names and any(name.startswith("roi_head.bbox_head.") for name in names)


def convert(given: dict[str, Tensor], meta: Mapping[str, Any], style: str | None = None) -> Weights:
    """The detector whose tensors, by name, a file holds.

    Args:
        given: tensors by name.
        meta: what the file says beside: the configuration as text, names of classes.
        style: "caffe" or "pytorch"; by default what the configuration says, or "pytorch".

    Raises:
        ValueError: it is none that this library has; the message says what is lacking or left over.
    """
    text = str(meta.get("cfg") or meta.get("config") or "")
    for name in (
        "neck.lateral_convs.0.conv.weight",
        "roi_head.bbox_head.fc_cls.weight",
        "roi_head.bbox_head.fc_reg.weight",
    ):
        if name not in given:
            raise ValueError(f"it is no Faster or Mask R-CNN with a pyramid: it lacks {name}")
    body = resnet_of(given["backbone.layer1.0.conv2.weight"], count_blocks(given, "backbone.layer3."))
    kind = "maskrcnn" if any(name.startswith("roi_head.mask_head.") for name in given) else "fasterrcnn"
    config = ModelConfig(model_name(f"{kind}_{body}_fpn"), conventions="mmdetection")
    num_objects = len(given["roi_head.bbox_head.fc_cls.weight"]) - 1
    config.mask_iou = any(name.startswith("roi_head.mask_iou_head.") for name in given)
    config.class_agnostic = num_objects > 1 and len(given["roi_head.bbox_head.fc_reg.weight"]) == 4
    reversed_channels = _style(config, text, style)
    _sizes(config, text)
    info = info_of(config, num_objects, names=_class_names(meta))

    def change(name: str, value: Tensor) -> Tensor:
        if name == "backbone.body.conv1.weight" and reversed_channels:
            return value.flip(1)
        if "box_predictor.cls_score" in name:
            return value.roll(1, 0)
        if "fc_mask_iou" in name:
            return torch.cat((value.new_zeros(1, *value.shape[1:]), value))
        if config.class_agnostic:
            return value
        rows = 4 if "box_predictor.bbox_pred" in name else 1 if "mask_fcn_logits" in name else 0
        return torch.cat((value.new_zeros(rows, *value.shape[1:]), value)) if rows else value

    return Weights("mmdetection", info, *translated(info, given, name_of, change))


def _style(config: ModelConfig, text: str, style: str | None) -> bool:
    """Set what a style means; whether the network sees BGR."""
    found = re.search(r"style\s*=\s*['\"](\w+)['\"]", text)
    mean, std = (_numbers(text, name) for name in ("mean", "std"))
    order = re.search(r"(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)", text)
    given = style or (found[1] if found else "pytorch")
    caffe = given == "caffe"
    config.stride_in_1x1 = caffe
    bgr = caffe if style or not order else order[1] == "False"
    if style or mean is None or std is None:
        if caffe:
            config.image_mean, config.image_std = list(CAFFE[0]), list(CAFFE[1])
        return bgr
    if bgr:
        mean, std = mean[::-1], std[::-1]
    config.image_mean, config.image_std = [x / 255 for x in mean], [x / 255 for x in std]
    return bgr


def _sizes(config: ModelConfig, text: str) -> None:
    """Set the sizes of images and anchors of which the configuration speaks, if it says one thing only."""
    images = {tuple(map(int, pair)) for pair in re.findall(r"\b(?:img_)?scale\s*=\s*\((\d+),\s*(\d+)\)", text)}
    if len(images) == 1:
        pair = images.pop()
        config.max_size, config.min_size = max(pair), min(pair)
    for found in re.findall(r"\bratios\s*=\s*\[([\d., \n]+)\]", text):
        if [float(x) for x in found.split(",") if x.strip()] != list(RATIOS):
            raise ValueError(f"its anchors have the ratios {found.strip()}: expected {', '.join(map(str, RATIOS))}")
    scales = set(re.findall(r"\bscales\s*=\s*\[([\d., ]+)\]", text))
    if len(scales) == 1:
        values = [float(x) for x in scales.pop().split(",") if x.strip()]
        if len(values) != 1:
            raise ValueError(f"its anchors have {len(values)} scales per level: expected one")
        config.anchor_sizes = [round(values[0] * stride) for stride in STRIDES]


def _numbers(text: str, name: str) -> list[float] | None:
    found = re.search(rf"\b{name}\s*=\s*\[([\d., \n]+)\]", text)
    values = [float(x) for x in found[1].split(",") if x.strip()] if found else []
    return values if len(values) == 3 else None


def _class_names(meta: Mapping[str, Any]) -> list[str]:
    dataset = meta.get("dataset_meta") or {}
    names = meta.get("CLASSES") or dataset.get("CLASSES") or dataset.get("classes") or ()
    return [str(name) for name in names] if isinstance(names, list | tuple) else []
