import json
import math
import os
import random

import pytest
from coco_problems import random_problem
from hypothesis import example, given
from hypothesis import strategies as st

from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.training.config import LogConfig
from fastmrcnn.training.readings import Reading
from fastmrcnn.training.records import Records, tags
from fastmrcnn.training.speed import Speed

SPEED = Speed(12.5, 0.25, 512.0)


def reading(step, value=None):
    mask, box, norm = (random.Random(step * 3 + i).random() for i in range(3))
    values = {"loss_mask": mask if value is None else value, "loss_box_reg": box, "grad_norm": norm}
    return Reading(step, values, [step, step + 1])


def read(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture(scope="module")
def metrics():
    problem = random_problem(2)
    return {iou_type: evaluate_coco(*problem, iou_type) for iou_type in ("bbox", "segm")}


def test_records_of_steps_and_of_an_epoch(tmp_path, metrics):
    with Records(tmp_path / "new", LogConfig(), {}) as records:
        assert records.pictures == 0
        records.add([reading(1), reading(2)])
        first = records.write_train(1, 0.1, SPEED)
        records.add([reading(3)])
        # Each line is there at once.
        assert read(tmp_path / "new") == [first]
        second = records.write_train(1, 0.2, Speed(1.0, 0.0, None))
        third = records.write_epoch(1, 0.2, 60.0, metrics)
        records.add([reading(4)])
        fourth = records.write_epoch(2, 0.2, 61.0)
    assert read(tmp_path / "new") == [first, second, third, fourth]
    values = [reading(step).values for step in range(5)]
    assert first == {
        "kind": "train",
        "epoch": 1,
        "step": 2,
        "lr": 0.1,
        "losses": {
            name: pytest.approx((values[1][name] + values[2][name]) / 2) for name in ("loss_mask", "loss_box_reg")
        },
        "grad_norm": pytest.approx((values[1]["grad_norm"] + values[2]["grad_norm"]) / 2),
        "skipped": 0,
        "images_per_second": 12.5,
        "data_wait": 0.25,
        "peak_memory_mb": 512.0,
    }
    assert second["losses"]["loss_mask"] == values[3]["loss_mask"]
    assert second["peak_memory_mb"] is None
    assert third == {
        "kind": "epoch",
        "epoch": 1,
        "step": 3,
        "lr": 0.2,
        "losses": {
            name: pytest.approx(sum(values[step][name] for step in (1, 2, 3)) / 3)
            for name in ("loss_mask", "loss_box_reg")
        },
        "grad_norm": pytest.approx(sum(values[step]["grad_norm"] for step in (1, 2, 3)) / 3),
        "skipped": 0,
        "seconds": 60.0,
        "metrics": {iou_type: numbers.as_dict() for iou_type, numbers in metrics.items()},
    }
    assert "metrics" not in fourth
    assert fourth["losses"]["loss_mask"] == values[4]["loss_mask"]


def test_steps_that_are_not_finite_are_listed_and_no_part_of_means(tmp_path):
    with Records(tmp_path, LogConfig(), {}) as records:
        records.add([reading(1), reading(2, math.nan), reading(3, -math.inf)])
        mixed = records.write_train(1, 0.1, SPEED)
        records.add([reading(4, math.inf)])
        records.write_train(1, math.inf, SPEED)
        records.write_epoch(1, 0.1, 1.0)
    found = read(tmp_path)
    assert [record["kind"] for record in found] == ["skipped", "skipped", "train", "skipped", "train", "epoch"]
    assert found[0] == {
        "kind": "skipped",
        "step": 2,
        "losses": {"loss_mask": None, "loss_box_reg": reading(2).values["loss_box_reg"]},
        "grad_norm": reading(2).values["grad_norm"],
        "image_ids": [2, 3],
    }
    assert mixed["losses"] == {name: reading(1).values[name] for name in ("loss_mask", "loss_box_reg")}
    assert mixed["skipped"] == 2
    assert found[4]["losses"] == {"loss_mask": None, "loss_box_reg": None}
    assert found[4]["lr"] is None
    assert (found[4]["skipped"], found[5]["skipped"]) == (1, 3)
    assert found[5]["losses"] == mixed["losses"]


EVERY, PER_EPOCH, STEPS = 4, 7, 21


def train(folder, state, checkpoints, until):
    """A run as it goes on from `state` until it is killed: lines that a record depends on come before a checkpoint."""
    step = state["step"]
    saved = state
    with Records(folder, LogConfig(), {}, step) as records:
        if "records" in state:
            records.load_state_dict(state["records"])
        while step < until:
            epoch = step // PER_EPOCH + 1
            step += 1
            records.add([reading(step, math.nan if step % 5 == 0 else None)])
            if step % EVERY == 0:
                records.write_train(epoch, 1 / step, Speed(random.random(), random.random(), None))
            if step % PER_EPOCH == 0:
                records.write_epoch(epoch, 1 / step, random.random())
            if step in checkpoints:
                saved = json.loads(json.dumps({"step": step, "records": records.state_dict()}))
    return saved


def without_times(folder):
    times = ("images_per_second", "data_wait", "seconds")
    return [{name: value for name, value in record.items() if name not in times} for record in read(folder)]


@given(st.sets(st.integers(1, STEPS - 1), max_size=4), st.lists(st.integers(1, STEPS), max_size=3), st.integers(0, 60))
@example({EVERY}, [EVERY], 60)
def test_a_run_that_was_killed_and_resumed_has_the_records_of_one_that_was_not(
    tmp_path_factory, checkpoints, kills, cut
):
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "whole", {"step": 0}, (), STEPS)
    state = {"step": 0}
    for killed in sorted(kills):
        state = train(folder / "parts", state, checkpoints, killed)
        # Half a line more was on its way, or all of it but its end.
        with open(folder / "parts" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": "skipped", "step": 0, "image_ids": [1, 2]})[:cut])
    train(folder / "parts", state, checkpoints, STEPS)
    assert without_times(folder / "parts") == without_times(folder / "whole")


def test_an_epoch_whose_evaluation_was_interrupted_is_not_done(tmp_path):
    train(tmp_path, {"step": 0}, (), STEPS)
    before = [record for record in read(tmp_path) if record["step"] <= 2 * PER_EPOCH]
    assert (before[-1]["kind"], before[-1]["epoch"]) == ("epoch", 2)
    for epochs, kept in ((2, before), (1, before[:-1])):
        Records(tmp_path, LogConfig(), {}, 2 * PER_EPOCH, epochs).close()
        assert read(tmp_path) == kept


def test_a_new_run_replaces_the_records_of_an_older_one(tmp_path):
    train(tmp_path, {"step": 0}, (), STEPS)
    train(tmp_path, {"step": 0}, (), EVERY)
    assert [record["step"] for record in read(tmp_path)] == [EVERY]
    # Lines of another make have no step: nothing after them is taken for this run's.
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"step": 1}\n')
    Records(tmp_path, LogConfig(), {}, 5).close()
    assert read(tmp_path) == []


