"""What torchvision's users do with its detectors works with ours."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
import torchvision.models.detection as torchvision_detection
from conftest import SHARED
from detectors import BUILDERS, targets_for
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

import fastmrcnn
from benchmarks.detectors import agreement, calibrate

CLASSES = ["FasterRCNN", "MaskRCNN", "KeypointRCNN"]
UNTRAINED: dict[str, Any] = {"weights": None, "weights_backbone": None}
SMALL: dict[str, Any] = UNTRAINED | {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_test": 30}


@pytest.fixture
def model() -> fastmrcnn.MaskRCNN:
    torch.manual_seed(0)
    return fastmrcnn.maskrcnn_resnet50_fpn(num_classes=3, **SMALL)


@pytest.mark.parametrize("name", BUILDERS + CLASSES)
def test_signature(name: str) -> None:
    assert inspect.signature(getattr(fastmrcnn, name)) == inspect.signature(getattr(torchvision_detection, name))


@pytest.mark.parametrize("name", CLASSES)
def test_is_a_torchvision_detector(name: str) -> None:
    assert issubclass(getattr(fastmrcnn, name), getattr(torchvision_detection, name))


@pytest.mark.parametrize("builder", BUILDERS)
def test_state_dict_goes_both_ways(builder: str) -> None:
    theirs = getattr(torchvision_detection, builder)(**UNTRAINED)
    ours = getattr(fastmrcnn, builder)(**UNTRAINED)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("builder", BUILDERS)
def test_state_dict_of_the_published_layout(builder: str) -> None:
    layout = SHARED / "checkpoint_layouts" / f"tv_{builder}.txt"
    if not layout.exists():
        pytest.skip(f"needs the published layout {layout.name}")
    names = {line.split()[0] for line in layout.read_text().splitlines() if line.startswith(("backbone", "rpn", "roi"))}
    counters = "num_batches_tracked"  # of trained norms; frozen ones, in published weights, have none
    ours = getattr(fastmrcnn, builder)(**UNTRAINED).state_dict()
    assert {n for n in names if counters not in n} == {n for n in ours if counters not in n}


def test_published_fine_tuning_recipe() -> None:
    """torchvision's tutorial, but for the import of the builder."""
    torch.manual_seed(0)
    model = fastmrcnn.maskrcnn_resnet50_fpn(**SMALL, box_batch_size_per_image=16, rpn_post_nms_top_n_train=30)
    in_features = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(in_features, 2)
    in_features_mask = model.roi_heads.mask_predictor.conv5_mask.in_channels
    model.roi_heads.mask_predictor = MaskRCNNPredictor(in_features_mask, 256, 2)

    images = [torch.rand(3, 96, 110)]
    targets = targets_for(images, [2])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0005, momentum=0.9)
    model.train()
    history = []
    for _ in range(8):
        losses = sum(model(images, targets).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        history.append(losses.item())
    assert history[-1] < 0.9 * history[0]
    model.eval()
    assert model(images)[0]["masks"].shape[1:] == (1, 96, 110)


def test_custom_backbone_anchors_and_pooler() -> None:
    def build(detector: type) -> Any:
        torch.manual_seed(0)
        backbone = torchvision.models.mobilenet_v2(weights=None).features
        backbone.out_channels = 1280
        return detector(
            backbone,
            num_classes=5,
            min_size=160,
            max_size=200,
            rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
            box_roi_pool=torchvision.ops.MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2),
        ).eval()

    theirs, ours = build(torchvision_detection.FasterRCNN), build(fastmrcnn.FasterRCNN)
    images = [torch.rand(3, 120, 160), torch.rand(3, 160, 100)]
    for model in (theirs, ours):
        heads = model.roi_heads.box_predictor
        torch.nn.init.normal_(heads.cls_score.weight, std=3.0, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = theirs(images), ours(images)
    assert sum(len(result["boxes"]) for result in expected) > 10
    assert agreement(expected, found) >= 0.98


def test_settings_changed_later_count(model: fastmrcnn.MaskRCNN, photos: list[Tensor]) -> None:
    model.eval()
    model.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        calibrate(model, photos[:1])
        model.roi_heads.detections_per_img = 5
        assert len(model(photos[:1])[0]["boxes"]) == 5
        model.roi_heads.score_thresh = 1.0
        assert len(model(photos[:1])[0]["boxes"]) == 0
        model.rpn._post_nms_top_n["testing"] = 3
        batch, _, _ = model.transform.batch(photos[:1], None)
        features = model.features(batch)
        logits, deltas = model.rpn.head(list(features.values()))
        assert model.rpn.propose(batch, logits, deltas).count.tolist() == [3]
        model.transform.min_size = (64,)
        assert min(model.transform.batch(photos[:1], None)[0].sizes[0].tolist()) in (63, 64)  # it rounds down


def test_parts_called_the_torchvision_way(model: fastmrcnn.MaskRCNN, photos: list[Tensor]) -> None:
    model.eval()
    with torch.inference_mode():
        images, _ = model.transform(photos[:1])
        features = model.backbone(images.tensors)
        proposals, losses = model.rpn(images, features)
        detections, _ = model.roi_heads(features, proposals, images.image_sizes)
    assert proposals[0].shape[1] == 4
    assert losses == {}
    assert {"boxes", "labels", "scores", "masks"} == set(detections[0])


def test_copies(model: fastmrcnn.MaskRCNN) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is fastmrcnn.MaskRCNN
        assert torch.equal(twin.backbone.body.conv1.weight, model.backbone.body.conv1.weight)
        assert twin.backbone.body.conv1.weight is not model.backbone.body.conv1.weight


def test_inputs_are_not_changed(model: fastmrcnn.MaskRCNN) -> None:
    images = [torch.rand(3, 60, 80)]
    targets = targets_for(images, [2])
    before = copy.deepcopy((images, targets))
    model.train()(images, targets)
    assert torch.equal(images[0], before[0][0])
    assert targets[0].keys() == before[1][0].keys()
    assert all(torch.equal(targets[0][key], before[1][0][key]) for key in targets[0])


IMAGE = torch.rand(3, 60, 80)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images: the list is empty"),
        ([torch.zeros(3, 9, 9, dtype=torch.uint8)], TypeError, r"images\[0\].*uint8"),
        ([IMAGE, torch.rand(9, 9)], ValueError, r"images\[1\].*\[9, 9\]"),
        ([torch.rand(3, 0, 9)], ValueError, r"images\[0\]"),
        (["photo.jpg"], TypeError, r"images\[0\].*str"),
    ],
)
def test_bad_images(model: fastmrcnn.MaskRCNN, images: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.eval()(images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": None}, ValueError, r"targets\[0\].*boxes key"),
        ({"labels": None}, ValueError, r"targets\[0\].*labels key"),
        ({"masks": None}, ValueError, r"targets\[0\].*masks key"),
        ({"boxes": [[1, 2, 3, 4]]}, TypeError, r"'boxes'.*list"),
        ({"boxes": torch.rand(2, 5)}, ValueError, r"'boxes'.*\[G, 4\].*\[2, 5\]"),
        ({"boxes": torch.tensor([[1, 2, 3, 4]] * 2)}, TypeError, r"'boxes'.*int64"),
        ({"boxes": torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 9]])}, ValueError, "positive height and width.*index 0"),
        ({"boxes": torch.tensor([[1.0, 2, 3, 4], [5, torch.nan, 7, 9]])}, ValueError, "positive height and width"),
        ({"labels": torch.ones(2, dtype=torch.int32)}, TypeError, r"'labels'.*int32"),
        ({"labels": torch.ones(3, dtype=torch.int64)}, ValueError, r"'labels'.*\[2\].*\[3\]"),
        ({"masks": torch.zeros(2, 60, 81, dtype=torch.uint8)}, ValueError, r"'masks'.*\[2, 60, 80\].*\[2, 60, 81\]"),
    ],
)
def test_bad_targets(model: fastmrcnn.MaskRCNN, change: dict[str, Any], error: type[Exception], message: str) -> None:
    target = targets_for([IMAGE], [2])[0] | change
    with pytest.raises(error, match=message):
        model.train()([IMAGE], [{key: value for key, value in target.items() if value is not None}])


