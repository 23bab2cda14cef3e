"""Where the time of a training step goes, ours and torchvision's in turn, with the same weights and images.

    python -m benchmarks.training                                # Mask R-CNN R50-FPN
    python -m benchmarks.training --batch 1 --size 240 320 --small --json result.json

Reports the p20, p50 and p80 of the time that each stage took, and of the ratio of whole steps, pair by pair: where the
speed of a machine drifts the ratio holds.  Beside them, what a step asks of the device: operations dispatched by
PyTorch, views left out, and values read; on a GPU kernels launched and waits for it; and the most memory that a step
has beyond what is there before, such as weights.  Who learns anything else, see `benchmarks.training_steps`, has no
times, and the run fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.inputs import PHOTO
from benchmarks.inputs import SMALL as SMALL_PHOTO
from benchmarks.measure import PERCENTILES, conditions, demands, device_name, percentiles
from benchmarks.report import markdown
from benchmarks.training_steps import (
    CONTENDERS,
    Contender,
    Ours,
    Run,
    assert_learns_the_same,
    dataset,
    detector,
    expected,
    run_of,
)
from fastmrcnn.files import write_json

STAGES = ["data", "preprocess", "features", "RPN", "RoI heads", "backward", "optimizer"]
"""Collating and copying; resizing and padding; the backbone; proposals and their losses; the second stage and its
losses; gradients; the update of the weights."""


class Laps:
    """Where the time of a step goes: a stage has that from the end of the one before until its own."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin a step."""
        self.marks = []
        self.end("start")

    def end(self, stage: str) -> None:
        """Note that a stage, or a part of one, was done; on a GPU that its kernels were."""
        if device_name() == "cpu":
            self.marks.append((stage, time.perf_counter()))
            return
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self.marks.append((stage, mark))

    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        if device_name() == "cuda":
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (_, first), (stage, last) in zip(self.marks[:-1], self.marks[1:], strict=True):
            total[stage] += last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3
        return dict(total)


def watched(run: Run, laps: Laps) -> Callable[[], dict[str, float]]:
    """A step of `run` from samples to new weights, which returns the seconds of its stages."""

    def ends(owner: Any, method: str, stage: str, *, before: bool = False) -> None:
        call = getattr(owner, method)

        def noting(*args: Any, **kwargs: Any) -> Any:
            if before:
                laps.end(stage)
            result = call(*args, **kwargs)
            if not before:
                laps.end(stage)
            return result

        setattr(owner, method, noting)

    model = run.model
    ends(model.backbone, "forward", "features")
    ends(run.learner.scaler, "unscale_", "backward", before=True)
    if isinstance(run, Ours):
        ends(model.transform, "load", "preprocess")
        ends(model.rpn, "propose", "RPN")
        ends(model.rpn, "losses", "RPN")
        ends(model.roi_heads, "losses", "RoI heads")
    else:
        ends(model.transform, "forward", "preprocess")
        ends(model.rpn, "forward", "RPN")
        ends(model.roi_heads, "forward", "RoI heads")

    def step() -> dict[str, float]:
        laps.start()
        batch = run.load()
        laps.end("data")
        run.step(batch)
        laps.end("optimizer")
        return laps.seconds()

    return step


