"""A run's numbers and pictures for TensorBoard and for Weights & Biases, neither of which needs to be installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from fastmrcnn.coco_metrics import CocoMetrics
from fastmrcnn.coco_records import IouType
from fastmrcnn.data import DetectionDataset
from fastmrcnn.files import write_json
from fastmrcnn.precision_recall import plot_precision_recall
from fastmrcnn.predictor import Predictor
from fastmrcnn.training.config import LogConfig
from fastmrcnn.visualize import comparison

__all__ = ["Dashboard", "TensorBoard", "WeightsAndBiases", "check_log", "open_dashboards", "validation_pictures"]

_SIDE = 640  # pixels of a picture's longer side; one is written per image and evaluation


class Dashboard(Protocol):
    """Where numbers and pictures can be looked at while a run goes on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step by their tags, such as "loss/mask"."""
        ...

    def evaluation(
        self, step: int, metrics: Mapping[IouType, CocoMetrics], pictures: Mapping[str, Image.Image]
    ) -> None:
        """Show the pictures of an evaluation by their tags, and whatever else there is to draw of its metrics."""
        ...

    def close(self, failed: bool) -> None:
        """Write what is left; `failed` if an error ends the run."""
        ...


def check_log(config: LogConfig) -> None:
    """Raise ValueError if something is to be logged to that is not installed."""
    for option, package, extra in (("tensorboard", "tensorboard", "train"), ("wandb", "wandb", "wandb")):
        if not getattr(config, option):
            continue
        for needed in (package, "matplotlib"):
            spec = importlib.util.find_spec(needed)
            # A folder of that name, such as both of these leave behind where they run, is found as well: no origin.
            if spec is None or spec.origin is None:
                raise ValueError(f'log.{option} needs the package {needed}: pip install "fastmrcnn[{extra}]"')


def open_dashboards(
    folder: Path, config: LogConfig, run_config: Mapping[str, Any], resume_step: int
) -> list[Dashboard]:
    """Those that `config` asks for; the arguments are those of :class:`fastmrcnn.training.records.Records`."""
    dashboards: list[Dashboard] = []
    if config.wandb:
        dashboards.append(WeightsAndBiases(folder, config.wandb, run_config, resume_step))
    if config.tensorboard:
        dashboards.append(TensorBoard(folder / "tensorboard", run_config, resume_step))
    return dashboards


class TensorBoard:
    """Event files for TensorBoard: scalars, pictures and precision-recall curves.

    Args:
        folder: of the event files.
        run_config: shown as text.
        resume_step: events after this step, which a run had written before it was killed, are hidden.
    """

    def __init__(self, folder: Path, run_config: Mapping[str, Any], resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not everybody has it

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._writer.add_text("config", f"```json\n{json.dumps(run_config, indent=2)}\n```", resume_step)
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        # Checkpoints follow, and what they stand for must not be lost with the process.
        self._writer.flush()

    def evaluation(
        self, step: int, metrics: Mapping[IouType, CocoMetrics], pictures: Mapping[str, Image.Image]
    ) -> None:
        """Write pictures, and a curve per IoU type at IoU 0.50, at 0.75 and averaged over 0.50:0.95."""
        for tag, picture in pictures.items():
            self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        for iou_type, numbers in metrics.items():
            objects = sum(of_class.objects for of_class in numbers.classes.values())
            for name, thresholds in (("50", slice(0, 1)), ("75", slice(5, 6)), ("", slice(None))):
                curve = _mean_precision(numbers, thresholds)
                if curve is not None:
                    rows = pr_curve(curve, objects)
                    self._writer.add_pr_curve_raw(
                        f"precision_recall/{iou_type}/AP{name}", *rows, global_step=step, num_thresholds=len(curve)
                    )
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


def _mean_precision(numbers: CocoMetrics, thresholds: slice) -> NDArray[np.float64] | None:
    """Precision [101] over recall, the mean over some IoU thresholds and all classes that have objects, if any do."""
    if numbers.precision is None:
        return None
    measured = numbers.precision[thresholds][..., numbers.precision[0, 0] > -1]
    return measured.mean((0, 2)) if measured.size else None


def pr_curve(precision: NDArray[np.float64], objects: int) -> NDArray[np.float64]:
    """What TensorBoard's precision-recall curves are made of.

    TensorBoard counts at thresholds of the score, COCO interpolates at recalls: point t is the recall 1 - t / (R - 1).
    Counts are those of so many objects with that precision at that recall, of which at least one is found, since
    TensorBoard leaves out points without any; none are found where the precision is 0, the recall out of reach.

    Args:
        precision: float64 [R] at R recalls from 0 to 1.
        objects: of the ground truth.

    Returns:
        Float64 [6, R]: true positives, false positives, true negatives (none), false negatives, precision and recall.
    """
    recall = np.linspace(1, 0, len(precision))
    precision = precision[::-1]
    reached = precision > 0
    true = np.where(reached, np.maximum(recall * objects, 1), 0)
    false = true * (1 / np.where(reached, precision, 1) - 1)
    return np.stack([true, false, np.zeros_like(true), objects - true, precision, recall])


class WeightsAndBiases:
    """A run at Weights & Biases; WANDB_MODE=offline and the like are its own settings.

    Args:
        folder: of the run: its name is the run's, wandb.json in it holds the run's id, and wandb/ what W&B writes.
        project: where the run belongs.
        run_config: the run's options.
        resume_step: greater than 0 goes on with the run that wandb.json names, if there is one. W&B keeps what it
            has: steps that it knows already are not changed.

    Raises:
        ValueError: W&B knows no account to log to.
    """

    def __init__(self, folder: Path, project: str, run_config: Mapping[str, Any], resume_step: int = 0) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "wandb.json"
        run_id = json.loads(known.read_text(encoding="utf-8"))["id"] if resume_step and known.exists() else None
        try:
            self._run = self._wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(run_config),
                id=run_id,
                resume="allow" if run_id else None,
            )
        except self._wandb.errors.UsageError as error:
            raise ValueError(f"log.wandb: {error} With WANDB_MODE=offline no account is needed.") from error
        write_json(known, {"id": self._run.id})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        self._run.log(dict(values), step=step)

    def evaluation(
        self, step: int, metrics: Mapping[IouType, CocoMetrics], pictures: Mapping[str, Image.Image]
    ) -> None:
        """Log pictures; the curves are one of them."""
        self._run.log({tag: self._wandb.Image(picture) for tag, picture in pictures.items()}, step=step)

    def close(self, failed: bool) -> None:
        """Finish the run, as failed if it did."""
        self._run.finish(exit_code=int(failed))


def curves_picture(metrics: Mapping[IouType, CocoMetrics]) -> Image.Image:
    """The picture of :func:`fastmrcnn.precision_recall.plot_precision_recall`."""
    with tempfile.TemporaryDirectory() as folder:
        return Image.open(plot_precision_recall(metrics, Path(folder) / "curves.png")).convert("RGB")


def validation_pictures(model: nn.Module, dataset: DetectionDataset, count: int) -> dict[str, Image.Image]:
    """Detections beside the ground truth of some images, the same ones each time, evenly spaced over the dataset.

    Args:
        model: a detector; its mode is as before afterwards.
        dataset: its labels are those of the model.
        count: of images; all if there are fewer.

    Returns:
        By tag, "pictures/" and the image id, a picture each.
    """
    count = min(count, len(dataset))
    items = [dataset[i * len(dataset) // count] for i in range(count)]
    results = Predictor(model, batch_size=1)([image for image, _ in items])
    return {
        f"pictures/{target['image_id']}": comparison([image], [result], [target], dataset.class_names, max_side=_SIDE)
        for (image, target), result in zip(items, results, strict=True)
    }
