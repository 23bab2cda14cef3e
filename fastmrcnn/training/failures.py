"""What can go wrong in a long run: being asked to end, losses that are not finite, too little memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastmrcnn.batches import LoadedBatch
from fastmrcnn.training.readings import Reading

EXIT_STATUS = 128 + signal.SIGTERM
"""Of a process that ended because it was asked to, as shells have it."""

_SHOWN = 8


class Termination:
    """Within it SIGTERM, which schedulers send before they kill, is taken note of; what to do then is the block's.

    Python hands signals to the main thread alone: in any other they are left as they were.
    """

    def __init__(self) -> None:
        self.came = False
        self._ends_at_once = False

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, which nothing is lost by leaving, the signal ends it: SystemExit."""
        self._ends_at_once = True
        try:
            if self.came:
                raise SystemExit(EXIT_STATUS)
            yield
        finally:
            self._ends_at_once = False

    def _note(self, number: int, frame: Any) -> None:
        self.came = True
        if self._ends_at_once:
            raise SystemExit(EXIT_STATUS)


def describe_nonfinite(readings: Sequence[Reading], *, gradients: bool = True) -> str | None:
    """What was not finite in some steps, and whose images these were, as one line; None if all was.

    Args:
        readings: of the steps.
        gradients: whether gradients count; those of scaled losses overflow now and then, so that the scale is found.
    """
    lines = []
    for reading in readings:
        bad = [name for name, value in reading.values.items() if not torch.tensor(value).isfinite()]
        if not gradients:
            bad = [name for name in bad if name != "grad_norm"]
        if bad:
            images = ", ".join(map(str, reading.image_ids[:_SHOWN]))
            more = ", ..." if len(reading.image_ids) > _SHOWN else ""
            lines.append(f"step {reading.step}: {', '.join(bad)} not finite, images {images}{more}")
    return "; ".join(lines) or None


@contextlib.contextmanager
def explaining_memory(batches: Sequence[LoadedBatch], precision: str) -> Iterator[None]:
    """Let an error for want of memory say which batch was too large, and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        sizes = ", ".join(
            f"{len(batch.count)} images on {batch.size[0]} x {batch.size[1]} pixels with up to {batch.boxes.shape[1]} "
            "objects"
            for batch in batches
        )
        narrower = "" if precision != "float32" else "precision=bfloat16 halves what the network takes; "
        raise torch.OutOfMemoryError(
            f"out of memory in a step of {sizes}, in {precision}. {narrower}lower batch_size (with as much more "
            "optim.accumulate the results are alike), or the size of images: model.max_size, augment.min_sizes or "
            f"augment.jitter. ({str(error).splitlines()[0]})"
        ) from error
