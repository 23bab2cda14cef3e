"""Steps that are captured learn what others learn.  Without a GPU they are run from the same fixed memory."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config, losses, shapes
from test_step import batches, model
from torch import Tensor

import fastmrcnn.training.capture as capture
from fastmrcnn.batches import LoadedBatch
from fastmrcnn.checkpoints import load_checkpoint
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.train import train
from fastmrcnn.training.capture import WARM_UP, CapturedLearner, Key, padded, room
from fastmrcnn.training.config import OptimConfig
from fastmrcnn.training.optim import WeightAverage
from fastmrcnn.training.step import Learner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(count: int) -> list[LoadedBatch]:
    """Batches in the rooms that captured ones are padded to, so that the same random numbers sample the same."""
    found = [batch.to(torch.device(DEVICE)) for batch in batches(count)]
    return [padded(batch, Key(batch)) for batch in found]


def learner(kind: type[Learner], network: GeneralizedRCNN, name: str = "SGD", **options: Any) -> Learner:
    learning = [p for p in network.to(DEVICE).parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(learning, 0.01, 0.9, fused=True)
    if name == "AdamW":
        optimizer = torch.optim.AdamW(learning, 1e-3, fused=True)
    return kind(network, optimizer, OptimConfig(clip_norm=1.0, **options), average=WeightAverage(network, 0.9))


def steps(learns: Learner, data: list[LoadedBatch], first: int = 0, *, parts: int = 1) -> list[dict[str, Tensor]]:
    """What steps of `parts` batches each report, with a learning rate of their own."""
    reports = []
    for i in range(0, len(data), parts):
        learns.set_learning_rate(0.01 / (1 + first + i))
        reports.append(learns.learn(data[i : i + parts], (3, first + i)))
    return reports


def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        for key in x:
            torch.testing.assert_close(y[key], x[key], rtol=1e-5, atol=1e-6, msg=f"{key} of step {step}")


@pytest.mark.parametrize(("optimizer", "parts"), [("SGD", 1), ("SGD", 2), ("AdamW", 1)])
def test_the_same_is_learned(optimizer: str, parts: int) -> None:
    """Losses, gradients, weights and their average, over steps before and after the capture."""
    data = on_device(3) * 3 * parts
    usual, fixed = model(), model()
    one, other = (learner(kind, m, optimizer) for kind, m in ((Learner, usual), (CapturedLearner, fixed)))
    assert_same(steps(one, data, parts=parts), steps(other, data, parts=parts))
    assert isinstance(other, CapturedLearner)
    assert len(other.programs) > 0
    assert other.captured_update is not None
    for name, value in usual.state_dict().items():
        torch.testing.assert_close(fixed.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(other.average.average[name], one.average.average[name], rtol=1e-4, atol=1e-6)


def test_rooms_change_nothing() -> None:
    """Where all is sampled, so that no random number decides, padding leaves losses as they are."""
    network = model().to(DEVICE)
    for part in (network.rpn, network.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 10**6
    plain = [batch.to(torch.device(DEVICE)) for batch in batches(2)]
    compute = learner(Learner, network).losses
    for batch in plain:
        key = Key(batch)
        key.objects, key.pixels, key.words = key.objects + 3, key.pixels + 5, key.words + 7
        wide = padded(batch, key)
        assert wide.boxes.shape[1] > batch.boxes.shape[1] + 2
        expected, found = compute(batch), compute(wide)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_another_number_of_batches() -> None:
    """Of a step: each of them counts less then."""
    data = on_device(2) * 6
    reports = []
    for kind in (Learner, CapturedLearner):
        learns = learner(kind, model())
        reports.append(steps(learns, data[:6]) + steps(learns, data[6:], 6, parts=2))
    assert_same(*reports)


def test_batches_of_a_size_are_padded_alike() -> None:
    (batch,) = (batch.to(torch.device(DEVICE)) for batch in batches(1))
    assert batch.words is not None
    other = replace(batch, words=batch.words.new_zeros(len(batch.words) + 1))
    other.words[:-1] = batch.words
    assert Key(batch) == Key(other)
    learns = learner(CapturedLearner, model())
    assert all(torch.isfinite(value) for report in steps(learns, [batch, other] * 4) for value in report.values())
    assert len(learns.programs) == 1


def as_graph(self: CapturedLearner, call: Callable[[], Any]) -> Callable[[], Any]:
    """What does as `call`, and overwrites what it has returned, as a CUDA graph does."""
    memory: list[Any] = []

    def tensors(result: Any) -> list[Tensor]:
        return list(result.values()) if isinstance(result, dict) else [result]

    def replay() -> Any:
        again = call()
        if not memory:
            memory.append(again)
        tensors = (
            zip(memory[0].values(), again.values(), strict=True) if isinstance(again, dict) else [(memory[0], again)]
        )
        for kept, new in tensors:
            kept.copy_(new)
        return memory[0]

    return replay


def test_reports_outlive_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(CapturedLearner, "_captured", as_graph)
    data = on_device(2) * 4
    learns = learner(CapturedLearner, model())
    reports = steps(learns, data)
    values = [{key: value.item() for key, value in report.items()} for report in reports]
    steps(learns, data)
    assert [{key: value.item() for key, value in report.items()} for report in reports] == values
    assert len({value["loss_mask"] for value in values}) == len(values)


def test_graphs_read_their_own_memory() -> None:
    """The batch that was captured may change, or go."""
    data = on_device(1) * (WARM_UP + 1)
    learns = learner(CapturedLearner, model())
    steps(learns, data)
    (program,) = learns.programs.values()
    mine = {field.name: getattr(program.batch, field.name) for field in fields(LoadedBatch)}
    for name, value in mine.items():
        if isinstance(value, Tensor):
            assert value.data_ptr() != getattr(data[0], name).data_ptr(), name


def test_what_graphs_hold_stays_in_its_place() -> None:
    learns = learner(CapturedLearner, model(), "AdamW")
    data = on_device(1) * 2
    steps(learns, data)

    def places() -> list[int]:
        groups = learns.optimizer.param_groups
        tensors = [p.grad for p in learns.parameters] + [group["lr"] for group in groups]
        tensors += [value for state in learns.optimizer.state.values() for value in state.values()]
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    steps(learns, data, 2)
    assert places() == before
    assert all(group["capturable"] for group in learns.optimizer.param_groups)


def test_rare_sizes_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST", 1)
    (batch,) = on_device(1)
    wider = replace(batch, size=(96, 96))
    learns = learner(CapturedLearner, model())
    steps(learns, [batch, wider] * (WARM_UP + 2))
    assert [key.size for key, _ in learns.programs] == [batch.size]


def test_checkpoints_are_those_of_others() -> None:
    """Captured or not, a run goes on from what either has saved."""
    data = on_device(2) * 3
    first = learner(CapturedLearner, model(), "AdamW")
    steps(first, data)
    state, weights = first.state_dict(), first.model.state_dict()
    assert all(isinstance(group["lr"], float) for group in state["optimizer"]["param_groups"])
    reports = []
    for kind in (Learner, CapturedLearner):
        network = model()
        network.load_state_dict(weights)
        learns = learner(kind, network, "AdamW")
        learns.load_state_dict(torch.load(saved(state), weights_only=True))
        reports.append(steps(learns, data, 6))
    assert_same(*reports)
    assert_same(reports[0], steps(first, data, 6))
    assert first.captured_update is not None
    first.load_state_dict(torch.load(saved(state), weights_only=True))
    assert first.captured_update is None  # it would read the old state


def saved(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_run_goes_on_either_way(tmp_path: Path) -> None:
    """Training with `capture`, stopped, and gone on with, as it was and without."""
    train(config(tmp_path / "run", capture=True, epochs=1), shapes(8))
    for name, captured in (("as_it_was", True), ("without", False)):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        train(config(tmp_path / name, capture=captured, epochs=2, resume="auto"), shapes(8))
        assert [step for step, _ in losses(tmp_path / name)] == [1, 2, 3, 4, 5, 6, 7, 8]
    content = load_checkpoint(tmp_path / "as_it_was" / "last.pt")
    assert all(isinstance(group["lr"], float) for group in content["training"]["learner"]["optimizer"]["param_groups"])


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="capture: expected one process"):
        learner(CapturedLearner, model())


@given(length=st.integers(0, 10**9), least=st.sampled_from([8, 256, 4096]))
def test_rooms(length: int, least: int) -> None:
    found = room(length, least)
    assert found >= max(length, least)
    assert found == least or found < 1.5 * length
    assert room(found, least) == found
