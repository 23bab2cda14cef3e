"""The numbers of training steps: they stay on the device while it works, and are read many steps at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmrcnn.distributed import all_gather, world_size
from fastmrcnn_kernels.host import begin_copy

__all__ = ["Reading", "Readings", "nonfinite"]


class Reading(NamedTuple):
    """The numbers of one step.

    Attributes:
        step: its number.
        values: by name, means over all processes.
        image_ids: this process' images. If a value is not finite, those of every process in which it is not, so that
            the culprit is among them.
    """

    step: int
    values: dict[str, float]
    image_ids: list[int]

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(map(math.isfinite, self.values.values()))


def nonfinite(readings: Iterable[Reading]) -> list[Reading]:
    """Those steps of which a value is NaN or infinite."""
    return [reading for reading in readings if not reading.finite]


class Readings:
    """A table on the device with a row per step, in which steps write without waiting.

        readings = Readings(names, size, device)
        for each step:
            readings.add(step, {name: scalar on the device, ...}, image_ids)
            every so many steps: finish = readings.begin()
            a step later: for reading in finish(): ...

    Args:
        names: of the values, in the order in which readings have them.
        size: steps that fit between two calls of `begin`.
        device: where the values are.
        shared: names whose values are the same in every process, such as the norm of gradients that were averaged:
            these do not tell whose images made them infinite.
    """

    def __init__(
        self, names: Sequence[str], size: int, device: torch.device | str, shared: Collection[str] = ("grad_norm",)
    ) -> None:
        self.names = tuple(names)
        self._own = [i for i, name in enumerate(self.names) if name not in shared]
        self._table = torch.empty(size, len(self.names), device=device)
        self._rows: list[tuple[int, list[int]]] = []

    @torch.no_grad()
    def add(self, step: int, values: Mapping[str, Tensor], image_ids: Iterable[int]) -> None:
        """Write the values of a step.

        Args:
            step: its number.
            values: by name scalars [] on the device, of any dtype; means over the step's batches.
            image_ids: the images of all its batches in this process.

        Raises:
            ValueError: the names are others, or the table is full.
        """
        if values.keys() != set(self.names):
            raise ValueError(f"values must have the names {list(self.names)}, got {list(values)}")
        if len(self._rows) == len(self._table):
            raise ValueError(f"step {step}: the table is full with {len(self._table)} steps, begin() empties it")
        self._table[len(self._rows)].copy_(torch.stack([values[name] for name in self.names]))
        self._rows.append((step, list(image_ids)))

    @torch.no_grad()
    def begin(self) -> Callable[[], list[Reading]]:
        """Start copying what was added since the last call, which empties the table.

        Several processes must each call this after the same steps, and what it returns at the same place among their
        other collective operations.

        Returns:
            A function that waits for the copy and returns the reading of each step.
        """
        rows, self._rows = self._rows, []
        # A copy on the device first: the next steps write into the table, maybe before this one has arrived.
        table = self._table[: len(rows)].clone()
        own = mean = begin_copy(table)
        if rows and world_size() > 1:
            shared = table / world_size()
            dist.all_reduce(shared)
            mean = begin_copy(shared)
        return lambda: self._finish(rows, own(), mean())

    def _finish(self, rows: list[tuple[int, list[int]]], own: Tensor, mean: Tensor) -> list[Reading]:
        """The readings of steps whose values are `own` [steps, names] in this process, `mean` over all."""
        readings = [
            Reading(step, dict(zip(self.names, values, strict=True)), image_ids)
            for (step, image_ids), values in zip(rows, mean.tolist(), strict=True)
        ]
        bad = [i for i, reading in enumerate(readings) if not reading.finite]
        if bad and world_size() > 1:
            finite = own[:, self._own].isfinite().all(1).tolist()
            of_processes = all_gather([(finite[i], readings[i].image_ids) for i in bad])
            for i, of_step in zip(bad, zip(*of_processes, strict=True), strict=True):
                culprits = [ids for innocent, ids in of_step if not innocent] or [ids for _, ids in of_step]
                readings[i] = readings[i]._replace(image_ids=[image_id for ids in culprits for image_id in ids])
        return readings