def in_turn(steps: dict[str, Callable[[], dict[str, float]]], rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Seconds of the stages of each of `steps`, which are run in turn, and in reverse every other round."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in steps}
    for i in range(-warm_up, rounds):
        for name in list(steps) if i % 2 == 0 else list(reversed(steps)):
            seconds = steps[name]()
            assert sorted(seconds) == sorted(STAGES), f"{name} has no {set(STAGES) - set(seconds)}"
            if i >= 0:
                for stage in STAGES:
                    found[name][stage].append(seconds[stage])
                found[name]["step"].append(sum(seconds.values()))
    return found


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes of tensors at most at a time that `call`, which ran before, adds to what is there before it.

    On a CPU those that PyTorch's allocator counts: what a library of convolutions has for itself is not among them.
    """
    if device_name() == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    used = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        used += event["args"]["Bytes"]
        most = max(most, used)
    return most


def measured(batch: int, size: tuple[int, int], *, small: bool, rounds: int) -> dict[str, Any]:
    """Times and demands of a step of `batch` images by everyone, checked before."""
    contenders = [x for x in CONTENDERS if device_name() == "cuda" or x.precision == "float32"]
    data = dataset(batch, size)
    model = detector([data[i][0] for i in range(batch)], small=small)
    wanted = {precision: expected(model, data, precision) for precision in {x.precision for x in contenders}}
    runs, wrong = {}, {}
    for x in contenders:
        run = run_of(x, model, data)
        try:
            assert_learns_the_same(run, wanted[x.precision])
        except AssertionError as error:
            wrong[x] = str(error)
        else:
            runs[x] = run
    asked = {x: demands(lambda run=run: run.step(run.load())) for x, run in runs.items()}
    memory = {x: peak_memory(lambda run=run: run.step(run.load())) for x, run in runs.items()}
    times = in_turn({str(x): watched(run, Laps()) for x, run in runs.items()}, rounds)
    described: dict[str, Any] = {
        str(x): {
            "role": x.role,
            "stages": {stage: percentiles(seconds) for stage, seconds in times[str(x)].items()},
            **asked[x],
            "peak_memory": memory[x],
        }
        for x in runs
    }
    described |= {str(x): {"role": x.role, "error": error} for x, error in wrong.items()}
    name = f"maskrcnn_resnet{18 if small else 50}_fpn"
    return {"model": name, "batch": batch, "size": size, "contenders": described, "speedup": speedup(list(runs), times)}


def speedup(contenders: Sequence[Contender], times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Percentiles of the time of each of torchvision's steps over that of each of ours in the same round."""
    found = {}
    for ours in (str(x) for x in contenders if x.role == "ours"):
        for theirs in (str(x) for x in contenders if x.role != "ours"):
            ratio = torch.tensor(times[theirs]["step"]) / torch.tensor(times[ours]["step"])
            values = {f"p{p}": round(torch.quantile(ratio, p / 100).item(), 3) for p in PERCENTILES}
            found[f"{ours} over {theirs}"] = values
    return found


def table(case: dict[str, Any]) -> str:
    """Milliseconds by stage, p20 / p50 / p80, and what was asked of the device, in Markdown."""
    contenders = {name: found for name, found in case["contenders"].items() if "error" not in found}
    rows = []
    for stage in [*STAGES, "step"]:
        times = [found["stages"][stage] for found in contenders.values()]
        rows.append([stage, *(" / ".join(f"{found[f'p{p}_us'] / 1e3:,.1f}" for p in PERCENTILES) for found in times)])
    for key in ("operations", "reads", "launches", "waits"):
        counts = [found.get(key) for found in contenders.values()]
        if None not in counts:
            rows.append([key, *(f"{count:,}" for count in counts)])
    rows.append(["peak memory, MiB", *(f"{found['peak_memory'] / 2**20:,.0f}" for found in contenders.values())])
    height, width = case["size"]
    header = [f"{case['model']}, {case['batch']} x {height}x{width}, ms", *contenders]
    ratios = [
        f"{name}: {' / '.join(f'{value:.2f}x' for value in found.values())}" for name, found in case["speedup"].items()
    ]
    wrong = [f"{name}: {found['error']}" for name, found in case["contenders"].items() if "error" in found]
    return "\n".join([markdown(header, rows), "", *ratios, *wrong, ""])


def main() -> None:
    """Run the benchmark of the command line."""
    size, batches = (PHOTO, [1, 2, 8]) if torch.cuda.is_available() else (SMALL_PHOTO, [1, 2])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=batches, help="images per step")
    parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"), help="of the images")
    parser.add_argument("--small", action="store_true", help="ResNet-18 instead of ResNet-50")
    parser.add_argument("--rounds", type=int, default=10, help="counted steps of each")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()

    cases = []
    for batch in options.batch:
        cases.append(measured(batch, tuple(options.size), small=options.small, rounds=options.rounds))
        print(table(cases[-1]), flush=True)
    if options.json:
        write_json(options.json, {"cases": cases, "conditions": conditions()})
    if wrong := [name for case in cases for name, found in case["contenders"].items() if "error" in found]:
        raise SystemExit(f"{', '.join(wrong)}: something else is learned")


if __name__ == "__main__":
    main()
