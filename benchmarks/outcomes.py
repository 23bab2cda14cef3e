"""A plugin of pytest: outcomes are written down as they come, so that a run that was cut off can go on.

    pytest -p benchmarks.outcomes --outcomes FILE

FILE has a line of JSON for each test; those that it says have passed, or were skipped, are not run again.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Outcomes(NamedTuple):
    """What is known of tests: how many passed, failed, were skipped, and which failed."""

    counts: dict[str, int]
    failed: list[str]

    def __str__(self) -> str:
        counted = ", ".join(f"{count:,} {outcome}" for outcome, count in self.counts.items())
        return counted + (
            f" ({'; '.join(self.failed[:3])}{' ...' if len(self.failed) > 3 else ''})" if self.failed else ""
        )


def read(path: Path) -> dict[str, str]:
    """Outcome by test, the last one of each; a line that was cut off counts for nothing."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            test, outcome = json.loads(line)
        except ValueError:
            continue
        found[test] = outcome
    return found


def summary(path: Path) -> Outcomes:
    """Of the tests that `path` names."""
    found = read(path)
    return Outcomes(dict(Counter(found.values())), [test for test, outcome in found.items() if outcome == "failed"])


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file."""
    parser.addoption("--outcomes", type=Path, required=True, help="file that outcomes are appended to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what need not be run again."""
    known = read(config.getoption("outcomes"))
    done = [item for item in items if known.get(item.nodeid) in ("passed", "skipped")]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in set(done)]


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that the others report to writes."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(config.getoption("outcomes")))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """No test left to run is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and read(session.config.getoption("outcomes")):
        session.exitstatus = pytest.ExitCode.OK


class Writer:
    """Appends outcomes to a file: a test fails if any of its phases does, and is done when it was torn down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worst: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a phase of a test."""
        if report.outcome != "passed":
            self.worst[report.nodeid] = report.outcome
        if report.when == "teardown":
            with self.path.open("a") as file:
                file.write(json.dumps([report.nodeid, self.worst.pop(report.nodeid, "passed")]) + "\n")
