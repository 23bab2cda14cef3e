"""What `python -m benchmarks` consists of: each part a program of its own, with a file for its result."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import ROOT
from benchmarks.sanitize import SANITIZER, TOOLS

PYTHON = [sys.executable, "-m"]
OPERATIONS = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
TESTS = {
    "kernels": ["tests/kernels"],
    "models": ["tests/models", "tests/engine", "tests/checkpoints"],
    "training": ["tests/training", "tests/data"],
    "rest": ["tests/benchmarks", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))],
}
QUICK_TESTS = ["tests/kernels/test_canvases.py", "tests/kernels/test_boxes.py"]
ITSELF = "tests/benchmarks/test_everything.py"
COMPARED = "tests/benchmarks/test_tables.py::test_readme_shows_what_was_measured"
"""With results that are being written here."""


class Plan(NamedTuple):
    """What is measured, and with what.

    Args:
        on_gpu: the device is one.
        quick: whether only to see that everything runs.
        output: folder of the results.
        images: folder of photos to detect in; generated images otherwise.
        nuclei: folder of nuclei, laid out as the README says.
        scratch: train from random weights, where none can be downloaded.
    """

    on_gpu: bool
    quick: bool
    output: Path
    images: Path | None = None
    nuclei: Path | None = None
    scratch: bool = False


@dataclass(frozen=True)
class Part:
    """A program to run.

    Args:
        name: of the part, and of its files; what comes before the first dash is its group.
        command: and its arguments.
        missing: why it cannot run here; None if it can.
        goes_on: run once more, it goes on from where it was stopped.
        environment: of the program, beside that of this process.
        kept: its result, without a suffix, if it is not NAME.json: .json and .svg are copied when it is done.
        some_counts: the result of a part that failed is that of its cases that did not.
    """

    name: str
    command: list[str]
    missing: str | None = None
    goes_on: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    kept: Path | None = None
    some_counts: bool = False

    @property
    def group(self) -> str:
        """Of parts that belong together."""
        return self.name.partition("-")[0]


def parts(plan: Plan) -> list[Part]:
    """All of them, in order: what is wrong is known before anything is measured."""
    return [
        *tests(plan),
        *kernels(plan),
        *operations(plan),
        *detections(plan),
        *steps(plan),
        *runs(plan),
        *profiles(plan),
    ]


def tests(plan: Plan) -> Iterator[Part]:
    """The test suite, what it does not see on a CPU, and operations repeated."""
    wanted = [name for name in ("pytest", "xdist", "hypothesis") if find_spec(name) is None]
    missing = f"{', '.join(wanted)} not installed: pip install -e '.[test]'" if wanted else None
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if not plan.quick else []
    for name, paths in {"quick": QUICK_TESTS}.items() if plan.quick else TESTS.items():
        outcomes = plan.output / f"tests-{name}.jsonl"
        options = ["-q", "-p", "benchmarks.outcomes", "--outcomes", str(outcomes), "--ignore", ITSELF, *workers]
        options += ["--deselect", COMPARED]
        environment = {"OMP_NUM_THREADS": "1"}
        command = [*PYTHON, "pytest", *options, *paths]
        yield Part(f"tests-{name}", command, missing, goes_on=True, environment=environment)
    if not plan.on_gpu:
        missing = "needs a GPU of NVIDIA's"
    elif shutil.which(SANITIZER) is None:
        missing = f"{SANITIZER}, of NVIDIA's toolkit, is not on the PATH"
    for tool in TOOLS:
        outcomes = plan.output / f"tests-{tool}.jsonl"
        command = [*PYTHON, "benchmarks.sanitize", tool, "--outcomes", str(outcomes)]
        yield Part(f"tests-{tool}", command, missing, goes_on=True)
    yield Part("tests-repeats", module("repeats", plan, "tests-repeats", *(["--times", "2"] if plan.quick else [])))


def kernels(plan: Plan) -> Iterator[Part]:
    """What they compile to; and the blocks that they could have."""
    missing = None if find_spec("triton") else "triton is not installed"
    quick = ["--targets", "sm_90", "--only", "canvases float32"] if plan.quick else []
    yield Part("kernels-compiled", module("compile_report", plan, "kernels-compiled", *quick), missing)
    tuning = module("tune_roi_align", plan, "kernels-roi_align", *(["--quick"] if plan.quick else []))
    yield Part("kernels-roi_align", tuning, missing)


def operations(plan: Plan) -> Iterator[Part]:
    """Those of `ops` beside torchvision's; all at once if it has to be quick, since starting takes longer."""
    missing = None if find_spec("pytest_benchmark") else "pytest-benchmark is not installed: pip install -e '.[bench]'"
    for name, files in {"all": OPERATIONS}.items() if plan.quick else {name: [name] for name in OPERATIONS}.items():
        paths = [f"benchmarks/bench_{file}.py" for file in files]
        kept = plan.output / "logs" / f"ops-{name}"  # where pytest makes an empty file first
        options = [f"--benchmark-json={kept}.json", *(["--quick"] if plan.quick else [])]
        command = [*PYTHON, "pytest", "-q", *options, *paths]
        yield Part(f"ops-{name}", command, missing, kept=kept, some_counts=True)


