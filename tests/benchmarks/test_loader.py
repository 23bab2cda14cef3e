"""The loader alone: both read the same, or have no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loader
from benchmarks.inputs import shapes_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images as files, and their annotations."""
    return shapes_folder(tmp_path, images=4)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    annotations = folder / "annotations" / "instances_train.json"
    given = ["--images", folder / "train", "--annotations", annotations, "--batch", 2, "--workers", 0, "--pairs", 1]
    out = folder / "result.json"
    monkeypatch.setattr("sys.argv", ["loader", *map(str, given), "--json", str(out), *options])
    try:
        loader.main()
    finally:
        result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize(("options", "images"), [((), 4), (("--limit", "2"), 2)])
def test_measurement(folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], images: int) -> None:
    result = run(folder, monkeypatch, *options)
    assert result["inputs"]["images"] == images
    assert result["differing images"] == 0
    rates = result["images per second"]["0 workers"]
    assert set(rates) == {"fastmrcnn", "torchvision"}
    assert all(rate > 0 for rate in rates.values())
    # Images and masks as bytes beside float32 images, masks as bytes and more.
    volume = result["images per second"]["bytes per image"]
    assert volume["fastmrcnn"] < volume["torchvision"] / 3


def test_other_masks_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loader.CocoDetection.__getitem__

    def inverted(self: loader.CocoDetection, i: int) -> object:
        image, target = original(self, i)
        return image, target | {"masks": 1 - target["masks"]}

    monkeypatch.setattr(loader.CocoDetection, "__getitem__", inverted)
    with pytest.raises(SystemExit, match="4 images or their masks differ"):
        run(folder, monkeypatch)
