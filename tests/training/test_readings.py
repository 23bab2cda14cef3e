import contextlib
import json
import math
import multiprocessing
import re

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn.training.config import LogConfig
from fastmrcnn.training.progress import Progress, say
from fastmrcnn.training.readings import Reading, Readings, nonfinite
from fastmrcnn.training.records import Records
from fastmrcnn.training.speed import Speed, Speedometer

NAMES = ["loss_mask", "loss_box_reg", "grad_norm"]


def add(readings, step, *numbers, image_ids=(1, 2)):
    readings.add(step, dict(zip(NAMES, map(torch.tensor, numbers), strict=True)), image_ids)


def test_each_step_is_read_once_in_order():
    readings = Readings(NAMES, 3, "cpu")
    assert readings.begin()() == []
    add(readings, 7, 1.0, 2.0, 3.0, image_ids=[5])
    add(readings, 8, 4.0, 5.0, 6.0, image_ids=range(2))
    first = readings.begin()
    # Written into the same rows, before what was begun is waited for.
    add(readings, 9, 7.0, 8.0, 9.0)
    second = readings.begin()
    assert second() == [Reading(9, {"loss_mask": 7.0, "loss_box_reg": 8.0, "grad_norm": 9.0}, [1, 2])]
    assert first() == [
        Reading(7, {"loss_mask": 1.0, "loss_box_reg": 2.0, "grad_norm": 3.0}, [5]),
        Reading(8, {"loss_mask": 4.0, "loss_box_reg": 5.0, "grad_norm": 6.0}, [0, 1]),
    ]
    assert readings.begin()() == []


def test_scalars_may_be_of_any_dtype_and_order_and_part_of_a_graph():
    readings = Readings(NAMES, 2, "cpu")
    weight = torch.tensor(3.0, requires_grad=True)
    norm, flag = torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(True)
    readings.add(1, {"grad_norm": norm, "loss_box_reg": flag, "loss_mask": weight.double() * 2}, [])
    (reading,) = readings.begin()()
    assert list(reading.values.items()) == [("loss_mask", 6.0), ("loss_box_reg", 1.0), ("grad_norm", 0.5)]
    assert not readings._table.requires_grad


def test_values_that_are_not_finite():
    readings = Readings(NAMES, 4, "cpu")
    for step, value in enumerate((1.0, math.nan, math.inf, -math.inf)):
        add(readings, step, 1.0, value, 1.0, image_ids=[step])
    found = readings.begin()()
    assert [(reading.step, reading.image_ids) for reading in nonfinite(found)] == [(1, [1]), (2, [2]), (3, [3])]
    assert math.isnan(found[1].values["loss_box_reg"])
    assert found[3].values["loss_box_reg"] == -math.inf
    assert [reading.finite for reading in found] == [True, False, False, False]


def test_what_does_not_fit_is_refused_and_changes_nothing():
    readings = Readings(NAMES, 1, "cpu")
    one = torch.tensor(1.0)
    for wrong in ({"loss_mask": one}, dict.fromkeys([*NAMES, "loss_keypoint"], one)):
        with pytest.raises(ValueError, match=r"names \['loss_mask', 'loss_box_reg', 'grad_norm'\]"):
            readings.add(1, wrong, [])
    add(readings, 1, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"step 2.* full with 1 steps, begin\(\)"):
        add(readings, 2, 2.0, 2.0, 2.0)
    assert [reading.step for reading in readings.begin()()] == [1]


def test_no_synchronisation():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        readings = Readings(NAMES, 2, "cuda")
        for step in range(2):
            readings.add(step, {name: torch.rand(()) for name in NAMES}, [step])
        finish = readings.begin()
        assert readings._table.device.type == "cuda"
    assert callable(finish)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for_and_read_right():
    readings = Readings(NAMES, 4, "cuda")
    values = [{name: torch.rand((), device="cuda") for name in NAMES} for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            readings.add(step, values[step], [])
        finish = readings.begin()
        add_later = {name: torch.zeros((), device="cuda") for name in NAMES}
        readings.add(4, add_later, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [reading.values for reading in finish()] == [
        {name: value.item() for name, value in step.items()} for step in values
    ]


# Step, values of the two processes by name, and the processes whose images are to be named.
NAN, INF = math.nan, math.inf
CASES = [
    ((1.0, 2.0, 3.0), (3.0, 6.0, 3.0), []),
    ((1.0, NAN, NAN), (3.0, 6.0, NAN), [0]),
    ((1.0, 2.0, INF), (3.0, INF, INF), [1]),
    ((INF, 2.0, NAN), (-INF, 6.0, NAN), [0, 1]),
    ((1.0, 2.0, INF), (3.0, 6.0, INF), [0, 1]),
    ((0.5, 0.5, 0.5), (1.0, 1.0, 0.5), []),
]


def one_of_two(folder, rank):
    """What each of two processes does; rank 0 alone writes and speaks."""
    with (
        open(folder / f"out{rank}", "w") as out,
        open(folder / f"err{rank}", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        readings = Readings(NAMES, len(CASES), "cpu")
        assert readings.begin()() == []
        for step, case in enumerate(CASES):
            add(readings, step, *case[rank], image_ids=[10 * step + rank])
        found = readings.begin()()
        speedometer = Speedometer("cpu")
        speedometer.count(3)
        with Records(folder / f"run{rank}", LogConfig(), {}) as records, Progress("epoch 1/1", 6) as progress:
            records.add(found)
            progress.update(6)
            progress.show(records.write_train(1, 0.1, Speed(4.0, 0.5, None)))
            say("a message")
            records.write_epoch(1, 0.1, 2.0)
        (folder / f"{rank}.json").write_text(json.dumps([found, speedometer._images]))
        dist.destroy_process_group()


def test_two_processes_read_their_mean_and_name_the_culprits(tmp_path):
    fork = multiprocessing.get_context("fork")  # imports take far longer than the test
    processes = [fork.Process(target=one_of_two, args=(tmp_path, rank), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"err{rank}").read_text()
    for rank in range(2):
        found, images = json.loads((tmp_path / f"{rank}.json").read_text())
        assert images == 6  # of both
        for step, (reading, (first, second, culprits)) in enumerate(zip(found, CASES, strict=True)):
            means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
            assert reading[:2] == [step, pytest.approx(dict(zip(NAMES, means, strict=True)), nan_ok=True)]
            assert reading[2] == [10 * step + i for i in culprits] or (
                not culprits and reading[2] == [10 * step + rank]
            )
    records = [json.loads(line) for line in (tmp_path / "run0" / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["skipped"] * 4 + ["train", "epoch"]
    assert [record["image_ids"] for record in records[:4]] == [[10], [21], [30, 31], [40, 41]]
    assert records[4]["losses"] == {"loss_mask": 1.375, "loss_box_reg": 2.375}
    assert not (tmp_path / "run1").exists()
    assert (tmp_path / "out0").read_text() == "a message\n"
    assert re.fullmatch(r"epoch 1/1 step 6/6 .*\n", (tmp_path / "err0").read_text())
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
