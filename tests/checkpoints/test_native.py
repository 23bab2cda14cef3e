"""Checkpoints: round trip, damage, and pickles that want to run something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastmrcnn.checkpoints import ModelInfo, load_checkpoint, load_model, save_checkpoint
from fastmrcnn.models.config import ModelConfig, build_model

CONFIG = ModelConfig("maskrcnn_resnet18_fpn", min_size=64, max_size=64, detections_per_image=7, weights_backbone=None)
INFO = ModelInfo(CONFIG, ["cell", "debris"], [3, 7])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "model.pt", build_model(CONFIG, 3), INFO)


def test_round_trip(checkpoint: Path) -> None:
    torch.manual_seed(0)
    original = build_model(CONFIG, 3).eval()
    model, info = load_model(checkpoint)
    assert info == INFO
    assert not model.training
    assert model.roi_heads.detections_per_img == 7
    image = [torch.rand(3, 64, 64)]
    with torch.inference_mode():
        for a, b in zip(original(image), model(image), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_of_pretrained_parts_needs_no_download(tmp_path: Path) -> None:
    config = ModelConfig("maskrcnn_resnet18_fpn", min_size=64, max_size=64)
    model = build_model(config, 2)
    config.weights_backbone = "IMAGENET1K_V1"  # what it was trained from
    path = save_checkpoint(tmp_path / "model.pt", model, ModelInfo(config, ["cell"], [1]))
    assert load_model(path)[1].config.weights_backbone == "IMAGENET1K_V1"


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated(checkpoint: Path, keep: int) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.pt is damaged"):
        load_checkpoint(checkpoint)


def test_of_another_program(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="was not written by fastmrcnn"):
        load_checkpoint(tmp_path / "other.pt")


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_hostile_pickle_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"format": "fastmrcnn-1", "model": _Hostile(marker)}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert not marker.exists()


def test_failed_write_keeps_the_old_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.read_bytes()

    def fail(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(checkpoint, build_model(CONFIG, 3), INFO)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == ["model.pt"]
