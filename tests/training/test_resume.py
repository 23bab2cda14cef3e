"""A run that is interrupted, by whatever, and continued equals one that was not: to the bit."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, config, losses, records, shapes

from fastmrcnn.checkpoints import load_checkpoint
from fastmrcnn.data import Shapes
from fastmrcnn.train import train
from fastmrcnn.training.config import AugmentConfig, LogConfig, OptimConfig
from fastmrcnn.training.failures import EXIT_STATUS

AUGMENT = AugmentConfig(flip=0.5, min_sizes=[48, 64], colour=0.5, copy_paste=0.5)
OPTIONS: dict[str, Any] = {
    "augment": AUGMENT,
    "optim": OptimConfig(lr=0.01, lr_batch=0, warmup_steps=2, milestones=[5], ema=0.9, clip_norm=5.0),
    "log": LogConfig(every=2),
    "epochs": 2,
    "checkpoint_every": 1,
}
IMAGES = 6  # three steps an epoch: readings and epochs do not coincide


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole")
    train(config(run, **OPTIONS), shapes(IMAGES), shapes(2, seed=1))
    return run


class Interrupted(Shapes):
    """Shapes; when item number `at` is asked for, `event` happens first."""

    def __init__(self, at: int, event: Any) -> None:
        super().__init__(IMAGES, image_size=(64, 64))
        self.left, self.event = at, event

    def __getitem__(self, i: int) -> Any:
        self.left -= 1
        if self.left == 0:
            self.event()
        return super().__getitem__(i)


def go_on(run: Path, **changes: Any) -> None:
    train(config(run, **OPTIONS, resume="auto", **changes), shapes(IMAGES), shapes(2, seed=1))


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from runs import config, shapes
from test_resume import IMAGES, OPTIONS
from fastmrcnn.train import train

torch.set_num_threads(int(sys.argv[2]))
save, calls = torch.save, 0

def die_half_way(content, file):
    global calls
    calls += 1
    save(content, file)
    if calls == 6:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = die_half_way
train(config(Path(sys.argv[1]), **OPTIONS), shapes(IMAGES), shapes(2, seed=1))
"""


def test_killed_while_a_checkpoint_is_written(whole: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = [step for step, _ in losses(tmp_path)]
    assert load_checkpoint(tmp_path / "last.pt")["training"]["progressed"]["step"] < 6
    assert steps, "it died before it had written anything"
    go_on(tmp_path)
    assert_same_run(whole, tmp_path)


def test_an_error_in_the_middle_of_an_epoch(whole: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, **OPTIONS), Interrupted(9, fail), shapes(2, seed=1))
    go_on(tmp_path)
    assert_same_run(whole, tmp_path)


def test_termination_checkpoints_and_ends(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sparse = OPTIONS | {"checkpoint_every": None}
    data = Interrupted(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(config(tmp_path, **sparse), data, shapes(2, seed=1))
    assert ended.value.code == EXIT_STATUS == 143
    stopped_at = load_checkpoint(tmp_path / "last.pt")["training"]["progressed"]["step"]
    assert 1 < stopped_at < 6
    assert f"of step {stopped_at}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    train(config(tmp_path, **sparse, resume="auto"), shapes(IMAGES), shapes(2, seed=1))
    assert_same_run(whole, tmp_path)


def test_termination_while_it_is_measured(whole: Path, tmp_path: Path) -> None:
    """Nothing is lost, so nothing is waited for."""
    measured = Interrupted(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(config(tmp_path, **OPTIONS | {"checkpoint_every": None}), shapes(IMAGES), measured)
    assert load_checkpoint(tmp_path / "last.pt")["training"]["progressed"]["step"] == 3
    assert not records(tmp_path, "epoch")
    go_on(tmp_path)
    assert_same_run(whole, tmp_path)


def test_loading_in_other_processes_changes_nothing(whole: Path, tmp_path: Path) -> None:
    parallel = config(tmp_path, **OPTIONS)
    parallel.data.workers = 2
    train(parallel, shapes(IMAGES), shapes(2, seed=1))
    assert_same_run(whole, tmp_path)


def test_full_disk(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes beyond a size limit fail as those to a full disk do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))

    try:
        with pytest.raises(OSError, match=r"best\.pt could not be written: the disk may be full"):
            train(config(tmp_path, **OPTIONS), Interrupted(5, fill), shapes(2, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "stays as it was, training goes on" in capsys.readouterr().err
    assert 1 <= load_checkpoint(tmp_path / "last.pt")["training"]["progressed"]["step"] < 6
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".pt" and path.name.startswith(".")]
    go_on(tmp_path)
    assert_same_run(whole, tmp_path)


def test_resume_needs_a_state_of_training(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no state of training; last\.pt"):
        train(config(tmp_path, resume=str(whole / "best.pt")), shapes())


def test_resume_of_another_run(whole: Path, tmp_path: Path) -> None:
    last = str(whole / "last.pt")
    with pytest.raises(ValueError, match=r"images per step 2, this one has 4: .*accumulate"):
        train(config(tmp_path, **OPTIONS | {"batch_size": 4}, resume=last), shapes(IMAGES))
    other = config(tmp_path, **OPTIONS, resume=last)
    other.model.anchor_sizes = [16, 32, 64, 128, 256]
    with pytest.raises(ValueError, match="another network"):
        train(other, shapes(IMAGES))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        train(config(tmp_path, resume=str(tmp_path / "nowhere.pt")), shapes())


def test_a_finished_run_has_nothing_left_to_do(whole: Path) -> None:
    content = (whole / "metrics.jsonl").read_text()
    go_on(whole)
    assert (whole / "metrics.jsonl").read_text() == content
    assert [record["epoch"] for record in records(whole, "epoch")] == [1, 2]
