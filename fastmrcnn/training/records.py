"""What a run writes down: OUTPUT/metrics.jsonl, and what TensorBoard and Weights & Biases show of it.

metrics.jsonl holds one JSON object per line, in the order of their steps, of these kinds:

- "train", every so many steps: epoch, step, lr, losses by name, grad_norm, skipped, and the speed: images_per_second
  of all processes, data_wait, the share of time in which the run waited for data, and peak_memory_mb.
- "skipped", for each step whose losses or gradients are not finite: its values and image_ids.
- "epoch": epoch, step, lr, losses, grad_norm, skipped, seconds, and after an evaluation metrics by IoU type and name.

Losses and grad_norm are means over the steps since the last "train", or of the epoch, other than skipped ones, which
`skipped` counts. Epochs and steps are those that were done, from 1. What is not finite or not known is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from PIL import Image

from fastmrcnn.coco_metrics import CocoMetrics
from fastmrcnn.coco_records import IouType
from fastmrcnn.distributed import rank
from fastmrcnn.files import write_atomically
from fastmrcnn.training.config import LogConfig
from fastmrcnn.training.dashboards import Dashboard, check_log, curves_picture, open_dashboards
from fastmrcnn.training.readings import Reading
from fastmrcnn.training.speed import Speed

__all__ = ["Records"]

_TRAIN_TAGS = {
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "skipped": "optimizer/skipped",
    "images_per_second": "speed/images_per_second",
    "data_wait": "speed/data_wait",
    "peak_memory_mb": "speed/peak_memory_mb",
}
_EPOCH_TAGS = {"seconds": "speed/epoch_seconds"}  # what else it has were the same again, at the same step


@dataclass
class _Means:
    """Sums over steps; those of which a value is not finite only count as skipped."""

    totals: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0

    def add(self, reading: Reading) -> None:
        for name, value in reading.values.items():
            self.totals[name] = self.totals.get(name, 0.0) + (value if reading.finite else 0.0)
        self.steps += reading.finite
        self.skipped += not reading.finite

    def record(self) -> dict[str, Any]:
        """The means, as parts of a record."""
        means = {name: total / self.steps if self.steps else None for name, total in self.totals.items()}
        return {**_nested(means), "skipped": self.skipped}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a step, those that are losses under a name of their own."""
    losses = {name: value for name, value in values.items() if name.startswith("loss")}
    return {"losses": losses, **{name: value for name, value in values.items() if name not in losses}}


