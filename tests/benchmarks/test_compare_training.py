"""torchvision's run beside ours: the same data, weights and updates, by torchvision's own code."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import config, records, shapes
from torch import nn

from benchmarks.compare_training import Comparison, FloatItems, parse
from benchmarks.training_steps import exhaustive
from fastmrcnn import ops, train
from fastmrcnn.checkpoints import load_checkpoint
from fastmrcnn.data import Key
from fastmrcnn.training.config import AugmentConfig, OptimConfig
from fastmrcnn.training.failures import EXIT_STATUS, Termination


def comparison(output: Path, **changes: Any) -> Comparison:
    return Comparison(config(output, **changes), shapes(2), None, torch.device("cpu"), Termination())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_the_same_step(tmp_path: Path) -> None:
    """Where all is sampled both learn the same, and update the same weights by as much."""
    optim = OptimConfig(lr=0.01, lr_batch=0, warmup_steps=0, milestones=[], clip_norm=0.5, weight_decay=0.1)
    ours = comparison(tmp_path, optim=optim)
    theirs = ours.theirs
    assert not any(type(part).__module__.startswith("fastmrcnn") for part in theirs.model.modules())
    before = weights(ours.model)
    assert weights(theirs.model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in weights(theirs.model).items())

    with exhaustive(ours.model), exhaustive(theirs.model):
        losses = ours.learner.learn(list(ours.loader), (0, 0))
        theirs.train_epoch(0, 1)
    assert len(theirs.losses) == 1
    for name, loss in theirs.losses[0].items():
        assert math.isfinite(loss)
        assert loss == pytest.approx(losses[name].item(), rel=1e-3), name
    assert losses["grad_norm"] > 0.5  # so that it was clipped
    after, other = weights(ours.model), weights(theirs.model)
    moved = math.sqrt(sum((after[name] - before[name]).double().norm() ** 2 for name in before))
    apart = math.sqrt(sum((after[name] - other[name]).double().norm() ** 2 for name in before))
    assert moved > 0
    assert apart < 1e-2 * moved


def test_learning_rate(tmp_path: Path) -> None:
    ours = comparison(tmp_path, optim=OptimConfig(lr=0.01, lr_batch=0, warmup_steps=3, milestones=[]))
    for step in range(2):
        ours.theirs.train_epoch(step, step + 1)
        groups = ours.theirs.learner.optimizer.param_groups
        assert {group["lr"] for group in groups} == {0.01 * (1e-3 + (1 - 1e-3) * step / 3)}


def test_items_are_those_of_ours(tmp_path: Path) -> None:
    options = config(tmp_path, augment=AugmentConfig(flip=0.5))
    ours = Comparison(options, shapes(2), None, torch.device("cpu"), Termination())
    items, theirs = ours.loader.dataset, FloatItems(shapes(2), options)
    flipped = set()
    for position in range(6):
        key = Key(1, position, position % 2)
        sample, (image, target) = items[key], theirs[key]
        assert image.dtype == torch.float32
        assert torch.equal((image * 255).round().byte(), sample.image)
        assert torch.equal(target["boxes"], sample.boxes)
        assert torch.equal(target["masks"].bool(), ops.unpack_bits(sample.words, 64))
        flipped.add(torch.equal(image, shapes(2)[key.item][0]))
    assert flipped == {True, False}


def test_run(tmp_path: Path) -> None:
    options = config(tmp_path, epochs=2, evaluate_every=2)
    with mock.patch.object(train, "Training", Comparison):
        train.train(options, shapes(2), shapes(1, seed=1))
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert list(result["runs"]) == ["fastmrcnn", "torchvision"]
    for run in result["runs"].values():
        assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2]
        assert all(epoch["seconds_per_image"] > 0 for epoch in run["epochs"])
        assert "metrics" not in run["epochs"][0]
        assert set(run["epochs"][1]["metrics"]) == {"bbox", "segm"}
        assert len(run["losses"]) == 2
    ours = result["runs"]["fastmrcnn"]
    assert ours["losses"] == [record["losses"] for record in records(tmp_path, "train")]
    assert ours["epochs"][1]["metrics"] == records(tmp_path, "epoch")[1]["metrics"]
    assert set(result["seconds_per_image"]) == {"fastmrcnn", "torchvision", "speedup"}
    assert result["inputs"]["batch_size"] == 2
    assert str(tmp_path) not in json.dumps(result)
    drawn = (tmp_path / "comparison.svg").read_text()
    for text in ("loss", "box AP", "mask AP", "fastmrcnn", "torchvision", "s per image"):
        assert text in drawn


class EndedAfter(Comparison):
    """A run that is asked to end in its first epoch, or while that is measured."""

    measuring = False

    def note(self, *args: Any) -> None:
        super().note(*args)
        self.termination.came = not self.measuring

    def measure(self, *args: Any) -> Any:
        if self.measuring:
            raise SystemExit(EXIT_STATUS)
        return super().measure(*args)


@pytest.mark.parametrize("measuring", [False, True])
def test_going_on(tmp_path: Path, measuring: bool) -> None:
    """Interrupted or not: the same is learned by both, and known of it."""
    optim = OptimConfig(lr=0.01, lr_batch=0, warmup_steps=2, milestones=[5], ema=0.5)
    results = []
    for folder, interrupted in (("whole", None), ("parts", EndedAfter), ("parts", None)):
        every = 1 if measuring else 2  # asked to end it would not begin to measure
        options = config(tmp_path / folder, epochs=2, evaluate_every=every, optim=optim, resume="auto")
        with (
            mock.patch.object(train, "Training", interrupted or Comparison),
            mock.patch.object(EndedAfter, "measuring", measuring),
            contextlib.nullcontext() if interrupted is None else pytest.raises(SystemExit),
        ):
            train.train(options, shapes(2), shapes(1, seed=1))
        if interrupted is not None:
            assert load_checkpoint(options.output / "last.pt")["training"]["progressed"]["step"] == 1
        path = tmp_path / folder / "comparison.json"
        results.append(json.loads(path.read_text()) if path.exists() else None)
    whole, _, parts = results
    for name, run in whole["runs"].items():
        assert parts["runs"][name]["losses"] == run["losses"], name
        for one, other in zip(parts["runs"][name]["epochs"], run["epochs"], strict=True):
            assert [one.get(key) for key in ("epoch", "step", "metrics")] == [
                other.get(key) for key in ("epoch", "step", "metrics")
            ]
    first, second = (load_checkpoint(tmp_path / folder / "last.pt")["training"] for folder in ("whole", "parts"))
    assert first["theirs"]["optimizer"]["state"]
    for part in ("theirs", "learner"):
        torch.testing.assert_close(second[part], first[part], rtol=0, atol=0, msg=part)


def test_average_of_the_weights(tmp_path: Path) -> None:
    """What is measured of torchvision's is the average, too; and afterwards it learns on from its own weights."""
    optim = OptimConfig(lr=0.01, lr_batch=0, warmup_steps=0, milestones=[], ema=0.9)
    theirs = comparison(tmp_path, optim=optim).theirs
    before = weights(theirs.model)
    theirs.train_epoch(0, 1)
    after = weights(theirs.model)
    name = "roi_heads.box_predictor.cls_score.weight"
    with theirs.measured() as model:
        torch.testing.assert_close(weights(model)[name], 0.1 * before[name] + 0.9 * after[name])
    assert torch.equal(weights(theirs.model)[name], after[name])
    assert not torch.equal(before[name], after[name])


def test_several_sizes(tmp_path: Path) -> None:
    """torchvision takes one at random, and when it is measured that of the model."""
    theirs = comparison(tmp_path, augment=AugmentConfig(min_sizes=[48, 64])).theirs
    theirs.train_epoch(0, 1)
    assert theirs.model.transform.min_size == (48, 64)
    with theirs.measured() as model:
        assert model.transform.min_size == (64,)


@pytest.mark.parametrize(
    "changes",
    [{"augment": AugmentConfig(jitter=64)}, {"checkpoint_every": 1}],
    ids=["jitter", "checkpoint_every"],
)
def test_what_torchvision_does_not_do(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"torchvision's loop does not do that"):
        comparison(tmp_path, **changes)


def test_command_line(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("data:\n  train_images: a\n  train_annotations: b\nepochs: 3\nbatch_size: 7\n")
    found = parse(["--config", str(file), "--epochs", "5", "--model.name", "maskrcnn_resnet18_fpn"])
    assert (found.epochs, found.batch_size, found.model.name) == (5, 7, "maskrcnn_resnet18_fpn")
    assert found.data.train_images == Path("a")
