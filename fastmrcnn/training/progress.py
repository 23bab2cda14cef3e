"""What a run says while it trains: a bar per epoch, or plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fastmrcnn.coco_metrics import CocoMetrics
from fastmrcnn.coco_records import IouType
from fastmrcnn.distributed import rank

__all__ = ["Progress", "say", "status", "summary_line"]

# A narrow terminal leaves little of the bar, and cuts off the end of the numbers.
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
_LINE = "{desc} step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
_SHORT = {
    "loss_classifier": "cls",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_mask_iou": "miou",
    "loss_keypoint": "kpt",
    "loss_objectness": "obj",
    "loss_rpn_box_reg": "rpn",
}


class Progress:
    """The steps of an epoch on stderr: a bar with the latest numbers beside it, on a terminal.

    Elsewhere, as in a log file, a line for each reading, when it comes. Only rank 0 says anything.

        with Progress("epoch 3/26", steps, first=step_of_epoch) as progress:
            for each step:
                progress.update()
                now and then: progress.show(records.write_train(...))

    Args:
        title: what the steps are of.
        steps: of the whole epoch.
        first: steps of it that an earlier run did.
    """

    def __init__(self, title: str, steps: int, first: int = 0) -> None:
        self.title, self.steps, self.first, self.done = title, steps, first, first
        self._speaks = rank() == 0
        self._started = time.monotonic()
        self._bar: Any = None
        # Some terminals, of containers above all, do not know their size: tqdm would show nothing there.
        if self._speaks and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0:
            self._bar = tqdm(
                desc=title, total=steps, initial=first, mininterval=1.0, dynamic_ncols=True, bar_format=_BAR
            )

    def update(self, steps: int = 1) -> None:
        """Take note of steps that are done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show the numbers of a "train" record, see `fastmrcnn.training.records`."""
        if self._bar is not None:
            self._bar.set_postfix_str(status(record), refresh=False)
        elif self._speaks:
            line = tqdm.format_meter(
                self.done,
                self.steps,
                time.monotonic() - self._started,
                prefix=self.title,
                initial=self.first,
                postfix=status(record),
                bar_format=_LINE,
            )
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def say(text: str) -> None:
    """Print a message on stdout, above a bar if there is one.  Only rank 0 says anything."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()  # in its place among the lines on stderr, also where both go to one file


def status(record: Mapping[str, Any]) -> str:
    """The numbers of a "train" record on one line, losses first and by short names.

    "loss" is the sum of the losses, "data" the share of time in which the run waited for data, "skipped" only there if
    steps were.
    """
    losses: Mapping[str, float | None] = record["losses"]
    known = {name: value for name, value in losses.items() if value is not None}
    parts = [f"loss {sum(known.values()):.3f}" if known else "loss -"]
    parts += [f"{_SHORT.get(name, name.removeprefix('loss_'))} {value:.3f}" for name, value in known.items()]
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']}")
    parts.append(f"{record['images_per_second']:.1f} img/s")
    parts.append(f"data {record['data_wait']:.0%}")
    parts.append(f"lr {record['lr']:.2g}")
    if record["peak_memory_mb"] is not None:
        parts.append(f"{record['peak_memory_mb'] / 1024:.1f} GiB")
    return " ".join(parts)


def summary_line(epoch: int, metrics: Mapping[IouType, CocoMetrics]) -> str:
    """One line of average precisions."""
    parts = [f"{iou_type} AP {numbers.ap:.3f} AP50 {numbers.ap50:.3f}" for iou_type, numbers in metrics.items()]
    return f"epoch {epoch}: " + ", ".join(parts)
