"""Checkpoints of detectron2, and of Detectron, its predecessor on Caffe2: names, order of classes, BGR.

The sources of the names are detectron2's `modeling` and `checkpoint/c2_model_loading.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.checkpoints.weights import (
    Weights,
    count_blocks,
    info_of,
    model_name,
    resnet_of,
    translated,
)
from fastmrcnn.models.anchors import FixedStrideAnchors
from fastmrcnn.models.architectures import STRIDES, Architecture
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.models.conventions import RATIOS

EPS = 1e-5
"""Of norms."""

RULES = [
    (r"backbone\.body\.conv1\.", r"{bottom}stem.conv1."),
    (r"backbone\.body\.bn1\.", r"{bottom}stem.conv1.norm."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.0\.", r"{bottom}res{next}.\2.shortcut."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.1\.", r"{bottom}res{next}.\2.shortcut.norm."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.bn(\d)\.", r"{bottom}res{next}.\2.conv\3.norm."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.", r"{bottom}res{next}.\2.conv\3."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"backbone.fpn_lateral{level}."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"backbone.fpn_output{level}."),
    (r"rpn\.head\.conv\.0\.0\.", r"proposal_generator.rpn_head.conv."),
    (r"rpn\.head\.cls_logits\.", r"proposal_generator.rpn_head.objectness_logits."),
    (r"rpn\.head\.bbox_pred\.", r"proposal_generator.rpn_head.anchor_deltas."),
    (r"roi_heads\.box_head\.fc6\.", r"roi_heads.box_head.fc1."),
    (r"roi_heads\.box_head\.fc7\.", r"roi_heads.box_head.fc2."),
    (r"roi_heads\.(?:box_head\.layer4|mask_head)\.(\d)\.downsample\.0\.", r"roi_heads.res5.\1.shortcut."),
    (r"roi_heads\.(?:box_head\.layer4|mask_head)\.(\d)\.downsample\.1\.", r"roi_heads.res5.\1.shortcut.norm."),
    (r"roi_heads\.(?:box_head\.layer4|mask_head)\.(\d)\.bn(\d)\.", r"roi_heads.res5.\1.conv\2.norm."),
    (r"roi_heads\.(?:box_head\.layer4|mask_head)\.(\d)\.conv(\d)\.", r"roi_heads.res5.\1.conv\2."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", r"roi_heads.mask_head.mask_fcn{convolution}."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", r"roi_heads.mask_head.deconv."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", r"roi_heads.mask_head.predictor."),
    (r"roi_heads\.keypoint_head\.(\d+)\.", r"roi_heads.keypoint_head.conv_fcn{even}."),
    (r"roi_heads\.keypoint_predictor\.kps_score_lowres\.", r"roi_heads.keypoint_head.score_lowres."),
]
"""What the beginnings of our names are there; numbers in braces follow from the first group."""


def name_of(name: str, bottom: str) -> str:
    """The name in detectron2 of a parameter of ours, in a backbone whose names begin with `bottom`."""
    for pattern, replacement in RULES:
        if found := re.match(pattern, name):
            n = int(found[1]) if found.re.groups else 0
            numbers = {"next": n + 1, "level": n + 2, "convolution": n + 1, "even": n // 2 + 1, "bottom": bottom}
            return found.expand(replacement.format(**numbers)) + name[found.end() :]
    return name


def to_ours(name: str, value: Tensor) -> Tensor:
    """A parameter, by our name, as our network has it: RGB, background first, and boxes and masks of it, unused."""
    if name == "backbone.body.conv1.weight":
        return value.flip(1)
    if "box_predictor.cls_score" in name:
        return value.roll(1, 0)
    if "box_predictor.bbox_pred" in name:
        return torch.cat((value.new_zeros(4, *value.shape[1:]), value))
    if "mask_fcn_logits" in name:
        return torch.cat((value.new_zeros(1, *value.shape[1:]), value))
    return value


def to_theirs(name: str, value: Tensor) -> Tensor:
    """The inverse of `to_ours`."""
    if name == "backbone.body.conv1.weight":
        return value.flip(1)
    if "box_predictor.cls_score" in name:
        return value.roll(-1, 0)
    if "box_predictor.bbox_pred" in name:
        return value[4:]
    if "mask_fcn_logits" in name:
        return value[1:]
    return value


def recognises(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are of a detector of detectron2 or Detectron."""
    return any(name.startswith("proposal_generator.rpn_head.") for name in names) or is_caffe2(names)


