"""A torchvision detector continued as ours: the same network, the same results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision.models.detection as torchvision_detection
from detectors import BUILDERS, step, targets_for
from tiny import IMAGES, tiny
from torch import Tensor, nn
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import fastmrcnn
from benchmarks.detectors import agreement, calibrate

SMALL = {"weights": None, "weights_backbone": None, "min_size": 128, "max_size": 192, "rpn_post_nms_top_n_test": 60}
SMALL |= {"box_detections_per_img": 10}
FEW = {"rpn_post_nms_top_n_train": 40, "rpn_pre_nms_top_n_train": 30, "box_batch_size_per_image": 16}
EXHAUSTIVE = {"rpn_batch_size_per_image": 100_000, "box_batch_size_per_image": 4_000, "rpn_post_nms_top_n_train": 40}


def build(builder: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(torchvision_detection, builder)(**SMALL | options).eval()


def assert_same_detections(theirs: nn.Module, ours: nn.Module, images: list[Tensor]) -> None:
    """In float64, where rounding flips no decision.  The conversion of one is that of the other, which shares it."""
    exact = [image.double() for image in images]
    theirs.double()
    with torch.inference_mode():
        expected, found = theirs(exact), ours(exact)
    assert [list(result) for result in found] == [list(result) for result in expected]
    assert sum(len(result["boxes"]) for result in expected) > 5
    assert agreement(expected, found) == 1


@pytest.mark.parametrize("builder", BUILDERS)
def test_published_architectures(builder: str) -> None:
    theirs = build(builder)
    calibrate(theirs, IMAGES[:1])
    before = {name: type(module) for name, module in theirs.named_modules()}
    ours = fastmrcnn.accelerate(theirs)
    assert type(ours) is type(getattr(fastmrcnn, builder)(**SMALL))
    assert [type(part).__module__.split(".")[0] for part in (ours.rpn, ours.roi_heads, ours.transform)] == [
        "fastmrcnn"
    ] * 3
    assert {name: type(module) for name, module in theirs.named_modules()} == before
    assert list(ours.state_dict()) == list(theirs.state_dict())
    shared = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    assert all(shared[name] is value for name, value in [*ours.named_parameters(), *ours.named_buffers()])
    assert_same_detections(theirs, ours, IMAGES[:1])


@pytest.mark.parametrize("builder", BUILDERS)
def test_training(builder: str) -> None:
    targets = targets_for(IMAGES, [3, 0], keypoints=17 if "keypoint" in builder else 0)
    theirs = build(builder, min_size=96, max_size=128, **FEW).train()
    ours = fastmrcnn.accelerate(theirs)
    assert all(part.training for part in (ours, ours.rpn, ours.roi_heads, ours.transform))
    expected = step(theirs, IMAGES, targets)
    with_gradient = {name for name, p in theirs.named_parameters() if p.grad is not None}
    theirs.zero_grad()
    found = step(ours, IMAGES, targets)
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    assert all(loss.isfinite() for loss in found.values())
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == with_gradient
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_losses_equal() -> None:
    """With all candidates sampled there is no chance in them."""
    images = [image.double() for image in IMAGES]
    targets = targets_for(images, [3, 2])
    theirs = tiny(**EXHAUSTIVE).double()
    ours = fastmrcnn.accelerate(theirs)
    expected = step(theirs, images, targets)
    gradients = {name: p.grad.clone() for name, p in theirs.named_parameters()}
    found = step(ours, images, targets)
    assert len(expected) == 5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0, check_dtype=False, msg=name)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_an_optimizer_of_the_original_goes_on() -> None:
    theirs = tiny(score_thresh=0.0)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9)
    ours = fastmrcnn.accelerate(theirs)
    before = copy.deepcopy(theirs.state_dict())
    step(ours, IMAGES, targets_for(IMAGES, [2, 2]))
    optimizer.step()
    changed = [name for name, value in theirs.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in changed} == {"backbone", "rpn", "roi_heads"}
    assert_same_detections(theirs.eval(), ours.eval(), IMAGES)


def test_fine_tuned() -> None:
    theirs = build("maskrcnn_resnet50_fpn")
    theirs.roi_heads.box_predictor = FastRCNNPredictor(theirs.roi_heads.box_predictor.cls_score.in_features, 3)
    theirs.roi_heads.mask_predictor = MaskRCNNPredictor(256, 64, 3)
    ours = fastmrcnn.accelerate(theirs)
    assert ours.roi_heads.box_predictor is theirs.roi_heads.box_predictor
    assert_same_detections(theirs, ours, IMAGES[:1])
    with torch.inference_mode():
        assert ours([IMAGES[0].double()])[0]["labels"].max() <= 2


@pytest.mark.parametrize("maps", [(), ("0",), ("only",), ("fine", "coarse")])
def test_backbones(maps: tuple[str, ...]) -> None:
    """A tensor, and maps of any names."""
    theirs = tiny(maps=maps)
    assert_same_detections(theirs, fastmrcnn.accelerate(theirs), IMAGES)


def test_predictors_of_any_class() -> None:
    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(16, 15)

        def forward(self, x: Tensor) -> Any:
            return self.both(x).split((3, 12), dim=1)

    theirs = tiny()
    theirs.roi_heads.box_predictor = Predictor()
    theirs.roi_heads.mask_head = nn.Identity()
    assert_same_detections(theirs, fastmrcnn.accelerate(theirs), IMAGES)


def test_assembled_from_torchvisions_parts() -> None:
    parts = tiny()
    theirs = GeneralizedRCNN(parts.backbone, parts.rpn, parts.roi_heads, parts.transform).eval()
    ours = fastmrcnn.accelerate(theirs)
    assert type(ours).__name__ == "GeneralizedRCNN"
    assert isinstance(ours, fastmrcnn.models.mask_rcnn.GeneralizedRCNN)
    assert not isinstance(ours, fastmrcnn.FasterRCNN)
    assert_same_detections(theirs, ours, IMAGES)


def test_ours_stays_itself() -> None:
    ours = tiny(fastmrcnn.MaskRCNN)
    ours.rpn.register_forward_hook(lambda *_: None)  # what is refused elsewhere
    assert fastmrcnn.accelerate(ours) is ours


class FrozenNorms(torchvision_detection.MaskRCNN):
    """A subclass that changes nothing of the flow."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.backbone.eval()
        return self

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())