class Records:
    """Writes down a run. Rank 0 writes, in other processes everything may be called just the same.

        with Records(output, config.log, options, resume_step=step) as records:
            records.load_state_dict(...)                      # if resumed
            records.add(readings)                             # of every step
            record = records.write_train(epoch, lr, speed)    # every `config.every` steps
            record = records.write_epoch(epoch, lr, seconds, metrics, pictures)
            save(records.state_dict())

    A checkpoint follows what was written of the steps before it: then the file of a run that was killed and resumed
    equals that of one which was not, but for times. What the last run wrote after `resume_step` is removed first, and
    half a line that it left behind.

    Args:
        folder: of the run, made if there is none.
        config: where to, besides metrics.jsonl.
        run_config: the run's options as JSON has them, for the dashboards.
        resume_step: the updates that were done before; 0 for a new run, whose records replace those of an older one.
        resume_epoch: the epochs that were done before, evaluation included: the last step may be that of an epoch whose
            evaluation was interrupted. By default all that ended by `resume_step`.

    Raises:
        ValueError: a package that `config` needs is not installed, or Weights & Biases knows no account.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: LogConfig,
        run_config: Mapping[str, Any],
        resume_step: int = 0,
        resume_epoch: int | None = None,
    ) -> None:
        check_log(config)
        self._step = resume_step
        self._window, self._epoch = _Means(), _Means()
        self._dashboards: list[Dashboard] = []
        self._file: TextIO | None = None
        if rank() == 0:
            self._dashboards = open_dashboards(Path(folder), config, run_config, resume_step)
            self._file = _continue(Path(folder) / "metrics.jsonl", resume_step, resume_epoch)
        self.pictures = config.pictures if self._dashboards else 0
        """Pictures of validation images that `write_epoch` has a use for in this process."""

    def add(self, readings: Iterable[Reading]) -> None:
        """Take note of steps, in their order; those that are skipped are written."""
        for reading in readings:
            self._step = reading.step
            self._window.add(reading)
            self._epoch.add(reading)
            if not reading.finite:
                record = {"kind": "skipped", "step": reading.step, **_nested(reading.values)}
                self._write(record | {"image_ids": reading.image_ids})

    def write_train(self, epoch: int, lr: float, speed: Speed) -> dict[str, Any]:
        """Write the means over the steps added since the last call.

        Args:
            epoch: of the steps, from 1.
            lr: learning rate of the last of them.
            speed: of the same stretch of time.

        Returns:
            The record.
        """
        head = {"kind": "train", "epoch": epoch, "step": self._step, "lr": lr}
        record = head | self._window.record() | speed._asdict()
        self._window = _Means()
        self._write(record)
        self._show(record)
        return record

    def write_epoch(
        self,
        epoch: int,
        lr: float,
        seconds: float,
        metrics: Mapping[IouType, CocoMetrics] | None = None,
        pictures: Mapping[str, Image.Image] | None = None,
    ) -> dict[str, Any]:
        """Write the means over all steps added since the last call.

        Args:
            epoch: that is done, from 1.
            lr: learning rate of its last step.
            seconds: that training took, without evaluation.
            metrics: what an evaluation returned, if there was one.
            pictures: by tag, for the dashboards, see :func:`fastmrcnn.training.dashboards.validation_pictures`.

        Returns:
            The record.
        """
        head = {"kind": "epoch", "epoch": epoch, "step": self._step, "lr": lr}
        record = head | self._epoch.record() | {"seconds": seconds}
        if metrics is not None:
            record["metrics"] = {iou_type: numbers.as_dict() for iou_type, numbers in metrics.items()}
        self._epoch = _Means()
        self._write(record)
        self._show(record)
        if self._dashboards and metrics:
            shown = {"precision_recall/curves": curves_picture(metrics), **(pictures or {})}
            for dashboard in self._dashboards:
                dashboard.evaluation(self._step, metrics, shown)
        return record

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the sums of what is not written yet."""
        return {"window": asdict(self._window), "epoch": asdict(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._window, self._epoch = _Means(**deepcopy(state["window"])), _Means(**deepcopy(state["epoch"]))

    def close(self, failed: bool = False) -> None:
        """Close all files; `failed` if an error ends the run."""
        if self._file is not None:
            self._file.close()
        for dashboard in self._dashboards:
            dashboard.close(failed)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_valid(record), allow_nan=False) + "\n")
            self._file.flush()

    def _show(self, record: Mapping[str, Any]) -> None:
        values = tags(record)
        for dashboard in self._dashboards:
            dashboard.scalars(record["step"], values)


def tags(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a "train" or "epoch" record by the tags under which dashboards group them.

    What is not known, null or a metric of -1, is left out. Losses come with their sum.
    """
    train = record["kind"] == "train"
    group = "loss" if train else "epoch_loss"
    values = {f"{group}/{name.removeprefix('loss_')}": value for name, value in record["losses"].items()}
    if None not in values.values():
        values[f"{group}/total"] = math.fsum(values.values())
    for name, tag in (_TRAIN_TAGS if train else _EPOCH_TAGS).items():
        values[tag] = record.get(name)
    for iou_type, numbers in record.get("metrics", {}).items():
        values |= {f"{name[:2].lower()}/{iou_type}/{name}": value for name, value in numbers.items() if value >= 0}
    return {tag: value for tag, value in values.items() if value is not None}


def _continue(path: Path, step: int, epoch: int | None) -> TextIO:
    """Open metrics.jsonl behind its records up to `step` and of epochs up to `epoch`, the only ones that stay."""
    kept = []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as old:
            for line in old:
                if not (line.endswith("\n") and _is_up_to(line, step, epoch)):
                    break
                kept.append(line)
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8", newline="\n"))
    return open(path, "a", encoding="utf-8", newline="\n")


def _is_up_to(line: str, step: int, epoch: int | None) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    if not isinstance(record, dict) or record.get("step", math.inf) > step:
        return False
    return epoch is None or record.get("kind") != "epoch" or record["epoch"] <= epoch


def _valid(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have: null."""
    if isinstance(value, dict):
        return {name: _valid(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_valid(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
