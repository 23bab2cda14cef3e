"""Results of a device, from the files that `python -m benchmarks` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Record, load

SUITE = "ops"
FILES = ("detection", "evaluation", "training", "runs-nuclei")
"""What names of files begin with: of pytest's suite; and of programs that write their own."""


@dataclass(frozen=True)
class Results:
    """What was measured on a device.

    Args:
        device: its name, and what else the numbers depend on, in a line.
        on_gpu: whether it is one.
        ops: records of operations.
        detections: cases of whole detections.
        evaluation: of a data set, if that was measured.
        steps: cases of steps of training.
        runs: whole runs of training, by precision.
    """

    device: str
    on_gpu: bool
    ops: list[Record] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def detection(self, size: str, batch: int, masks: str) -> dict[str, Any] | None:
        """Of each way to detect, if such a case was measured."""
        wanted = (size, batch, masks)
        found = (case for case in self.detections if (case["size"], case["batch"], case["masks"]) == wanted)
        return next((case["contenders"] for case in found), None)

    def step(self, batch: int) -> dict[str, Any] | None:
        """Of everyone who takes a step with so many images, if that was measured."""
        return next((case["contenders"] for case in self.steps if case["batch"] == batch), None)


def collected(folder: Path) -> Results | None:
    """All that is in `folder`; None if there is nothing.

    Raises:
        ValueError: its files are of several devices, or versions.
    """
    suites = [load(path) for path in sorted(folder.glob(f"{SUITE}-*.json"))]
    others = {
        kind: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}*.json"))}
        for kind in FILES
    }
    conditions = [found for found, _ in suites]
    conditions += [content["conditions"] for files in others.values() for content in files.values()]
    if not conditions:
        return None
    differing = {
        name: sorted({str(found[name]) for found in conditions}) for name in ("torch", "torchvision", "triton")
    }
    differing["device"] = sorted({bare(found["device"]) for found in conditions})
    if several := {name: values for name, values in differing.items() if len(values) > 1}:
        raise ValueError(f"{folder} has results of several devices or versions: {several}")
    known = max(conditions, key=lambda found: len(found["device"]))  # pytest's also names the CPU
    dates = sorted({found["date"] for found in conditions})
    said = [known["device"], *(f"{name} {known[name]}" for name in ("torch", "torchvision", "triton") if known[name])]
    return Results(
        device=", ".join([*said, " to ".join(dict.fromkeys((dates[0], dates[-1])))]),
        on_gpu=bool(known["cuda"] or known["hip"]),
        ops=[record for _, records in suites for record in records],
        detections=[case for content in others["detection"].values() for case in content["cases"]],
        evaluation=others["evaluation"].get("evaluation"),
        steps=[case for content in others["training"].values() for case in content["cases"]],
        runs={name.rpartition("-")[2]: content for name, content in others["runs-nuclei"].items()},
    )


def bare(device: str) -> str:
    """The name of a device without that of its model, which not all files have."""
    return device.split(" of ")[0]
