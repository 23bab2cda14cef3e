"""What `python -m benchmarks` consists of, on machines that are not here, too."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_training, parts
from benchmarks.measure import ROOT
from benchmarks.parts import Part, Plan
from benchmarks.targets import TARGETS

PLANS = {
    "gpu": Plan(True, False, Path("out"), Path("photos"), Path("nuclei"), scratch=True),
    "cpu": Plan(False, False, Path("out"), None, Path("nuclei")),
    "quick gpu": Plan(True, True, Path("out"), None, Path("nuclei")),
    "quick cpu": Plan(False, True, Path("out"), None, Path("nuclei")),
}


class ParsedError(Exception):
    """A command line was understood."""


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_command_lines_are_understood(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    original = argparse.ArgumentParser.parse_args

    def parse_args(*args: Any) -> None:
        original(*args)
        raise ParsedError

    seen = set()
    for part in parts.parts(plan):
        if "pytest" in part.command:
            continue
        module, arguments = part.command[2], part.command[3:]
        seen.add(module)
        if module == "benchmarks.compare_training":
            found = compare_training.parse(arguments)
            assert found.resume == "auto"
            compare_training.refuse(found)
            continue
        main = importlib.import_module(module).main
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            patch.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(ParsedError):
                main()
    assert len(seen) == 10


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_names(plan: Plan) -> None:
    found = parts.parts(plan)
    assert len({part.name for part in found}) == len(found)
    assert list(dict.fromkeys(part.group for part in found)) == [
        "tests",
        "kernels",
        "ops",
        "detection",
        "evaluation",
        "training",
        "runs",
        "profile",
    ]


def test_every_test_is_in_a_part() -> None:
    covered = [ROOT / path for paths in parts.TESTS.values() for path in paths]
    assert all(path.exists() for path in covered)
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert sum(path == one or one in path.parents for one in covered) == 1, path
    assert (ROOT / parts.ITSELF).exists()


def test_every_operation_is_in_a_part() -> None:
    found = {part.name for part in parts.parts(PLANS["gpu"])}
    assert {f"ops-{path.stem[6:]}" for path in (ROOT / "benchmarks").glob("bench_*.py")} <= found


def test_what_is_missing_is_said() -> None:
    def missing(plan: Plan) -> dict[str, str]:
        return {part.name: part.missing for part in parts.parts(plan) if part.missing}

    on_cpu = missing(Plan(False, False, Path("out")))
    assert on_cpu["tests-memcheck"] == on_cpu["tests-racecheck"] == "needs a GPU of NVIDIA's"
    assert "--nuclei FOLDER" in on_cpu["runs-loader"]
    assert "--nuclei FOLDER" in on_cpu["runs-nuclei-float32"]


def test_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda name: f"/bin/{name}")
    found: dict[str, Part] = {part.name: part for part in parts.parts(PLANS["gpu"])}
    assert found["tests-racecheck"].missing is None
    assert found["tests-racecheck"].command[2:4] == ["benchmarks.sanitize", "racecheck"]
    monkeypatch.setattr(parts.shutil, "which", lambda name: None)
    found = {part.name: part for part in parts.parts(PLANS["gpu"])}
    assert "not on the PATH" in (found["tests-racecheck"].missing or "")


def test_targets_are_of_what_is_measured() -> None:
    """The cases that targets look for are those of the benchmarks."""
    from benchmarks import bench_detections, bench_masks, bench_proposals, bench_roi_align, targets

    assert set(targets.FORWARD) <= {str(case) for case in bench_roi_align.FORWARD}
    assert set(targets.BACKWARD) <= {str(case) for case in bench_roi_align.BACKWARD}
    assert set(targets.PROPOSALS) <= {str(case) for case in bench_proposals.CASES}
    assert set(targets.DETECTIONS) <= {str(case) for case in bench_detections.CASES}
    assert set(targets.MANY_MASKS) <= {str(case) for case in bench_masks.CASES}
    assert len({(target.what, target.against) for target in TARGETS}) == len(TARGETS)
