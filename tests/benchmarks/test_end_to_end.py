"""The waterfall of whole detections: who finds something else is told, and all that is asked of a device is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import end_to_end
from benchmarks.detection_steps import (
    SMALL_DETECTOR,
    Setting,
    agreements,
    as_torchvision,
    contenders,
    detectors,
    photos,
    with_fastest_algorithms,
)
from benchmarks.measure import Operations
from fastmrcnn.checkpoints.native import ModelInfo, save_checkpoint
from fastmrcnn.models.config import ModelConfig, build_model


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return photos(None, [(96, 128), (128, 96)])


@pytest.fixture(scope="module")
def pair(images: list[Tensor]) -> tuple[Any, Any]:
    return detectors("maskrcnn_resnet50_fpn", None, images, **SMALL_DETECTOR)


def test_all_ways_are_measured(pair: tuple[Any, Any], images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    calls = contenders(*pair, Setting(images, "rle", torch.bfloat16))

    def broken() -> Any:
        raise RuntimeError("no such way\nhere")

    def silent() -> Any:
        raise AssertionError

    case = end_to_end.measured(calls | {"broken": broken, "silent": silent}, 2, 1)
    assert case["detections"] > 0
    found = case["contenders"]
    assert found["broken"] == {"error": "RuntimeError: no such way"}
    assert found["silent"] == {"error": "AssertionError"}
    assert set(found) == {*calls, "broken", "silent"}
    for name in calls:
        assert 0 < found[name]["p20_us"] <= found[name]["p80_us"]
        assert found[name]["operations per image"] > 100
    assert found["torchvision"]["speedup"]["p50"] == 1
    assert found["torchvision"]["reads per image"] > found["fastmrcnn engine float32"]["reads per image"]
    for name in ("torchvision channels_last", "fastmrcnn", "fastmrcnn engine float32"):
        assert found[name]["agreement"]["strictly"] >= end_to_end.LEAST
    labelled = {"model": "m", "size": "96x128", "batch": 2, "masks": "rle"} | case
    text = end_to_end.table(labelled)
    assert all(name in text for name in found)
    assert len({line.count("|") for line in text.splitlines() if line}) == 1
    assert end_to_end.disagreements([labelled]) == []
    found["fastmrcnn engine float32"]["agreement"]["strictly"] = 0.9
    assert end_to_end.disagreements([labelled]) == ["fastmrcnn engine float32 agrees in 90.0% of the detections"]
    found["fastmrcnn engine float32"] = found["broken"]
    assert end_to_end.disagreements([labelled]) == ["fastmrcnn engine float32 does not run: RuntimeError: no such way"]


def test_without_masks(pair: tuple[Any, Any], images: list[Tensor]) -> None:
    calls = contenders(*pair, Setting(images[:1], None, torch.bfloat16))
    for name in ("torchvision", "fastmrcnn"):
        assert set(calls[name]()[0]) == {"boxes", "labels", "scores"}
    assert pair[0].roi_heads.has_mask()


def test_fastest_algorithms() -> None:
    """Of cuDNN, within the call alone."""
    seen: list[bool] = []
    before = torch.backends.cudnn.benchmark

    def call() -> list[Any]:
        seen.append(torch.backends.cudnn.benchmark)
        return []

    assert with_fastest_algorithms(call)() == []
    assert seen == [True]
    assert torch.backends.cudnn.benchmark == before


def test_agreement() -> None:
    one = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), "labels": torch.tensor([1, 2])}
    one["scores"] = torch.tensor([0.9, 0.8])
    near = one | {"scores": torch.tensor([0.88, 0.3])}
    assert agreements([one], [one]) == {"strictly": 1.0, "nearly": 1.0}
    assert agreements([one], [near]) == {"strictly": 0.0, "nearly": 0.5}
    unsure = one | {"scores": torch.tensor([0.4, 0.3])}
    assert agreements([unsure], [near]) == {"strictly": 1.0, "nearly": 1.0}


def test_checkpoints(tmp_path: Any, images: list[Tensor]) -> None:
    config = ModelConfig(name="maskrcnn_resnet18_fpn", weights=None, weights_backbone=None, min_size=96, max_size=128)
    torch.manual_seed(0)
    model = build_model(config, 3)
    save_checkpoint(tmp_path / "best.pt", model, ModelInfo(config, ["a", "b"], [1, 2]))
    theirs, ours = detectors("", tmp_path / "best.pt", images)
    assert type(theirs).__module__.startswith("torchvision.")
    assert all(type(part).__module__.startswith("torchvision.") for part in (theirs.rpn, theirs.roi_heads))
    assert next(theirs.parameters()) is next(ours.parameters())
    with torch.inference_mode():
        a, b = theirs([images[0] / 255])[0], ours([images[0] / 255])[0]
    assert a["boxes"].shape == b["boxes"].shape
    assert isinstance(as_torchvision(ours).transform, torch.nn.Module)


def test_reads_are_counted() -> None:
    x = torch.tensor([1.0, -2.0])
    for read in (x.sum().item, x.nonzero, lambda: x[x > 0], lambda: bool(x[0] > 0), lambda: torch.where(x > 0)):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), Operations() as operations:
                read()
            assert operations.reads == 1
    with Operations() as operations:
        torch.where(x > 0, x, 0) + x[torch.tensor([1])]
    assert operations.reads == 0


@pytest.mark.parametrize(("text", "number", "size"), [("480x640", 3, (480, 640)), ("mixed", 9, (640, 480))])
def test_sizes(text: str, number: int, size: tuple[int, int]) -> None:
    assert end_to_end.of_image(text, number) == size


def test_a_bad_size() -> None:
    with pytest.raises(SystemExit, match="--size 480: expected HEIGHTxWIDTH"):
        end_to_end.of_image("480", 0)
