"""State dicts of torchvision's detectors: which of its builders they are of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmrcnn.checkpoints.weights import (
    COUNTER,
    Weights,
    count_blocks,
    info_of,
    model_name,
    resnet_of,
    translated,
)
from fastmrcnn.models.config import ModelConfig

PUBLISHED = ("258fb6c6", "bf2d0c1e", "fc266e95")
"""What the SHA-256 begin with of the files of COCO_V1, of Faster, Mask and Keypoint R-CNN R50-FPN; their norms have an
epsilon of 0."""


def present_name(name: str) -> str:
    """What torchvision now calls a parameter; some that it published have older names."""
    name = re.sub(r"(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", name)
    return re.sub(r"mask_fcn(\d+)\.", lambda found: f"{int(found[1]) - 1}.0.", name)


def recognises(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are of a detector of torchvision, or of ours."""
    return any(name.startswith("backbone.body.") for name in names) and any(
        name.startswith("roi_heads.box_predictor.cls_score") for name in names
    )


def convert(given: dict[str, Tensor], file_name: str = "", digest: str = "") -> Weights:
    """The detector whose `state_dict` a file holds.

    Args:
        given: tensors by name, present or older.
        file_name: tells apart what has the same tensors: the MobileNetV3 detector for 320 pixels.
        digest: SHA-256 of the file, by which torchvision's own are known.

    Raises:
        ValueError: it is of none of torchvision's builders.
    """
    given = {present_name(name): value for name, value in given.items()}
    mask = "roi_heads.mask_predictor.mask_fcn_logits.weight" in given
    keypoints = given.get("roi_heads.keypoint_predictor.kps_score_lowres.weight")
    kind = "maskrcnn" if mask else "keypointrcnn" if keypoints is not None else "fasterrcnn"
    v2 = "roi_heads.box_head.0.0.weight" in given
    config = ModelConfig()
    if "backbone.body.layer1.0.conv3.weight" in given:
        body = resnet_of(given["backbone.body.layer1.0.conv2.weight"], count_blocks(given, "backbone.body.layer3."))
        config.name = model_name(f"{kind}_{body}_fpn" + ("_v2" if v2 else ""))
        # Its builders have batch norms, which count, or frozen ones, which do not; this choice is for the backbone.
        if not v2 and not any(name.startswith("backbone.") and name.endswith(COUNTER) for name in given):
            config.norm = "frozen"
    elif "backbone.body.layer1.0.conv1.weight" in given:
        config.name = model_name(f"{kind}_resnet18_fpn")
    else:
        of = "large_320_fpn" if "_320_" in file_name else "large_fpn"
        config.name = model_name(f"{kind}_mobilenet_v3_{of}")
        if not any(name.endswith(COUNTER) for name in given):
            config.norm = "frozen"
    if digest.startswith(PUBLISHED):
        config.weights, config.norm = "COCO_V1", None
    classes = len(given["roi_heads.box_predictor.cls_score.weight"])
    boxes = len(given["roi_heads.box_predictor.bbox_pred.weight"])
    config.class_agnostic = boxes == 4 and classes > 1
    first = given.get("backbone.body.conv1.weight", given.get("backbone.body.0.0.weight"))
    if first is not None:
        config.channels = first.shape[1]
    info = info_of(config, classes - 1, 0 if keypoints is None else keypoints.shape[1])
    return Weights("torchvision", info, *translated(info, given, lambda name: name, lambda _, value: value))


def export(weights: Weights) -> dict[str, Tensor]:
    """The `state_dict` for torchvision's builder of this name.

    Raises:
        ValueError: torchvision has none that would give the results.
    """
    config = weights.info.config
    if config.conventions != "torchvision":
        raise ValueError(
            f"a {config.name} with conventions of {config.conventions} is none that torchvision has the results of"
        )
    return dict(weights.state)
