"""How fast a run is, and whether it waits for its data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

from fastmrcnn.distributed import world_size

__all__ = ["Speed", "Speedometer"]

T = TypeVar("T")


class Speed(NamedTuple):
    """How fast a run was over a stretch of time.

    Attributes:
        images_per_second: of all processes.
        data_wait: share of this process' time in which it waited for data, 0..1.
        peak_memory_mb: most memory used since the process started, in MiB: of a CUDA device what PyTorch allocated
            there, else of the process, without those that load images. None where that is unknown (Windows).
    """

    images_per_second: float
    data_wait: float
    peak_memory_mb: float | None


class Speedometer:
    """Measures the time between two readings.

        for batch in speedometer.watch(loader):
            ...
            speedometer.count(len(batch))
            now and then: speedometer.read()

    Args:
        device: where the run is, for its memory.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.restart()

    def restart(self) -> None:
        """Forget the time until now, such as that of an evaluation."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass on what a loader gives, and measure how long it lets wait; starts anew with the first batch."""
        self.restart()
        asked = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def count(self, images: int) -> None:
        """Take note of images that this process has trained on; every other one is taken to have had as many."""
        self._images += images * world_size()

    def read(self) -> Speed:
        """The speed since the last reading, or since the start."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = Speed(self._images / seconds, min(self._waited / seconds, 1.0), peak_memory(self.device))
        self.restart()
        return speed


def peak_memory(device: torch.device) -> float | None:
    """The most memory used so far in MiB, as :class:`Speed` has it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # there is none on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10  # macOS counts bytes, others KiB
