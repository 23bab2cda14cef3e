"""Training runs small enough for a test: a few images of 64 pixels, a narrow network, a fraction of a second a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.checkpoints import load_checkpoint
from fastmrcnn.data import Shapes
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.training.config import AugmentConfig, DataConfig, LogConfig, OptimConfig, TrainConfig

SIZE = (64, 64)


def shapes(images: int = 4, seed: int = 0) -> Shapes:
    return Shapes(images, image_size=SIZE, seed=seed)


def config(output: Path, **changes: Any) -> TrainConfig:
    """A run of two epochs on `shapes()`; `changes` are fields of TrainConfig."""
    model = ModelConfig(
        "maskrcnn_resnet18_fpn",
        min_size=64,
        max_size=64,
        anchor_sizes=[8, 16, 32, 64, 128],
        proposals=50,
        box_samples=16,
    )
    options: dict[str, Any] = {
        "data": DataConfig(Path(), Path(), workers=0),
        "model": model,
        "augment": AugmentConfig(),
        "optim": OptimConfig(lr=0.01, lr_batch=0, warmup_steps=2, milestones=[5]),
        "log": LogConfig(every=1),
        "output": output,
        "epochs": 2,
        "batch_size": 2,
        "device": "cpu",
    }
    return TrainConfig(**(options | changes))


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and losses of each reading."""
    return [(record["step"], record["losses"]) for record in records(run, "train")]


def assert_same_run(a: Path, b: Path) -> None:
    """Same losses, and at the end the same weights and state of the optimizer, to the bit."""
    assert losses(a) == losses(b)
    assert [record["losses"] for record in records(a, "epoch")] == [record["losses"] for record in records(b, "epoch")]
    first, second = load_checkpoint(a / "last.pt"), load_checkpoint(b / "last.pt")
    for content in (first, second):
        content["training"]["progressed"].pop("seconds")
    assert_same(first, second)


def assert_same(a: Any, b: Any, name: str = "checkpoint") -> None:
    """Nested dicts and lists of the same numbers and tensors."""
    assert type(a) is type(b), name
    if isinstance(a, Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}[{i}]")
    else:
        assert a == b, name