def detections(plan: Plan) -> Iterator[Part]:
    """Whole detections, from torchvision's to ours step by step; and evaluation."""
    photos = ["--images", str(plan.images)] if plan.images else []
    if plan.quick:
        cases = {"quick": ["--size", "96x128", "--batch", "2", "--masks", "rle", "--small", "--pairs", "1"]}
    elif plan.on_gpu:
        cases = {
            f"{size}-{batch}-{masks}": ["--size", size, "--batch", str(batch), "--masks", masks]
            for size, batch in (("480x640", 1), ("800x1333", 1), ("800x1333", 2), ("800x1333", 8), ("mixed", 8))
            for masks in ("none", "bool", "rle")
        }
    else:
        cases = {f"480x640-1-{masks}": ["--masks", masks] for masks in ("none", "soft", "rle")}
    for name, options in cases.items():
        yield Part(f"detection-{name}", module("end_to_end", plan, f"detection-{name}", *photos, *options))
    count = ["--images", "2", "--pairs", "1"] if plan.quick else []
    yield Part("evaluation", module("evaluation", plan, "evaluation", *count))


def steps(plan: Plan) -> Iterator[Part]:
    """A step of training."""
    if plan.quick:
        cases = {"quick": ["--batch", "1", "--size", "64", "80", "--small", "--rounds", "1"]}
    elif plan.on_gpu:
        cases = {f"800x1333-{batch}": ["--batch", str(batch)] for batch in (1, 2, 8, 16)}
    else:
        small = ["--size", "240", "320", "--rounds", "5"]
        cases = {f"240x320-{batch}": ["--batch", str(batch), *small] for batch in (1, 2)}
    for name, options in cases.items():
        program = module("training", plan, f"training-{name}", *options)
        yield Part(f"training-{name}", program, some_counts=True)


def runs(plan: Plan) -> Iterator[Part]:
    """Loading, and whole runs of training, of nuclei; if it has to be quick, of generated shapes."""
    missing = None
    if plan.nuclei is None:
        missing = "no data: --nuclei FOLDER, laid out as the README says, or data/nuclei"
    nuclei, mini = plan.nuclei or Path("data/nuclei"), "" if plan.on_gpu else "_mini"
    train, val = (nuclei / "annotations" / f"instances_{split}{mini}.json" for split in ("train", "val"))
    workers = ["--workers", "0"] if plan.quick else []
    pairs = ["--pairs", "1", "--batch", "2"] if plan.quick else []
    data = ["--images", str(nuclei / "train"), "--annotations", str(train), *workers, *pairs]
    yield Part("runs-loader", module("loader", plan, "runs-loader", *data), missing)
    for precision in ("bfloat16", "float32") if plan.on_gpu else ("float32",):
        name = f"runs-nuclei-{precision}"
        options = ["--data.train_images", str(nuclei / "train"), "--data.train_annotations", str(train)]
        options += ["--data.val_images", str(nuclei / "val"), "--data.val_annotations", str(val)]
        folder = plan.output / "runs" / name
        options += ["--precision", precision, "--output", str(folder), "--resume", "auto"]
        if plan.on_gpu:
            options += ["--model.weights", "null", "--model.weights_backbone", "null"] if plan.scratch else []
        else:
            options += ["--epochs", "10", "--optim.milestones", "[7, 9]"]
        if plan.quick:
            options += ["--model.min_size", "64", "--model.max_size", "64", "--model.proposals", "50"]
            options += ["--model.box_samples", "16", "--epochs", "1", "--batch_size", "2"]
        config = "configs/nuclei.yaml" if plan.on_gpu else "configs/nuclei_small.yaml"
        command = [*PYTHON, "benchmarks.compare_training", "--config", config, *options]
        yield Part(name, command, missing, goes_on=True, kept=folder / "comparison")


def profiles(plan: Plan) -> Iterator[Part]:
    """Where the time goes."""
    traces = ["--traces", str(plan.output / "traces")]
    for what, batch in (
        (("detection", 1), ("detection", 8), ("training", 8)) if plan.on_gpu else (("detection", 1), ("training", 1))
    ):
        name = f"profile-{what}-{batch}"
        small = ["--small", "--size", "64x80"] if plan.quick else []
        yield Part(name, module("profiling", plan, name, what, "--batch", str(batch), *traces, *small))


def module(name: str, plan: Plan, part: str, *arguments: str) -> list[str]:
    """A program of this package, which writes its result for `part`."""
    return [*PYTHON, f"benchmarks.{name}", *arguments, "--json", str(plan.output / f"{part}.json")]
