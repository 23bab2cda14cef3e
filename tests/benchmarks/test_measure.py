"""Times are those of the call, and of nothing else."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure

ON_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU: times are the host's there")


@ON_GPU
def test_times() -> None:
    seconds = measure.times(lambda: time.sleep(0.02), seconds=0.2)
    assert 5 <= len(seconds) <= 10
    assert all(0.02 <= s < 0.2 for s in seconds)


@ON_GPU
def test_few_runs_of_what_takes_long_and_many_of_what_does_not() -> None:
    assert len(measure.times(lambda: time.sleep(0.05), seconds=0.01)) == measure.RUNS[0]
    assert len(measure.times(lambda: None)) == measure.RUNS[1]


def test_host_time() -> None:
    calls = []
    assert 0.01 <= measure.host_time(lambda: calls.append(time.sleep(0.01)), runs=3) < 0.1
    assert len(calls) == 3
    calls.clear()
    measure.host_time(lambda: calls.append(time.sleep(0.01)), runs=1000, seconds=0.0)
    assert len(calls) == 1


def test_percentiles_are_in_microseconds() -> None:
    assert measure.percentiles([i / 1e6 for i in range(11)]) == {"p20_us": 2.0, "p50_us": 5.0, "p80_us": 8.0}
