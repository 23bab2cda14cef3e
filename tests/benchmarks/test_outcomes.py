"""The plugin that lets a run of tests go on where it was cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import outcomes
from benchmarks.measure import ROOT

TESTS = """
import pathlib
import pytest

def test_passes():
    pass

def test_skipped():
    pytest.skip("why not")

def test_fails():
    assert pathlib.Path("mended").exists()

@pytest.fixture
def breaks():
    yield
    assert pathlib.Path("mended").exists()

def test_fails_at_its_end(breaks):
    pass
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_some.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", "--outcomes", "outcomes.jsonl", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "two"])
def test_only_what_is_not_done_is_run_again(tmp_path: Path, options: list[str]) -> None:
    first = run(tmp_path, *options)
    assert "1 failed, 2 passed, 1 skipped, 1 error" in first.stdout
    assert len((tmp_path / "outcomes.jsonl").read_text().splitlines()) == 4  # one process writes
    found = outcomes.summary(tmp_path / "outcomes.jsonl")
    assert found.counts == {"passed": 1, "skipped": 1, "failed": 2}
    assert sorted(found.failed) == ["test_some.py::test_fails", "test_some.py::test_fails_at_its_end"]
    (tmp_path / "mended").touch()
    second = run(tmp_path, *options)
    assert "2 passed" in second.stdout
    assert "skipped" not in second.stdout
    assert second.returncode == 0
    assert str(outcomes.summary(tmp_path / "outcomes.jsonl")) == "3 passed, 1 skipped"
    third = run(tmp_path, *options)
    assert third.returncode == 0, third.stdout


def test_no_tests_at_all_are_a_failure(tmp_path: Path) -> None:
    assert run(tmp_path, "-k", "nothing").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    file.write_text('["a", "failed"]\n["b", "passed"]\n["a", "pas')
    assert outcomes.read(file) == {"a": "failed", "b": "passed"}
    assert str(outcomes.summary(file)) == "1 failed, 1 passed (a)"
    assert outcomes.read(tmp_path / "none") == {}
