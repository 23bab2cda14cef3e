"""Networks with the conventions of other libraries: sizes that depend on no data, nothing that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn.models.config import ModelConfig, build_model

KINDS = [
    ("maskrcnn_resnet50_fpn", "detectron2", {"mask_iou": True}),
    ("maskrcnn_resnet50_c4", "detectron2", {}),
    ("maskrcnn_resnet50_dc5", "detectron2", {}),
    ("keypointrcnn_resnet101_fpn", "detectron2", {}),
    ("maskrcnn_resnext101_64x4d_fpn", "mmdetection", {}),
    ("maskrcnn_resnet50_fpn", "matterport", {"min_size": 64, "max_size": 128}),
    ("maskrcnn_resnet50_fpn", "maskrcnn_benchmark", {}),
    ("fasterrcnn_resnet101_fpn", "torchvision", {}),
]


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


@pytest.mark.parametrize(("name", "conventions", "options"), KINDS)
def test_no_synchronisation(name: Any, conventions: Any, options: dict[str, Any], fake_cuda: None) -> None:
    """From images to detections in their pixels: a value that is read, or a shape that depends on one, is an error."""
    sizes = {"min_size": 64, "max_size": 128} | options
    model = build_model(ModelConfig(name, conventions=conventions, proposals=20, **sizes), 5).eval()
    with torch.no_grad():
        batch, _, resized = model.transform.batch([torch.rand(3, 60, 90), torch.rand(3, 50, 40)], None)
        found = model.transform.in_original_pixels(model.detect(batch), resized, [(60, 90), (50, 40)])
    slots = found.boxes.shape[1]
    assert found.boxes.device.type == found.count.device.type == "cuda"
    assert 20 <= slots <= 80
    assert (found.masks is not None) == name.startswith("mask")
    assert (found.keypoints is not None) == name.startswith("keypoint")
    assert (found.mask_scores is not None) == ("mask_iou" in options)
    if found.mask_scores is not None:
        assert found.mask_scores.shape == (2, slots)


def test_training_steps() -> None:
    """Losses and gradients of all parts, with anchors where the library has them."""
    torch.manual_seed(0)
    names: tuple[Any, ...] = ("detectron2", "maskrcnn_benchmark")
    for conventions in names:
        sizes = {"min_size": 64, "max_size": 96, "proposals": 20}
        config = ModelConfig("fasterrcnn_resnet50_fpn", conventions=conventions, **sizes)
        model = build_model(config, 3).train()
        target = {"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
        losses: Any = model([torch.rand(3, 64, 80)], [target])
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert losses["loss_objectness"] > 0
        assert model.rpn.head.bbox_pred.weight.grad is not None
        anchors = model.rpn.all_anchors(*_seen(model))
        assert anchors.shape[:2] == (1, 3 * sum(_cells(level) for level in range(5)))


def test_training_step_of_a_shared_stage() -> None:
    """Boxes and masks of a C4 learn in the same stage 5, whose weights are saved twice and are one."""
    torch.manual_seed(0)
    few: dict[str, Any] = {"min_size": 64, "max_size": 96, "proposals": 20, "box_samples": 8}
    config = ModelConfig("maskrcnn_resnet50_c4", conventions="detectron2", **few)
    model = build_model(config, 3).train()
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[0, 6:50, 5:40] = 1
    target = {"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1]), "masks": masks}
    losses: Any = model([torch.rand(3, 64, 80)], [target])
    weight = model.roi_heads.box_head.layer4[0].conv1.weight
    assert weight is model.roi_heads.mask_head[0].conv1.weight
    of_boxes, of_masks = (
        torch.autograd.grad(losses[name], weight, retain_graph=True)[0] for name in ("loss_classifier", "loss_mask")
    )
    assert of_boxes.abs().max() > 0
    assert of_masks.abs().max() > 0


def _seen(model: Any) -> tuple[Any, Any]:
    batch, _, _ = model.transform.batch([torch.rand(3, 64, 96)], None)
    return batch, list(model.features(batch).values())


def _cells(level: int) -> int:
    stride = 4 * 2**level
    return -(-64 // stride) * -(-96 // stride)
