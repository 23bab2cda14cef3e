"""What all benchmarks share: the check before each, the clock, the record, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import measure
from benchmarks.report import contenders_table

QUICK_SECONDS = 0.02
RECORDS = pytest.StashKey[list[dict[str, Any]]]()
MEASURED = pytest.StashKey[dict[str, str]]()  # by operation, the case that `--quick` has measured
WHO = ("contender", "name", "role", "dtype", "select", "semantics")
"""Parameters of benchmarks that say by whom something is done."""
OPERATION = ("direction", "batched")
"""Those that say what is done, beside the name of a benchmark; the others are its case."""


class Clock:
    """A clock that a benchmark moves on by itself, for times that were taken otherwise."""

    now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def replay(self, seconds: Iterator[float]) -> None:
        """Let the next of `seconds` pass."""
        self.now += next(seconds)


CLOCK = Clock()
Timed = Callable[..., None]


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Timed:
    """Function that checks a result, measures the call that makes it, and records the numbers.

    Its arguments: `call`; `check`, which raises if what `call` makes is wrong, so that there is no number; `op` and
    `case`, what is done; `contender`, by whom; `role`, one of "ours", "shipped" (torchvision as most people run it),
    "tuned" (torchvision at its best), "variant" (ours, which does something else) and "reference"; and `least_bytes`,
    what must be read and written at least.
    """

    def run(
        call: Callable[[], Any],
        check: Callable[[Any], None],
        *,
        op: str,
        case: str,
        contender: str,
        role: str,
        least_bytes: int | None = None,
    ) -> None:
        quick = request.config.getoption("quick")
        if quick and role == "reference":
            pytest.skip("left out, to be quick: the reference")
        check(call())
        operation, case_of_it = identity(request.node)
        request.config.stash[MEASURED][operation] = case_of_it
        seconds = measure.times(call, QUICK_SECONDS if quick else measure.SECONDS)
        benchmark.group = f"{op}, {case}"
        record = {"op": op, "case": case, "contender": contender, "role": role, **measure.percentiles(seconds)}
        if torch.cuda.is_available():
            record["host_us"] = round(measure.host_time(call) * 1e6, 2)
            record["sm_clock"] = measure.clocks().get("clocks.sm")
        if least_bytes is not None:
            record["least_bytes"] = least_bytes
            floor = least_bytes / measure.copy_bandwidth() * 1e6
            record["share_of_copy_bandwidth"] = round(floor / record["p50_us"], 4)
        benchmark.extra_info.update(record)
        remaining = iter(seconds)
        benchmark.pedantic(CLOCK.replay, args=(remaining,), rounds=len(seconds))
        request.config.stash[RECORDS].append(record)

    return run


def identity(item: Any) -> tuple[str, str]:
    """The operation that a benchmark measures, and the case."""
    given = {name: str(value) for name, value in item.callspec.params.items() if name not in WHO}
    operation = [item.originalname, *(given.pop(name) for name in OPERATION if name in given)]
    return str(operation), str(given)


def pytest_addoption(parser: pytest.Parser) -> None:
    """To see whether all of it runs."""
    parser.addoption("--quick", action="store_true", help="the first case of each operation only, and a moment each")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what another case of was measured, if asked to be quick."""
    operation, case = identity(item)
    if item.config.getoption("quick") and item.config.stash[MEASURED].get(operation, case) != case:
        pytest.skip("left out, to be quick: more than one case of an operation")


def pytest_configure(config: pytest.Config) -> None:
    """Our table replaces pytest-benchmark's, whose times come from this clock."""
    config.stash[RECORDS] = []
    config.stash[MEASURED] = {}
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Times come from `measure.times`; pytest-benchmark reads them off the clock that replays them."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=True))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Device, clocks and versions instead of what pytest-benchmark collects, the name of the machine among it."""
    cpu = machine_info["cpu"].get("brand_raw")
    machine_info.clear()
    machine_info.update(measure.conditions(), cpu=cpu, copy_bandwidth=round(measure.copy_bandwidth()))
    if not torch.cuda.is_available():
        machine_info["device"] += f" of {cpu}"


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Percentiles say enough of the single times, and all have the same options."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        del entry["options"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of what was measured; what was left out follows as skipped tests."""
    if config.stash[RECORDS]:
        terminalreporter.section("times")
        terminalreporter.write_line(contenders_table(config.stash[RECORDS]))
