"""The training script: learns, resumes as if never stopped, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmrcnn import train as train_module
from fastmrcnn.checkpoints import load_checkpoint, load_model
from fastmrcnn.data import Shapes
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.train import DataConfig, OptimConfig, TrainConfig, learning_rate_factor, train

SIZE = (64, 64)


def config(output: Path, **changes: object) -> TrainConfig:
    model = ModelConfig(
        "maskrcnn_resnet18_fpn",
        min_size=64,
        max_size=64,
        anchor_sizes=[8, 16, 32, 64, 128],
        proposals=50,
        box_samples=16,
    )
    base = TrainConfig(
        data=DataConfig(Path(), Path(), workers=0),
        model=model,
        optim=OptimConfig(lr=0.01, warmup_steps=2, milestones=[5]),
        output=output,
        epochs=2,
        batch_size=2,
        device="cpu",
        log_every=1,
    )
    for name, value in changes.items():
        setattr(base, name, value)
    return base


def test_writes_checkpoints_and_metrics(tmp_path: Path) -> None:
    best = train(config(tmp_path), Shapes(4, image_size=SIZE), Shapes(2, image_size=SIZE, seed=1))
    assert best == tmp_path / "best.pt"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert set(records[0]["losses"]) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    assert set(records[1]["metrics"]) == {"bbox", "segm"}
    model, info = load_model(best)
    assert info.class_names == ["circle", "rectangle", "triangle"]
    assert load_checkpoint(tmp_path / "last.pt")["training"]["epoch"] == 2
    assert load_checkpoint(best)["training"] is None
    assert model.roi_heads.box_predictor.cls_score.out_features == 4


def test_losses_fall(tmp_path: Path) -> None:
    train(
        config(tmp_path, epochs=6, optim=OptimConfig(lr=0.01, warmup_steps=4, milestones=[])),
        Shapes(8, image_size=SIZE),
        None,
    )
    losses = [
        sum(json.loads(line)["losses"].values()) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data = Shapes(4, image_size=SIZE)
    train(config(tmp_path / "whole", epochs=3), data, None)
    train(config(tmp_path / "parts", epochs=1), data, None)
    train(config(tmp_path / "parts", epochs=3, resume=tmp_path / "parts" / "last.pt"), data, None)
    whole, parts = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "parts"))
    assert parts["training"]["epoch"] == 3
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_resume_needs_a_state_of_training(tmp_path: Path) -> None:
    best = train(config(tmp_path, epochs=1), Shapes(2, image_size=SIZE), None)
    with pytest.raises(ValueError, match=r"no state of training; last\.pt"):
        train(config(tmp_path, resume=best), Shapes(2, image_size=SIZE), None)


def test_a_loss_that_is_not_finite_names_the_images(tmp_path: Path) -> None:
    diverging = config(tmp_path, optim=OptimConfig(lr=1e12, warmup_steps=0), epochs=4)
    with pytest.raises(FloatingPointError, match=r"images \[.*Lower optim\.lr"):
        train(diverging, Shapes(4, image_size=SIZE), None)


def test_learning_rate() -> None:
    factor = learning_rate_factor(OptimConfig(warmup_steps=10, milestones=[2, 3], gamma=0.1), steps_per_epoch=20)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(39) == 1.0
    assert factor(40) == pytest.approx(0.1)
    assert factor(60) == pytest.approx(0.01)


def test_norms_and_biases_do_not_decay() -> None:
    model = train_module.build_model(config(Path()).model, 3)
    decaying, plain = train_module.parameter_groups(model, OptimConfig(weight_decay=0.5))
    assert decaying["weight_decay"] == 0.5
    assert plain["weight_decay"] == 0.0
    assert all(p.dim() > 1 for p in decaying["params"])
    assert len(decaying["params"]) + len(plain["params"]) == len(list(model.parameters()))
