"""Files of Mask Scoring R-CNN give what it computes, scores of masks included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints.benchmark_network import BenchmarkNetwork, corner_anchors
from checkpoints.comparing import FEW, LONGER, SHORTER, as_input, assert_same, photo
from checkpoints.foreign_files import benchmark_shapes, random_state

import fastmrcnn
from fastmrcnn.checkpoints.reading import read_weights
from fastmrcnn.models.maskrcnn_benchmark import CornerPreprocess

ANCHORS = {f"rpn.anchor_generator.cell_anchors.{i}": cells for i, cells in enumerate(corner_anchors())}


def test_detections(tmp_path: Path) -> None:
    image = photo()
    seen = image[:, :, ::-1].copy()
    network = BenchmarkNetwork(random_state(benchmark_shapes(80), of_bytes=True), 80, SHORTER, LONGER)
    network.calibrate(seen)
    theirs = network(seen)
    state = {f"module.{name}": value for name, value in (network.saved() | ANCHORS).items()}
    torch.save({"model": state, "iteration": 90000}, tmp_path / "model_0090000.pth")
    model = fastmrcnn.load(tmp_path / "model_0090000.pth", **FEW).double()
    assert model.info.config.name == "maskrcnn_resnet50_fpn"
    assert model.info.config.mask_iou
    with torch.inference_mode():
        assert_same(model([as_input(image)])[0], theirs)


def test_anchors(tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in benchmark_shapes(3).items()}
    torch.save({"model": state | ANCHORS}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.info.config.anchor_sizes == [32, 64, 128, 256, 512]
    assert set(weights.unused) == set(ANCHORS)
    others = ANCHORS | {"rpn.anchor_generator.cell_anchors.0": torch.rand(3, 4)}
    torch.save({"model": state | others}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="its anchors have other ratios"):
        read_weights(tmp_path / "b.pth")
    del state["backbone.fpn.fpn_inner1.weight"]
    torch.save({"model": state}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"no detector with a pyramid on a ResNet: it lacks backbone\.fpn\.fpn_inner1"):
        read_weights(tmp_path / "c.pth")


def test_sizes() -> None:
    """Cut off to whole pixels, unless the longer side exceeds its bound."""
    transform = CornerPreprocess(min_size=800, max_size=1333, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    expected = {(480, 640): (800, 1066), (640, 480): (1066, 800), (427, 640): (800, 1199), (300, 1000): (400, 1333)}
    assert {size: transform.size_of(size) for size in expected} == expected