def test_records_are_whole_when_what_followed_them_cannot_be_removed(tmp_path, monkeypatch):
    train(tmp_path, {"step": 0}, (), STEPS)
    before = read(tmp_path)

    def fail(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            Records(tmp_path, LogConfig(), {}, 4)
    assert read(tmp_path) == before


def test_tags(metrics):
    record = {
        "kind": "train",
        "losses": {"loss_mask": 0.25, "loss_box_reg": 0.5, "distillation": 1.0},
        "lr": 0.1,
        "grad_norm": None,
        "skipped": 0,
        **SPEED._asdict(),
    }
    assert tags(record) == {
        "loss/mask": 0.25,
        "loss/box_reg": 0.5,
        "loss/distillation": 1.0,
        "loss/total": 1.75,
        "optimizer/lr": 0.1,
        "optimizer/skipped": 0,
        "speed/images_per_second": 12.5,
        "speed/data_wait": 0.25,
        "speed/peak_memory_mb": 512.0,
    }
    assert "loss/total" not in tags({**record, "losses": {"loss_mask": None}})
    epoch = {"kind": "epoch", "losses": {"loss_mask": 0.25}, "lr": 0.1, "grad_norm": 1.0, "skipped": 0, "seconds": 9.0}
    assert tags(epoch) == {"epoch_loss/mask": 0.25, "epoch_loss/total": 0.25, "speed/epoch_seconds": 9.0}
    found = tags({**epoch, "metrics": {"segm": {"AP": 0.5, "APs": -1.0, "AR100": 0.0}}})
    assert {tag: value for tag, value in found.items() if tag[:2] in ("ap", "ar")} == {
        "ap/segm/AP": 0.5,
        "ar/segm/AR100": 0.0,
    }
