"""Files of detectron2, MMDetection and maskrcnn-benchmark: names and shapes of their tensors, with random values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

BLOCKS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}


@dataclass
class Kind:
    """What a file is of."""

    neck: str = "fpn"
    depth: str = "50"
    groups: int = 1
    width: int = 64
    mask: bool = True
    mask_iou: bool = False
    keypoints: int = 0
    classes: int = 80
    blocks: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = BLOCKS[self.depth]


def block_shapes(kind: Kind, stage: int, names: Callable[[int, str], tuple[str, str]], norm: tuple[str, ...]) -> Shapes:
    """Of a stage 2 .. 5: `names` has those of a convolution and its norm by block and conv1, conv2, conv3, shortcut."""
    shapes: Shapes = {}
    out = 256 * 2 ** (stage - 2)
    inside = kind.groups * kind.width * 2 ** (stage - 2)
    for i in range(kind.blocks[stage - 2]):
        before = out if i else (64 if stage == 2 else out // 2)
        weights = {
            "conv1": (inside, before, 1, 1),
            "conv2": (inside, inside // kind.groups, 3, 3),
            "conv3": (out, inside, 1, 1),
        }
        if i == 0:
            weights["shortcut"] = (out, before, 1, 1)
        for part, shape in weights.items():
            conv, its_norm = names(i, part)
            shapes[f"{conv}.weight"] = shape
            shapes |= {f"{its_norm}.{name}": shape[:1] for name in norm}
    return shapes


NORM = ("weight", "bias", "running_mean", "running_var")


def detectron2_shapes(kind: Kind) -> Shapes:
    """Names and shapes as detectron2 saves them."""
    bottom = "backbone.bottom_up." if kind.neck == "fpn" else "backbone."
    shapes: Shapes = {f"{bottom}stem.conv1.weight": (64, 3, 7, 7)}
    shapes |= {f"{bottom}stem.conv1.norm.{name}": (64,) for name in NORM}
    for stage in (2, 3, 4, 5):
        where = f"roi_heads.res{stage}" if stage == 5 and kind.neck == "c4" else f"{bottom}res{stage}"

        def names(i: int, part: str, where: str = where) -> tuple[str, str]:
            return f"{where}.{i}.{part}", f"{where}.{i}.{part}.norm"

        shapes |= block_shapes(kind, stage, names, NORM)
    layers: Shapes = {}
    if kind.neck == "fpn":
        for level in (2, 3, 4, 5):
            layers[f"backbone.fpn_lateral{level}"] = (256, 64 * 2**level, 1, 1)
            layers[f"backbone.fpn_output{level}"] = (256, 256, 3, 3)
    channels, anchors = {"fpn": (256, 3), "c4": (1024, 15), "dc5": (2048, 15)}[kind.neck]
    layers["proposal_generator.rpn_head.conv"] = (channels, channels, 3, 3)
    layers["proposal_generator.rpn_head.objectness_logits"] = (anchors, channels, 1, 1)
    layers["proposal_generator.rpn_head.anchor_deltas"] = (4 * anchors, channels, 1, 1)
    hidden = 2048 if kind.neck == "c4" else 1024
    if kind.neck != "c4":
        layers["roi_heads.box_head.fc1"] = (1024, channels * 49)
        layers["roi_heads.box_head.fc2"] = (1024, 1024)
    layers["roi_heads.box_predictor.cls_score"] = (kind.classes + 1, hidden)
    layers["roi_heads.box_predictor.bbox_pred"] = (4 * kind.classes, hidden)
    deconvolutions = {}
    if kind.mask:
        if kind.neck != "c4":
            for i in (1, 2, 3, 4):
                layers[f"roi_heads.mask_head.mask_fcn{i}"] = (256, channels if i == 1 else 256, 3, 3)
        deconvolutions["roi_heads.mask_head.deconv"] = (2048 if kind.neck == "c4" else 256, 256, 2, 2)
        layers["roi_heads.mask_head.predictor"] = (kind.classes, 256, 1, 1)
    if kind.keypoints:
        for i in range(1, 9):
            layers[f"roi_heads.keypoint_head.conv_fcn{i}"] = (512, channels if i == 1 else 512, 3, 3)
        deconvolutions["roi_heads.keypoint_head.score_lowres"] = (512, kind.keypoints, 4, 4)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, shape in deconvolutions.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[1:2]}
    return shapes


def mmdetection_shapes(kind: Kind) -> Shapes:
    """Names and shapes as MMDetection saves them."""
    norm = (*NORM, "num_batches_tracked")
    shapes: Shapes = {"backbone.conv1.weight": (64, 3, 7, 7)} | {f"backbone.bn1.{name}": (64,) for name in norm}
    for stage in (2, 3, 4, 5):

        def names(i: int, part: str, where: str = f"backbone.layer{stage - 1}") -> tuple[str, str]:
            if part == "shortcut":
                return f"{where}.{i}.downsample.0", f"{where}.{i}.downsample.1"
            return f"{where}.{i}.{part}", f"{where}.{i}.bn{part[-1]}"

        shapes |= block_shapes(kind, stage, names, norm)
    layers: Shapes = {}
    for i in range(4):
        layers[f"neck.lateral_convs.{i}.conv"] = (256, 256 * 2**i, 1, 1)
        layers[f"neck.fpn_convs.{i}.conv"] = (256, 256, 3, 3)
    layers["rpn_head.rpn_conv"] = (256, 256, 3, 3)
    layers["rpn_head.rpn_cls"] = (3, 256, 1, 1)
    layers["rpn_head.rpn_reg"] = (12, 256, 1, 1)
    layers["roi_head.bbox_head.shared_fcs.0"] = (1024, 12544)
    layers["roi_head.bbox_head.shared_fcs.1"] = (1024, 1024)
    layers["roi_head.bbox_head.fc_cls"] = (kind.classes + 1, 1024)
    layers["roi_head.bbox_head.fc_reg"] = (4 * kind.classes, 1024)
    if kind.mask:
        for i in range(4):
            layers[f"roi_head.mask_head.convs.{i}.conv"] = (256, 256, 3, 3)
        layers["roi_head.mask_head.conv_logits"] = (kind.classes, 256, 1, 1)
        if kind.mask_iou:
            for i in range(4):
                layers[f"roi_head.mask_iou_head.convs.{i}"] = (256, 256 if i else 257, 3, 3)
            layers["roi_head.mask_iou_head.fcs.0"] = (1024, 12544)
            layers["roi_head.mask_iou_head.fcs.1"] = (1024, 1024)
            layers["roi_head.mask_iou_head.fc_mask_iou"] = (kind.classes, 1024)
        shapes["roi_head.mask_head.upsample.weight"] = (256, 256, 2, 2)
        shapes["roi_head.mask_head.upsample.bias"] = (256,)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: () if name.endswith("tracked") else shape for name, shape in shapes.items()}


def random_state(shapes: Shapes, *, of_bytes: bool, seed: int = 0) -> State:
    """Values that a trained network could have: it finds things, of many classes, here and there.

    Its first norm makes up for images in 0 .. 255, if they are `of_bytes`.
    """
    generator = torch.Generator().manual_seed(seed)
    first = 0.01 if of_bytes else 1.0
    gains = {
        "stem.conv1.norm.weight": first,
        "backbone.bn1.weight": first,
        "stem.bn1.weight": first,
        "conv3.norm.weight": 0.3,
        "bn3.weight": 0.3,
        "objectness_logits": 0.2,
        "rpn_cls": 0.2,
        "cls_logits": 0.2,
        "rpn.head.bbox_pred": 0.02,
        "anchor_deltas": 0.02,
        "rpn_reg": 0.02,
        "cls_score": 0.25,
        "fc_cls": 0.25,
        "bbox_pred": 0.05,
        "fc_reg": 0.05,
    }
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1:
            state[name] = values * gain * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var"):
            state[name] = values.abs() * 0.2 + 0.9
        elif name.endswith(("norm.weight", "bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")):
            state[name] = gain * (1 + 0.1 * values)
        else:
            state[name] = 0.05 * values
    return state


def benchmark_shapes(classes: int) -> Shapes:
    """Names and shapes as Mask Scoring R-CNN saves them, on a ResNet-50; `classes` without the background."""
    kind = Kind(classes=classes)
    shapes: Shapes = {"backbone.body.stem.conv1.weight": (64, 3, 7, 7)}
    shapes |= {f"backbone.body.stem.bn1.{name}": (64,) for name in NORM}
    for stage in (2, 3, 4, 5):

        def names(i: int, part: str, where: str = f"backbone.body.layer{stage - 1}") -> tuple[str, str]:
            if part == "shortcut":
                return f"{where}.{i}.downsample.0", f"{where}.{i}.downsample.1"
            return f"{where}.{i}.{part}", f"{where}.{i}.bn{part[-1]}"

        shapes |= block_shapes(kind, stage, names, NORM)
    layers: Shapes = {}
    for i in range(1, 5):
        layers[f"backbone.fpn.fpn_inner{i}"] = (256, 128 * 2**i, 1, 1)
        layers[f"backbone.fpn.fpn_layer{i}"] = (256, 256, 3, 3)
        layers[f"roi_heads.mask.feature_extractor.mask_fcn{i}"] = (256, 256, 3, 3)
        layers[f"roi_heads.maskiou.feature_extractor.maskiou_fcn{i}"] = (256, 257 if i == 1 else 256, 3, 3)
    layers["rpn.head.conv"] = (256, 256, 3, 3)
    layers["rpn.head.cls_logits"] = (3, 256, 1, 1)
    layers["rpn.head.bbox_pred"] = (12, 256, 1, 1)
    layers["roi_heads.box.feature_extractor.fc6"] = (1024, 12544)
    layers["roi_heads.box.feature_extractor.fc7"] = (1024, 1024)
    layers["roi_heads.box.predictor.cls_score"] = (classes + 1, 1024)
    layers["roi_heads.box.predictor.bbox_pred"] = (4 * classes + 4, 1024)
    layers["roi_heads.mask.predictor.mask_fcn_logits"] = (classes + 1, 256, 1, 1)
    layers["roi_heads.maskiou.feature_extractor.maskiou_fc1"] = (1024, 12544)
    layers["roi_heads.maskiou.feature_extractor.maskiou_fc2"] = (1024, 1024)
    layers["roi_heads.maskiou.predictor.maskiou"] = (classes + 1, 1024)
    shapes |= {"roi_heads.mask.predictor.conv5_mask.weight": (256, 256, 2, 2)}
    shapes |= {"roi_heads.mask.predictor.conv5_mask.bias": (256,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