def test_training_needs_targets(model: fastmrcnn.MaskRCNN) -> None:
    with pytest.raises(ValueError, match=r"targets: needed in training mode"):
        model.train()([IMAGE])
    with pytest.raises(ValueError, match=r"targets: 1 given for 2 images"):
        model([IMAGE, IMAGE], targets_for([IMAGE], [1]))


def test_constructor_checks_are_torchvisions() -> None:
    backbone = torchvision.models.mobilenet_v2(weights=None).features
    with pytest.raises(ValueError, match="out_channels"):
        fastmrcnn.FasterRCNN(backbone, num_classes=2)
    backbone.out_channels = 1280
    with pytest.raises(ValueError, match="num_classes should be None"):
        fastmrcnn.FasterRCNN(backbone, num_classes=2, box_predictor=FastRCNNPredictor(1024, 2))
    with pytest.raises(TypeError, match="rpn_anchor_generator"):
        fastmrcnn.FasterRCNN(backbone, num_classes=2, rpn_anchor_generator="boxes")


def test_anchors_that_are_no_function_of_their_index_are_refused(model: fastmrcnn.MaskRCNN) -> None:
    class Shifted(AnchorGenerator):
        def grid_anchors(self, *args: Any) -> list[Tensor]:
            return [anchors + 1 for anchors in super().grid_anchors(*args)]

    model.rpn.anchor_generator = Shifted(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    with pytest.raises(TypeError, match="Shifted overrides"):
        model.eval()([IMAGE])


def test_weights_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match=r"no route to host.*weights_backbone=None"):
        fastmrcnn.maskrcnn_resnet50_fpn(weights="DEFAULT")
    with pytest.raises(RuntimeError, match="maskrcnn_resnet50_fpn"):
        fastmrcnn.maskrcnn_resnet50_fpn()  # torchvision's default is a pretrained backbone


@pytest.mark.parametrize("weights", ["COCO_V1", torchvision_detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1])
def test_weights_by_name_and_enum(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision_detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91
    ).state_dict()
    published = {name: value for name, value in published.items() if not name.endswith("num_batches_tracked")}
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *a, **k: published)
    model = fastmrcnn.maskrcnn_resnet50_fpn(weights=weights)
    assert torch.equal(model.rpn.head.cls_logits.weight, published["rpn.head.cls_logits.weight"])
    norms = [m for m in model.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    assert norms
    assert all(norm.eps == 0.0 for norm in norms)
    with pytest.raises(ValueError, match="num_classes"):
        fastmrcnn.maskrcnn_resnet50_fpn(weights=weights, num_classes=2)