class FewerProposals(torchvision_rpn.RegionProposalNetwork):
    def post_nms_top_n(self) -> int:
        return 3


class WideCanvas(GeneralizedRCNNTransform):
    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        batch = super().batch_images(images, size_divisible)
        return nn.functional.pad(batch, (0, 64, 0, 32))


def test_subclasses_that_keep_the_flow() -> None:
    """What ours calls as torchvision does counts: here methods of the model, of the RPN and of the transform."""
    theirs = tiny(FrozenNorms)
    for name, own in (("rpn", FewerProposals), ("transform", WideCanvas)):
        getattr(theirs, name).__class__ = own
    ours = fastmrcnn.accelerate(theirs)
    assert isinstance(ours, FrozenNorms)
    assert isinstance(ours, fastmrcnn.MaskRCNN)
    assert ours.count() == theirs.count()
    assert not ours.train().backbone.training
    assert ours.roi_heads.training
    assert_same_detections(theirs.eval(), ours.eval(), IMAGES)
    exact = [image.double() for image in IMAGES]
    batch, _, _ = ours.transform.batch(exact, None)
    assert batch.tensors.shape[-2:] == (128, 192)
    logits, deltas = ours.rpn.head(list(ours.features(batch).values()))
    assert ours.rpn.propose(batch, logits, deltas).count.tolist() == [3, 3]


@pytest.mark.parametrize("detector", [torchvision_detection.MaskRCNN, FrozenNorms])
def test_copies(detector: type) -> None:
    ours = fastmrcnn.accelerate(tiny(detector))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert type(twin.rpn) is type(ours.rpn)
        assert twin.backbone.layers[0].weight is not ours.backbone.layers[0].weight
        assert_same_detections(twin, ours.double(), IMAGES)


def test_options_are_taken_over_and_then_apart() -> None:
    theirs = tiny(box_detections_per_img=7)
    theirs.custom = "kept"
    ours = fastmrcnn.accelerate(theirs)
    assert (ours.roi_heads.detections_per_img, ours.custom) == (7, "kept")
    ours.train()
    ours.roi_heads.score_thresh = 0.5
    ours.rpn._post_nms_top_n["testing"] = 3
    ours.roi_heads.fg_bg_sampler.batch_size_per_image = 4
    ours.roi_heads.box_predictor = FastRCNNPredictor(16, 9)
    heads = theirs.roi_heads
    assert not any(part.training for part in (theirs, theirs.rpn, heads, theirs.transform))
    assert (heads.score_thresh, theirs.rpn._post_nms_top_n["testing"]) == (0.05, 40)
    assert heads.fg_bg_sampler.batch_size_per_image == 512
    assert heads.box_predictor.cls_score.out_features == 3


def test_hooks_that_are_called() -> None:
    theirs = tiny()
    called = []
    places = ("", "backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head")
    for place in places:
        theirs.get_submodule(place).register_forward_hook(lambda *_, place=place: called.append(place))
    ours = fastmrcnn.accelerate(theirs)
    ours(IMAGES)
    assert sorted(called) == sorted(places)
    ours.register_forward_hook(lambda *_: called.append("ours"))
    theirs(IMAGES)
    assert "ours" not in called


def test_compiled_in_place() -> None:
    """What `Module.compile` leaves in a module would call that module."""
    theirs = tiny()
    theirs._compiled_call_impl = lambda *_: pytest.fail("the original was called")
    assert len(fastmrcnn.accelerate(theirs)(IMAGES)) == 2


def test_poolers_that_have_been_used() -> None:
    theirs = tiny()
    theirs(IMAGES)
    assert theirs.roi_heads.box_roi_pool.scales == [1 / 8]
    assert_same_detections(theirs, fastmrcnn.accelerate(theirs), IMAGES)
    theirs.roi_heads.box_roi_pool = fastmrcnn.ops.MultiScaleRoIAlign(["0"], 7, 2)
    assert_same_detections(theirs, fastmrcnn.accelerate(theirs), IMAGES)
