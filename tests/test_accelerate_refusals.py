"""What `accelerate` does not take: each refusal names the part, what it found and what it accepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
import torchvision.models.detection as torchvision_detection
from detectors import targets_for
from tiny import tiny
from torch import Tensor, nn
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import fastmrcnn


class OwnHeads(torchvision_heads.RoIHeads):
    def postprocess_detections(self, *args: Any) -> Any:
        return super().postprocess_detections(*args)


class OwnNames(torchvision_detection.MaskRCNN):
    def detect(self, image: Tensor) -> Any:
        return self([image])


class OwnCall(torchvision_rpn.RegionProposalNetwork):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


class OwnForward(torchvision_detection.MaskRCNN):
    def forward(self, images: Any, targets: Any = None) -> Any:
        return super().forward(images, targets)


class Shifted(AnchorGenerator):
    def grid_anchors(self, *args: Any) -> list[Tensor]:
        return [anchors + 1 for anchors in super().grid_anchors(*args)]


class OwnPooler(MultiScaleRoIAlign):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) * 2


class OwnCoder(torchvision_utils.BoxCoder):
    def decode_single(self, *args: Any) -> Tensor:
        return super().decode_single(*args)


class OwnSampler(torchvision_utils.BalancedPositiveNegativeSampler):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


class Around(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def as_class(place: str, own: type) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(place), "__class__", own)


def with_value(place: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(place), name, value)


def hooked(place: str, register: str) -> Callable[[Any], None]:
    return lambda model: getattr(model.get_submodule(place), register)(lambda *_: None) and None


class OwnLevels(torchvision.ops.poolers.LevelMapper):
    def __call__(self, boxes: list[Tensor]) -> Tensor:
        return super().__call__(boxes) * 0


def stored(scales: list[float], mapper: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        pooler = model.roi_heads.box_roi_pool
        pooler.scales, pooler.map_levels = scales, mapper

    return change


def parametrized(model: Any) -> None:
    model.roi_heads.factor = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(model.roi_heads, "factor", nn.Identity())


def without_keypoint_pooler(model: Any) -> None:
    heads = model.roi_heads
    heads.keypoint_roi_pool, heads.keypoint_head, heads.keypoint_predictor = (nn.Identity() for _ in range(3))


CHANGES: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "forward": (as_class("", OwnForward), TypeError, r"^model is a OwnForward with forward of its own"),
    "forward of the object": (with_value("", "forward", print), TypeError, r"^model is a MaskRCNN with forward"),
    "eager_outputs": (with_value("", "eager_outputs", print), TypeError, r"^model .* with eager_outputs"),
    "a name of ours": (as_class("", OwnNames), TypeError, r"^model is a OwnNames with detect .* collide with ours"),
    "a module by a name of ours": (with_value("", "features", nn.Identity()), TypeError, r"^model .* with features"),
    "no rpn": (with_value("", "rpn", None), TypeError, r"^model.rpn is None: expected .*RegionProposalNetwork"),
    "rpn": (with_value("", "rpn", nn.Identity()), TypeError, r"^model.rpn is a Identity: .*RegionProposalNetwork"),
    "filter_proposals": (with_value("rpn", "filter_proposals", print), TypeError, r"^model.rpn .* filter_proposals"),
    "assign": (
        with_value("rpn", "assign_targets_to_anchors", print),
        TypeError,
        r"^model.rpn .* with assign_targets_t",
    ),
    "call": (as_class("rpn", OwnCall), TypeError, r"^model.rpn is a OwnCall with __call__ of its own"),
    "similarity": (with_value("rpn", "box_similarity", print), TypeError, r"^model.rpn.box_similarity is <built-in"),
    "anchors": (
        as_class("rpn.anchor_generator", Shifted),
        TypeError,
        r"^model.rpn.anchor_generator is a Shifted .*grid",
    ),
    "anchors of the object": (
        with_value("rpn.anchor_generator", "forward", print),
        TypeError,
        r"^model.rpn.anchor_generator is a AnchorGenerator with forward",
    ),
    "other anchors": (
        with_value("rpn", "anchor_generator", nn.Identity()),
        TypeError,
        r"^model.rpn.anchor_generator is a Identity: expected torchvision's AnchorGenerator",
    ),
    "weights": (
        with_value("rpn", "box_coder", torchvision_utils.BoxCoder((2.0, 1.0, 1.0, 1.0))),
        ValueError,
        r"^model.rpn.box_coder.weights are \(2.0, 1.0, 1.0, 1.0\): expected \(1, 1, 1, 1\)",
    ),
    "clip": (
        with_value("roi_heads", "box_coder", torchvision_utils.BoxCoder((1.0, 1.0, 1.0, 1.0), math.log(100))),
        ValueError,
        r"^model.roi_heads.box_coder.bbox_xform_clip is 4.6.*: expected log\(1000 / 16\)",
    ),
    "coder": (
        with_value("roi_heads", "box_coder", OwnCoder((1.0, 1.0, 1.0, 1.0))),
        TypeError,
        r"^model.roi_heads.box_coder is a OwnCoder with decode_single of its own: .*BoxCoder",
    ),
    "linear coder": (
        with_value("rpn", "box_coder", torchvision_utils.BoxLinearCoder()),
        TypeError,
        r"^model.rpn.box_coder is a BoxLinearCoder: expected torchvision's BoxCoder",
    ),
    "matcher": (
        with_value("rpn", "proposal_matcher", torchvision_utils.SSDMatcher(0.5)),
        TypeError,
        r"^model.rpn.proposal_matcher is a SSDMatcher with __call__ of its own",
    ),
    "sampler": (
        with_value("roi_heads", "fg_bg_sampler", OwnSampler(4, 0.5)),
        TypeError,
        r"^model.roi_heads.fg_bg_sampler is a OwnSampler with __call__ of its own",
    ),
    "heads": (
        as_class("roi_heads", OwnHeads),
        TypeError,
        r"^model.roi_heads is a OwnHeads with postprocess_detections",
    ),
    "samples": (with_value("roi_heads", "select_training_samples", print), TypeError, r"^model.roi_heads .* select_tr"),
    "pooler": (
        with_value("roi_heads", "box_roi_pool", torchvision.ops.RoIAlign(7, 1 / 16, 2)),
        TypeError,
        r"^model.roi_heads.box_roi_pool is a RoIAlign: expected torchvision's MultiScaleRoIAlign",
    ),
    "own pooler": (
        with_value("roi_heads", "mask_roi_pool", OwnPooler(["0"], 14, 2)),
        TypeError,
        r"^model.roi_heads.mask_roi_pool is a OwnPooler with forward of its own",
    ),
    "keypoint pooler": (
        without_keypoint_pooler,
        TypeError,
        r"^model.roi_heads.keypoint_roi_pool is a Identity: expected",
    ),
    "scales": (
        stored([1 / 4, 1 / 7, 1 / 16], torchvision.ops.poolers.LevelMapper(2, 4)),
        ValueError,
        r"^model.roi_heads.box_roi_pool has scales \[0.25, 0.14.*LevelMapper.*powers of two",
    ),
    "canonical scale": (
        stored([1 / 16], torchvision.ops.poolers.LevelMapper(4, 4, 112)),
        ValueError,
        r"^model.roi_heads.box_roi_pool has scales .* of the pooler's options",
    ),
    "levels": (
        stored([1 / 16], OwnLevels(4, 4)),
        ValueError,
        r"^model.roi_heads.box_roi_pool has scales .* a OwnLevels",
    ),
    "resize": (with_value("transform", "resize", print), TypeError, r"^model.transform .* with resize"),
    "normalize": (with_value("transform", "normalize", print), TypeError, r"^model.transform .* with normalize"),
    "postprocess": (with_value("transform", "postprocess", print), TypeError, r"^model.transform .* with postprocess"),
    "hook of the rpn": (hooked("rpn", "register_forward_hook"), TypeError, r"^model.rpn has forward hooks.* expected"),
    "hook of the heads": (
        hooked("roi_heads", "register_forward_pre_hook"),
        TypeError,
        r"^model.roi_heads has forward pre hooks.* not be called.* expected none",
    ),
    "hook of the transform": (
        hooked("transform", "register_forward_hook"),
        TypeError,
        r"^model.transform has forward h",
    ),
    "hook of the anchors": (
        hooked("rpn.anchor_generator", "register_forward_hook"),
        TypeError,
        r"^model.rpn.anchor_generator has forward hooks",
    ),
    "hook of a pooler": (
        hooked("roi_heads.mask_roi_pool", "register_full_backward_hook"),
        TypeError,
        r"^model.roi_heads.mask_roi_pool has backward hooks",
    ),
    "parametrized": (parametrized, TypeError, r"^model.roi_heads is a ParametrizedRoIHeads, which PyTorch made of it"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_refused_parts(change: str) -> None:
    make, error, message = CHANGES[change]
    model = tiny()
    make(model)
    with pytest.raises(error, match=message):
        fastmrcnn.accelerate(model)


def test_refused_models() -> None:
    with torch.device("meta"):
        others = [
            getattr(torchvision_detection, builder)(weights=None, weights_backbone=None)
            for builder in ("retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn")
        ]
    for other in (*others, nn.Linear(1, 1), "model.pt"):
        message = f"^model is a {type(other).__name__}: expected torchvision's MaskRCNN, FasterRCNN or KeypointRCNN"
        with pytest.raises(TypeError, match=message):
            fastmrcnn.accelerate(other)
    with pytest.raises(TypeError, match=r"^model is a RecursiveScriptModule, which is compiled: .* before torch.jit"):
        fastmrcnn.accelerate(torch.jit.script(nn.Linear(1, 1)))


def test_refused_wrappers() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrappers = [nn.parallel.DistributedDataParallel(tiny())]
    finally:
        torch.distributed.destroy_process_group()
    wrappers += [nn.DataParallel(tiny()), torch.optim.swa_utils.AveragedModel(tiny())]
    for wrapper in wrappers:
        with pytest.raises(
            TypeError, match=rf"^model is a {type(wrapper).__name__} around a MaskRCNN: pass model.module$"
        ):
            fastmrcnn.accelerate(wrapper)
    with pytest.raises(TypeError, match=r"^model is a Around around a MaskRCNN: pass model.network$"):
        fastmrcnn.accelerate(Around(tiny()))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torchvision_heads, "fastrcnn_loss"),
        (torchvision_heads, "maskrcnn_inference"),
        (torchvision_heads.RoIHeads, "postprocess_detections"),
        (torchvision_detection.FasterRCNN, "forward"),
    ],
)
def test_refused_in_a_changed_torchvision(place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(place, name, targets_for, raising=False)
    with pytest.raises(
        TypeError, match=rf"{name} of torchvision.models.detection is <function targets_for.*: expected"
    ):
        fastmrcnn.accelerate(model)
    monkeypatch.undo()
    fastmrcnn.accelerate(model)
