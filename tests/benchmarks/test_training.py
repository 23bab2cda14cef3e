"""The steps of training that are timed: who learns anything else has no time, and all of a step is charged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import training
from benchmarks.training_steps import (
    AMP,
    OURS,
    SHIPPED,
    TUNED,
    Expected,
    Ours,
    Theirs,
    as_ours,
    as_torchvision,
    assert_learns_the_same,
    dataset,
    detector,
    expected,
    outcome,
    run_of,
)
from fastmrcnn.data import Shapes

SIZE = (64, 80)


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Shapes, Expected]:
    """A detector of torchvision's, an image, and what it learns from that."""
    data = dataset(1, SIZE)
    model = detector([data[0][0]], small=True)
    return model, data, expected(model, data)


Problem = tuple[nn.Module, Shapes, Expected]


def test_the_same_is_learned(problem: Problem) -> None:
    model, data, wanted = problem
    assert set(wanted.values) >= {"loss_mask", "loss_objectness", "grad_norm"}
    for contender in (OURS, TUNED):
        assert_learns_the_same(run_of(contender, model, data), wanted)


def test_allowed_in_16_bits(problem: Problem) -> None:
    model, data, wanted = problem
    found = expected(model, data, AMP.precision)
    assert found.values == pytest.approx(wanted.values)
    assert wanted.allowed < found.allowed < 0.5


def halved(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: {name: loss / 2 for name, loss in call(*args).items()}


@pytest.mark.parametrize("contender", [OURS, SHIPPED], ids=str)
def test_a_wrong_gradient_is_found(problem: Problem, contender: Any) -> None:
    model, data, wanted = problem
    run = run_of(contender, model, data)
    run.model.backbone.body.layer4.requires_grad_(False)
    with pytest.raises(AssertionError, match="grad_norm"):
        assert_learns_the_same(run, wanted)


def test_a_wrong_loss_is_found(problem: Problem) -> None:
    model, data, wanted = problem
    run = run_of(OURS, model, data)
    run.model.rpn.losses = halved(run.model.rpn.losses)
    with pytest.raises(AssertionError, match=r"instead of .* where 1.00% is allowed"):
        assert_learns_the_same(run, wanted)
    run.model.rpn.losses = lambda *args: {}
    with pytest.raises(AssertionError, match="loss_objectness"):
        assert_learns_the_same(run, wanted)


def test_steps_are_the_same_work(problem: Problem) -> None:
    """Nothing moves the weights: neither of them, nor those of the model that they are copies of."""
    model, data, wanted = problem
    before = {name: value.clone() for name, value in model.named_parameters()}
    for contender in (OURS, SHIPPED):
        run = run_of(contender, model, data)
        run.step(run.load())
        for name, value in run.model.named_parameters():
            assert torch.equal(value, before[name]), name
        # Sampled as usual; statistics of norms do not show in training.
        assert outcome(run) == pytest.approx(wanted.values, rel=1e-3)


def test_who_learns_something_else_has_no_times(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others have, and the run fails."""
    model, data, _ = problem
    original = training.run_of

    def run_of(contender: Any, *args: Any) -> Any:
        run = original(contender, *args)
        if contender == OURS:
            run.model.rpn.losses = halved(run.model.rpn.losses)
        return run

    monkeypatch.setattr(training, "run_of", run_of)
    monkeypatch.setattr(training, "CONTENDERS", [OURS, SHIPPED])
    monkeypatch.setattr(training, "dataset", lambda *_: data)
    monkeypatch.setattr(training, "detector", lambda *_, **__: model)
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["training", "--batch", "1", "--rounds", "1", "--small", "--json", str(out)])
    with pytest.raises(SystemExit, match="fastmrcnn float32: something else is learned"):
        training.main()
    found = json.loads(out.read_text())["cases"][0]["contenders"]
    assert "where 1.00% is allowed" in found["fastmrcnn float32"]["error"]
    assert set(found["fastmrcnn float32"]) == {"role", "error"}
    assert found["torchvision float32"]["stages"]["step"]["p50_us"] > 0


def test_ours_and_theirs(problem: Problem) -> None:
    model, data, _ = problem
    ours, theirs = run_of(OURS, model, data), run_of(SHIPPED, model, data)
    assert isinstance(ours, Ours)
    assert isinstance(theirs, Theirs)
    assert not any(type(part).__module__.startswith("fastmrcnn") for part in theirs.model.modules())
    back = as_torchvision(as_ours(model))
    assert [type(part) for part in back.modules()] == [type(part) for part in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


def test_parts_that_only_we_have(problem: Problem) -> None:
    class Own(nn.Module):
        pass

    Own.__module__ = "fastmrcnn.models"
    with pytest.raises(TypeError, match="Own derives from no class of torchvision"):
        as_torchvision(nn.Sequential(Own()))


def test_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr(training, "device_name", lambda: "cpu")
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(times))
    laps = training.Laps()
    laps.start()
    for stage in ("RPN", "RoI heads", "RPN"):
        laps.end(stage)
    assert laps.seconds() == {"RPN": 6.0, "RoI heads": 1.0}


def test_peak_memory() -> None:
    """Four megabytes at a time, and one that stays."""

    def call() -> Tensor:
        for _ in range(3):
            torch.ones(1 << 20)
        return torch.ones(1 << 18)

    assert training.peak_memory(call) == pytest.approx(4 << 20, rel=0.01)


def test_whole_measurement(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    model, data, _ = problem
    monkeypatch.setattr(training, "CONTENDERS", [OURS, SHIPPED])
    monkeypatch.setattr(training, "dataset", lambda *_: data)
    monkeypatch.setattr(training, "detector", lambda *_, **__: model)
    case = training.measured(1, SIZE, small=True, rounds=2)
    assert list(case["contenders"]) == ["fastmrcnn float32", "torchvision float32"]
    for found in case["contenders"].values():
        assert list(found["stages"]) == [*training.STAGES, "step"]
        assert all(times["p20_us"] > 0 for times in found["stages"].values())
        assert found["operations"] > 500
        assert found["peak_memory"] > 4 * sum(p.numel() for p in model.parameters())  # gradients alone
    assert list(case["speedup"]) == ["fastmrcnn float32 over torchvision float32"]
    lines = training.table(case).splitlines()
    assert lines[0].startswith("| maskrcnn_resnet18_fpn, 1 x 64x80, ms |")
    assert [line.split("|")[1].strip() for line in lines[2:9]] == training.STAGES
