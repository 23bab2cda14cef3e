"""Times are those of the call, and of nothing else: by a clock that only the call moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import measure

Lasting = Callable[[float], Callable[[], None]]


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> Lasting:
    """Makes calls that last some seconds, on a machine without a GPU."""
    now = [0.0]

    def call_of(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds

        return call

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return call_of


def test_times(lasting: Lasting) -> None:
    assert measure.times(lasting(0.25), seconds=2.0) == [0.25] * 8


def test_few_runs_of_what_takes_long_and_many_of_what_does_not(lasting: Lasting) -> None:
    assert measure.times(lasting(100.0)) == [100.0] * measure.RUNS[0]
    assert len(measure.times(lasting(2.0**-20))) == measure.RUNS[1]


def test_host_time(lasting: Lasting) -> None:
    done = []
    call = lasting(0.125)
    assert measure.host_time(lambda: done.append(call()), runs=3) == 0.125
    assert len(done) == 3
    assert measure.host_time(lambda: done.append(call()), runs=100, seconds=0.5) == 0.125
    assert len(done) == 3 + 4
    assert measure.host_time(lambda: done.append(call()), runs=100, seconds=0.0) == 0.125
    assert len(done) == 3 + 4 + 1


def test_percentiles_are_in_microseconds() -> None:
    assert measure.percentiles([i / 1e6 for i in range(11)]) == {"p20_us": 2.0, "p50_us": 5.0, "p80_us": 8.0}
