"""`detect` and `losses` never ask the device a question, and padding is inert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torchvision.models.detection as torchvision_detection
from detectors import KINDS, pair, targets_for
from engines import elsewhere
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastmrcnn
import fastmrcnn.models.sampling
from fastmrcnn import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch
from fastmrcnn.batches import PackedMasks

FEW: dict[str, Any] = {
    "weights": None,
    "weights_backbone": None,
    "rpn_pre_nms_top_n_test": 12,
    "rpn_pre_nms_top_n_train": 12,
    "rpn_post_nms_top_n_test": 20,
    "rpn_post_nms_top_n_train": 20,
}


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


def fake_batch() -> tuple[ImageBatch, TargetBatch]:
    images = ImageBatch(torch.rand(2, 3, 128, 160), torch.full((2, 2), 120))
    targets = TargetBatch(
        torch.rand(2, 5, 4),
        torch.ones(2, 5, dtype=torch.int64),
        torch.ones(2, dtype=torch.int64),
        PackedMasks(
            torch.zeros(2 * 5 * 120 * 5, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int64),
            torch.full((2, 8), 120),
        ),
        torch.rand(2, 5, 17, 3),
    )
    return images, targets


@pytest.mark.parametrize("builder", KINDS)
def test_no_synchronisation(builder: str, fake_cuda: None) -> None:
    """On fake tensors a value that is read, or a shape that depends on one, is an error."""
    model = getattr(fastmrcnn, builder)(**FEW)
    images, targets = fake_batch()
    with torch.no_grad():
        found = model.eval().detect(images)
    candidates = FEW["rpn_post_nms_top_n_test"] * (model.roi_heads.box_predictor.cls_score.out_features - 1)
    slots = min(model.roi_heads.detections_per_img, candidates)
    assert found.boxes.shape == (2, slots, 4)
    assert found.boxes.device.type == found.count.device.type == "cuda"
    if "mask" in builder:
        assert found.masks is not None
        assert found.masks.shape == (2, slots, 28, 28)
    if "keypoint" in builder:
        assert found.keypoints is not None
        assert found.keypoints.shape == (2, slots, 17, 4)
    for name, loss in model.train().losses(images, targets).items():
        assert loss.shape == (), name
        assert loss.requires_grad, name


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do, views and questions about fake tensors left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "prim":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("images", [1, 8])
def test_few_operations_from_head_outputs_to_boxes(images: int, fake_cuda: None) -> None:
    """As many for eight images as for one.  torchvision takes 60 to filter proposals alone, and more per image."""
    model = fastmrcnn.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    batch = ImageBatch(torch.rand(images, 3, 128, 160), torch.full((images, 2), 120))
    shapes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    logits, deltas = ([torch.rand(images, values, *shape) for shape in shapes] for values in (3, 12))
    classes, regression = torch.rand(images, 1000, 91), torch.rand(images, 1000, 91, 4)
    model.rpn.base_anchors(torch.device("cuda"))  # once
    with torch.no_grad(), Operations() as operations:
        proposals = model.rpn.propose(batch, logits, deltas)
        model.roi_heads.select(classes, regression, proposals, batch)
    assert operations.names == [
        "fastmrcnn::topk_anchors",
        "aten::sigmoid",
        "fastmrcnn::decode_proposals",
        "fastmrcnn::sorted_nms",
        "fastmrcnn::merge_levels",
        "fastmrcnn::select_detections",
    ]


def test_torchvision_does_synchronise(fake_cuda: None) -> None:
    """So the test above can fail."""
    model = torchvision_detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    with torch.no_grad(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        model([torch.rand(3, 120, 150)])


def same_results(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x["labels"], y["labels"])
        for key in x:
            torch.testing.assert_close(y[key], x[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_trimmed_and_padded_detections_agree(
    builder: str, photos: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {key: value for key, value in FEW.items() if "weights" not in key}
    _, model = pair(builder, photos[:2], **few, box_detections_per_img=20, min_size=96, max_size=128)
    with torch.inference_mode():
        trimmed = model(photos[:2])
        elsewhere(monkeypatch)
        padded = model(photos[:2])
    assert min(len(result["boxes"]) for result in trimmed) > 0
    same_results(trimmed, padded, 1e-3)


EXHAUSTIVE = FEW | {"rpn_batch_size_per_image": 100_000, "box_batch_size_per_image": 1_000}


@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"])
def test_trimmed_and_padded_losses_agree(builder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = [torch.rand(3, 90, 128), torch.rand(3, 96, 80)]
    targets = targets_for(images, [3, 1], keypoints=17 if "keypoint" in builder else 0)
    _, model = pair(builder, images, **EXHAUSTIVE | {"min_size": 96, "max_size": 128})
    model.train().double()
    images = [image.double() for image in images]
    for target in targets:
        target["boxes"] = target["boxes"].double()
    trimmed = model(images, targets)
    elsewhere(monkeypatch)
    padded = model(images, targets)
    for name, value in trimmed.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-12, msg=name)


def with_garbage(batch: Any, slots: int, value: float) -> Any:
    """`batch` with `slots` more slots per image, all unused ones filled with `value` (integers: 1)."""
    used = batch.valid
    filled = {}
    for field in fields(batch):
        old = getattr(batch, field.name)
        if field.name == "count" or not isinstance(old, Tensor):
            continue  # packed masks have no slots
        garbage = value if old.is_floating_point() else 1
        new = old.new_full((old.shape[0], old.shape[1] + slots, *old.shape[2:]), garbage)
        new[:, : old.shape[1]] = torch.where(used.view(*used.shape, *(1,) * (old.dim() - 2)), old, garbage)
        filled[field.name] = new
    return replace(batch, **filled)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6])
@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_padding_is_inert_in_training(builder: str, value: float) -> None:
    torch.manual_seed(0)
    images = [torch.rand(3, 90, 128), torch.rand(3, 96, 80)]
    targets = targets_for(images, [3, 1], keypoints=17 if "keypoint" in builder else 0)
    _, model = pair(builder, images, **EXHAUSTIVE | {"min_size": 96, "max_size": 128})
    model.train()
    batch, clean, _ = model.transform.batch(images, targets)
    expected = model.losses(batch, clean)
    model.zero_grad()
    found = model.losses(batch, with_garbage(clean, 3, value))
    torch.stack(list(found.values())).sum().backward()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-7, msg=name)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6])
def test_padding_is_inert_in_inference(value: float, photos: list[Tensor]) -> None:
    few = {key: v for key, v in FEW.items() if "weights" not in key}
    _, model = pair("maskrcnn_resnet50_fpn", photos[:1], **few, min_size=96, max_size=128)
    with torch.inference_mode():
        batch, _, _ = model.transform.batch(photos[:2], None)
        features = model.features(batch)
        logits, deltas = model.rpn.head(list(features.values()))
        proposals = model.rpn.propose(batch, logits, deltas)
        expected = model.roi_heads.detect(features, proposals, batch)
        found = model.roi_heads.detect(features, with_garbage(proposals, 5, value), batch)
    assert torch.equal(found.count, expected.count)
    assert expected.count.min() > 0
    for name in ("boxes", "scores", "labels", "masks"):
        for i, count in enumerate(expected.count.tolist()):
            torch.testing.assert_close(
                getattr(found, name)[i, :count], getattr(expected, name)[i, :count], rtol=1e-4, atol=1e-4, msg=name
            )


def test_batches_know_their_slots() -> None:
    count = torch.tensor([2, 0])
    proposals = ProposalBatch(torch.zeros(2, 3, 4), torch.zeros(2, 3), count)
    assert proposals.valid.tolist() == [[True, True, False], [False, False, False]]
    detections = DetectionBatch(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), count)
    trimmed = fastmrcnn.batches.trim(detections)
    assert trimmed.boxes.shape == (2, 2, 4)
    assert trimmed.masks is None