def is_caffe2(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are of a detector of Detectron."""
    return "conv1_w" in names and any(name.startswith("conv_rpn") for name in names)


def convert(given: dict[str, Tensor]) -> Weights:
    """The detector whose tensors, by name, a file of detectron2 holds.

    Raises:
        ValueError: it is none that this library has; the message says what is lacking or left over.
    """
    if is_caffe2(given):
        given = from_caffe2(given)
    bottom = "backbone.bottom_up." if any(name.startswith("backbone.bottom_up.") for name in given) else "backbone."
    architecture = _architecture(given, bottom)
    num_objects = len(_need(given, "roi_heads.box_predictor.cls_score.weight")) - 1
    config = ModelConfig(model_name(str(architecture)), conventions="detectron2")
    config.class_agnostic = num_objects > 1 and len(_need(given, "roi_heads.box_predictor.bbox_pred.weight")) == 4
    if architecture.body.startswith("resnext"):
        config.image_std = [58.395 / 255, 57.12 / 255, 57.375 / 255]
    for key, its in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if key in given:
            setattr(config, its, [x / 255 for x in given[key].flatten().tolist()[::-1]])
    cells = sorted(name for name in given if name.startswith("proposal_generator.anchor_generator.cell_anchors."))
    if cells:
        config.anchor_sizes = _anchor_sizes([given[name] for name in cells], STRIDES[architecture.neck])
    keypoints = given.get("roi_heads.keypoint_head.score_lowres.weight")
    info = info_of(config, num_objects, 0 if keypoints is None else keypoints.shape[1])

    def change(name: str, value: Tensor) -> Tensor:
        if config.class_agnostic and ("bbox_pred" in name or "mask_fcn_logits" in name):
            return value
        return to_ours(name, value)

    ignored = [*cells, "pixel_mean", "pixel_std"]
    return Weights("detectron2", info, *translated(info, given, lambda name: name_of(name, bottom), change, ignored))


def export(weights: Weights) -> dict[str, Tensor]:
    """The tensors of a detector by detectron2's names, for its `DetectionCheckpointer`.

    Raises:
        ValueError: the detector has other conventions, so that detectron2 would not give its results.
    """
    config = weights.info.config
    architecture = Architecture.of(config.name)
    if config.conventions != "detectron2" or architecture is None:
        raise ValueError(
            f"a {config.name} with conventions of {config.conventions} is none that detectron2 can run with its results"
        )
    bottom = "backbone.bottom_up." if architecture.neck == "fpn" else "backbone."
    result = {}
    for name, value in weights.state.items():
        agnostic = config.class_agnostic and ("bbox_pred" in name or "mask_fcn_logits" in name)
        result[name_of(name, bottom)] = value if agnostic else to_theirs(name, value)
    return result


def _architecture(given: dict[str, Tensor], bottom: str) -> Architecture:
    width = _need(given, f"{bottom}res2.0.conv2.weight")
    body = resnet_of(width, count_blocks(given, f"{bottom}res4."))
    one_map = "dc5" if f"{bottom}res5.0.conv1.weight" in given else "c4"
    neck = "fpn" if "backbone.fpn_lateral2.weight" in given else one_map
    mask = any(name.startswith("roi_heads.mask_head.") for name in given)
    keypoint = any(name.startswith("roi_heads.keypoint_head.") for name in given)
    kind = "maskrcnn" if mask else "keypointrcnn" if keypoint else "fasterrcnn"
    found = Architecture.of(f"{kind}_{body}_{neck}")
    assert found is not None
    return found


def _need(given: dict[str, Tensor], name: str) -> Tensor:
    if name not in given:
        raise ValueError(f"it lacks {name}")
    return given[name]


def _anchor_sizes(cells: list[Tensor], strides: Sequence[int]) -> list[int]:
    """Sizes of anchors whose corners are [A, 4] per level, if they are those of sizes and the usual three ratios."""
    sizes = []
    for level in cells:
        areas = (level[:, 2] - level[:, 0]) * (level[:, 3] - level[:, 1])
        sizes.append([round(side) for side in areas[::3].sqrt().tolist()])
    expected = FixedStrideAnchors(sizes, [RATIOS] * len(sizes), strides).cell_anchors
    same = [x.shape == y.shape and torch.allclose(x, y) for x, y in zip(cells, expected, strict=True)]
    if len(cells) != len(strides) or not all(same):
        raise ValueError("its anchors are not of whole sizes and the ratios 1 : 2, 1 : 1 and 2 : 1")
    return [size for level in sizes for size in level]


CAFFE2 = [
    (r"_(?:bn|gn)_s$", ".norm.weight"),
    (r"_(?:bn|gn)_b(?:ias)?$", ".norm.bias"),
    (r"_bn_rm$", ".norm.running_mean"),
    (r"_bn_riv$", ".norm.running_var"),
    (r"_w$", ".weight"),
    (r"_b$", ".bias"),
    (r"^(?:res_)?conv1(?=\.)", "stem.conv1"),
    (r"^(res\d)_(\d+)_branch1(?=\.)", r"\1.\2.shortcut"),
    (r"^(res\d)_(\d+)_branch2a(?=\.)", r"\1.\2.conv1"),
    (r"^(res\d)_(\d+)_branch2b(?=\.)", r"\1.\2.conv2"),
    (r"^(res\d)_(\d+)_branch2c(?=\.)", r"\1.\2.conv3"),
    (r"^fpn_inner_res(\d)_\d+_sum(?:_lateral)?(?=\.)", r"backbone.fpn_lateral\1"),
    (r"^fpn_res(\d)_\d+_sum(?=\.)", r"backbone.fpn_output\1"),
    (r"^conv_rpn(?:_fpn2)?(?=\.)", "proposal_generator.rpn_head.conv"),
    (r"^rpn_cls_logits(?:_fpn2)?(?=\.)", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn_bbox_pred(?:_fpn2)?(?=\.)", "proposal_generator.rpn_head.anchor_deltas"),
    (r"^fc6(?=\.)", "roi_heads.box_head.fc1"),
    (r"^fc7(?=\.)", "roi_heads.box_head.fc2"),
    (r"^cls_score(?=\.)", "roi_heads.box_predictor.cls_score"),
    (r"^bbox_pred(?=\.)", "roi_heads.box_predictor.bbox_pred"),
    (r"^_\[mask\]_fcn(\d)(?=\.)", r"roi_heads.mask_head.mask_fcn\1"),
    (r"^conv5_mask(?=\.)", "roi_heads.mask_head.deconv"),
    (r"^mask_fcn_logits(?=\.)", "roi_heads.mask_head.predictor"),
    (r"^conv_fcn(\d)(?=\.)", r"roi_heads.keypoint_head.conv_fcn\1"),
    (r"^kps_score_lowres(?=\.)", "roi_heads.keypoint_head.score_lowres"),
]
"""What parts of Detectron's names are in detectron2; all that match, in this order."""


def from_caffe2(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detectron's tensors as detectron2 has them: names, classes with the background last, norms with statistics."""
    pyramid = any(name.startswith("fpn_") for name in given)
    result: dict[str, Tensor] = {}
    for theirs, value in given.items():
        if theirs.endswith("_momentum"):
            continue
        name = theirs
        for pattern, replacement in CAFFE2:
            name = re.sub(pattern, replacement, name)
        if name.startswith("res5.") and not pyramid:
            name = f"roi_heads.{name}"
        elif name.startswith(("res", "stem")):
            name = f"backbone.bottom_up.{name}" if pyramid else f"backbone.{name}"
        if "box_predictor.cls_score" in name:
            value = value.roll(-1, 0)
        elif "box_predictor.bbox_pred" in name:
            value = value[4:]
        elif "mask_head.predictor" in name:
            value = value[1:]
        if theirs.endswith(("_bn_b", "_bn_bias")):
            result.setdefault(name.replace(".bias", ".running_mean"), torch.zeros_like(value))
            result.setdefault(name.replace(".bias", ".running_var"), torch.ones_like(value) - EPS)
        result[name] = value
    return result
