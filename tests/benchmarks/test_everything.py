"""`python -m benchmarks`, as a user runs it, from its first part to its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.collected import collected
from benchmarks.measure import ROOT
from benchmarks.parts import Plan, parts
from benchmarks.runner import DONE, LEFT_OUT


def run(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--quick", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a quick run on a CPU, and what it printed."""
    output = tmp_path_factory.mktemp("quick")
    done = run(output)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((output / "logs").iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return output, done.stdout


def test_all_parts_run(everything: tuple[Path, str]) -> None:
    """Those that need a GPU say so, and each other one has written a result."""
    output, printed = everything
    known = json.loads((output / "run.json").read_text())["parts"]
    wanted = parts(Plan(False, True, output, nuclei=output / "shapes"))
    assert list(known) == [part.name for part in wanted]
    left_out = {name: found["says"] for name, found in known.items() if found["state"] != DONE}
    assert left_out == dict.fromkeys(("tests-memcheck", "tests-racecheck"), "needs a GPU of NVIDIA's")
    assert known["tests-memcheck"]["state"] == LEFT_OUT
    for part in wanted:
        if part.name in left_out:
            continue
        suffix = ".jsonl" if part.name == "tests-quick" else ".json"
        assert (output / f"{part.name}{suffix}").stat().st_size > 0, part.name
    assert f"{len(wanted) - 2} of {len(wanted)} parts are done, 2 left out" in printed
    assert sum(found["seconds"] for found in known.values()) < 600


def test_results(everything: tuple[Path, str]) -> None:
    output, printed = everything
    results = collected(output)
    assert results is not None
    assert not results.on_gpu
    assert f"torch {torch.__version__}" in results.device
    assert f"### {results.device}" in printed
    measured = {record["op"] for record in results.ops}
    assert measured >= {"roi_align forward", "roi_align backward", "roi_pool backward", "nms", "batched_nms", "rle"}
    assert len(results.detections) == len(results.steps) == len(results.runs) == 1
    assert results.evaluation is not None
    for text in ("roi_align backward, 1 x 100 RoIs", "fastmrcnn engine float32", "training on nuclei, 1 epochs"):
        assert text in printed
    assert "times faster than torchvision" in (output / "ops.svg").read_text()
    assert "fastmrcnn engine float32" in (output / "detection.svg").read_text()
    assert "mask AP" in (output / "runs-nuclei-float32.svg").read_text()
    assert list((output / "traces").glob("training-*.json.gz"))


def test_nothing_is_done_twice(everything: tuple[Path, str]) -> None:
    """Only the tables are printed, and what can be left out is tried again."""
    output, printed = everything
    before = (output / "ops-all.json").stat().st_mtime_ns
    again = run(output)
    assert again.returncode == 0
    assert "] ops-all" not in again.stdout
    assert "] tests-memcheck" in again.stdout
    assert (output / "ops-all.json").stat().st_mtime_ns == before
    assert again.stdout.partition("### ")[2] == printed.partition("### ")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "opps"], "--only opps: no such part; groups are tests, kernels, ops, detection"),
        (["--nuclei", "none/such"], "--nuclei none/such: no such folder"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], message: str) -> None:
    done = run(tmp_path, *options)
    assert done.returncode != 0
    assert message in done.stderr


def test_only_some(tmp_path: Path) -> None:
    """And a summary that says what is still to do."""
    listed = run(tmp_path, "--only", "tests-memcheck", "profile", "--list").stdout
    assert [line.split("|")[1:3] for line in listed.splitlines()[2:]] == [
        [" tests-memcheck      ", " to do "],
        [" profile-detection-1 ", " to do "],
        [" profile-training-1  ", " to do "],
    ]
    done = run(tmp_path, "--only", "tests-memcheck")
    assert "0 of 1 parts are done, 1 left out" in done.stdout
