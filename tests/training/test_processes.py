"""Training by several processes, one of which dies and is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, losses, records, shapes

from fastmrcnn.checkpoints import load_checkpoint
from fastmrcnn.data import Shapes
from fastmrcnn.distributed import rank
from fastmrcnn.train import train
from fastmrcnn.training.config import LogConfig, OptimConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 12


def options(run: Path, *, batch_size: int, accumulate: int) -> TrainConfig:
    """Four images a step, of a network whose norms do not look at other images."""
    optim = OptimConfig(lr=0.002, lr_batch=4, warmup_steps=2, milestones=[5], accumulate=accumulate)
    chosen = config(run, batch_size=batch_size, optim=optim, log=LogConfig(every=1), checkpoint_every=1)
    chosen.model.norm, chosen.data.aspect_groups = "group", 0
    chosen.resume = "auto"
    return chosen


class Deadly(Shapes):
    """Shapes that end the process that asks for the tenth image, once; only where a file says so."""

    def __init__(self, flag: Path) -> None:
        super().__init__(IMAGES, image_size=(64, 64))
        self.flag, self.asked = flag, 0

    def __getitem__(self, i: int) -> Any:
        self.asked += 1
        if self.asked == 10 and rank() == 1 and self.flag.exists():
            self.flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def main(run: Path) -> None:
    """What each process does; `Deadly` needs to know its rank, so the group is joined inside `train`."""
    torch.set_num_threads(1)
    train(options(run, batch_size=2, accumulate=1), Deadly(run / "deadly"), shapes(3, seed=1))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes of which the second is killed in the second epoch."""
    run = tmp_path_factory.mktemp("several")
    (run / "deadly").touch()
    places = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(run)],
        env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (run / "deadly").exists(), "nothing was killed"
    assert done.stdout.count("going on from") == 1, done.stdout
    return run


def test_two_processes_are_one_that_accumulates(several: Path, tmp_path: Path) -> None:
    """The same batches, random numbers and gradients, but for the order of additions."""
    train(options(tmp_path, batch_size=2, accumulate=2), shapes(IMAGES), shapes(3, seed=1))
    assert [step for step, _ in losses(several)] == list(range(1, 7))
    for (_, found), (step, expected) in zip(losses(several), losses(tmp_path), strict=True):
        assert found == pytest.approx(expected, rel=1e-3), step
    weights, expected_weights = (load_checkpoint(run / "last.pt")["model"] for run in (several, tmp_path))
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-3, msg=name)
    for found, expected in zip(records(several, "epoch"), records(tmp_path, "epoch"), strict=True):
        assert set(found["metrics"]) == {"bbox", "segm"} == set(expected["metrics"])


def test_two_processes_are_one_with_twice_the_batch(several: Path, tmp_path: Path) -> None:
    """But for chance, which anchors and proposals are drawn, and for the loss being the mean of two means."""
    train(options(tmp_path, batch_size=4, accumulate=1), shapes(IMAGES), shapes(3, seed=1))
    found, expected = ([sum(values.values()) for _, values in losses(run)] for run in (several, tmp_path))
    assert found == pytest.approx(expected, rel=0.1)
    assert expected[-1] < 0.9 * expected[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
