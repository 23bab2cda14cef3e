"""Engines of networks with other libraries' conventions: images resized as bytes, masks pasted as there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmrcnn
from benchmarks.detectors import calibrate
from fastmrcnn.engine.buckets import as_buckets
from fastmrcnn.engine.device import DeviceRunner
from fastmrcnn.engine.host import HostRunner
from fastmrcnn.engine.prepare import prepare
from fastmrcnn.export import export
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.conventions import Library


def detector(conventions: Library, photos: list[Tensor]) -> fastmrcnn.MaskRCNN:
    torch.manual_seed(0)
    options: dict[str, Any] = {"min_size": 128, "max_size": 200, "proposals": 30, "detections_per_image": 8}
    config = ModelConfig("maskrcnn_resnet50_fpn", conventions=conventions, **options)
    model = build_model(config, 11).eval()
    assert isinstance(model, fastmrcnn.MaskRCNN)
    with torch.no_grad():
        model.backbone.body.bn1.weight.fill_(0.01 if conventions == "detectron2" else 1)
    calibrate(model, photos[:1])
    return model.double()


@pytest.mark.parametrize("conventions", ["detectron2", "mmdetection"])
def test_same_detections(conventions: Library, photos: list[Tensor]) -> None:
    """Alone and in a batch, on canvases of their own or larger ones: what the model finds in each."""
    model = detector(conventions, photos)
    images = [(photo * 255).round().to(torch.uint8) for photo in photos[:2]]
    with torch.inference_mode():
        expected = [model([image.double() / 255])[0] for image in images]
    sizes = sorted({(image.shape[-2] + 20, image.shape[-1] + 40) for image in images})
    one, other = (prepare(model, torch.float64) for _ in range(2))
    buckets = as_buckets(model.transform, sizes)
    runners = [
        HostRunner(one, torch.float64, "soft", 0.5),
        DeviceRunner(other, buckets, [2], torch.float64, "soft", 0.5),
    ]
    for runner in runners:
        found = runner.begin(images, buckets[-1])()
        for a, b in zip(expected, found, strict=True):
            assert len(a["boxes"]) > 3
            assert torch.equal(a["labels"], b["labels"])
            for key in ("boxes", "scores", "masks"):
                torch.testing.assert_close(b[key].double(), a[key], rtol=1e-4, atol=1e-4, msg=key)


def test_what_there_is_not(tmp_path: Path) -> None:
    with torch.device("meta"):
        square = build_model(ModelConfig("maskrcnn_resnet50_fpn", conventions="matterport"), 3)
        theirs = build_model(ModelConfig("maskrcnn_resnet50_fpn", conventions="detectron2"), 3)
        corners = build_model(ModelConfig("maskrcnn_resnet50_fpn", conventions="maskrcnn_benchmark"), 3)
    for model in (square, corners):
        with pytest.raises(ValueError, match="a network with its conventions of boxes cannot be compiled"):
            fastmrcnn.compile(model, image_sizes=(64, 64))
    with pytest.raises(ValueError, match="its conventions resize images as bytes, which exported programs do not"):
        export(theirs, tmp_path / "a.pt2", image_size=(64, 64))
    for method in (square.rpn.losses, square.roi_heads.losses):
        with pytest.raises(NotImplementedError, match="conventions detects, but does not learn"):
            method(None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="conventions of matterport are those of Mask and Faster R-CNN"):
        build_model(ModelConfig("maskrcnn_resnet50_c4", conventions="matterport"), 3)
    with pytest.raises(ValueError, match="maskrcnn_resnet50_fpn_v2 has torchvision's conventions, not those of detect"):
        build_model(ModelConfig("maskrcnn_resnet50_fpn_v2", conventions="detectron2"), 3)
    with pytest.raises(ValueError, match="stride_in_1x1: maskrcnn_resnet50_fpn with torchvision's con"):
        build_model(ModelConfig("maskrcnn_resnet50_fpn", stride_in_1x1=True), 3)
