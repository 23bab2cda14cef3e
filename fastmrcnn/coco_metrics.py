"""COCO's numbers: what is to be measured, and from precision and recall to numbers one can read by name."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params

from fastmrcnn.coco_records import IouType, count_keypoints, load_ground_truth

__all__ = ["ClassMetrics", "CocoMetrics", "CocoTask", "summarize"]

# COCO publishes one sigma per human keypoint; for other skeletons their mean is the neutral choice.
_MEAN_COCO_SIGMA = 0.067


class _Number(NamedTuple):
    """What one of the published numbers averages over."""

    name: str
    kind: Literal["AP", "AR"]
    iou: float | None
    area: str
    max_detections: int


def _published_numbers(iou_type: IouType, limit: int) -> list[_Number]:
    """The numbers of COCO's table, in its order: 12, or 10 for keypoints."""
    if iou_type == "keypoints":
        rows = [("", None, "all"), ("50", 0.5, "all"), ("75", 0.75, "all"), ("m", None, "medium"), ("l", None, "large")]
        kinds: tuple[Literal["AP"], Literal["AR"]] = ("AP", "AR")
        return [_Number(kind + end, kind, iou, area, limit) for kind in kinds for end, iou, area in rows]
    areas = [("s", "small"), ("m", "medium"), ("l", "large")]
    return [
        _Number("AP", "AP", None, "all", limit),
        _Number("AP50", "AP", 0.5, "all", limit),
        _Number("AP75", "AP", 0.75, "all", limit),
        *(_Number(f"AP{end}", "AP", None, area, limit) for end, area in areas),
        *(_Number(f"AR{count}", "AR", None, "all", count) for count in (1, 10, limit)),
        *(_Number(f"AR{end}", "AR", None, area, limit) for end, area in areas),
    ]


class ClassMetrics(NamedTuple):
    """The numbers of one category: AP averaged over IoU 0.50:0.95, at 0.50 and at 0.75 (-1 without objects), and the
    number of ground-truth objects that count, crowds not among them.
    """

    ap: float
    ap50: float
    ap75: float
    objects: int


@dataclass(frozen=True)
class CocoMetrics:
    """The numbers of one evaluation; -1 where there is no ground truth to measure on, as in COCO.

    Args:
        iou_type: what was compared: boxes, masks or keypoints.
        max_detections: detections counted per image (and category).
        stats: COCO's 12 numbers (keypoints: 10) in COCO's order, each in 0..1 or -1.
        classes: the numbers of every category by name; empty if categories were not told apart.
        precision: float64 [10, 101, K], interpolated precision at IoU 0.50, 0.55, ..., 0.95 and recall 0.00, 0.01, ...,
            1.00 of each category (K = 1 if they were not told apart), over all areas; -1 without objects. No part of
            comparisons.
    """

    iou_type: IouType
    max_detections: int
    stats: tuple[float, ...]
    classes: dict[str, ClassMetrics] = field(default_factory=dict)
    precision: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @property
    def ap(self) -> float:
        """AP averaged over IoU 0.50:0.95, COCO's main number."""
        return self.stats[0]

    @property
    def ap50(self) -> float:
        """AP at IoU 0.50."""
        return self.stats[1]

    @property
    def ap75(self) -> float:
        """AP at IoU 0.75."""
        return self.stats[2]

    @property
    def per_class(self) -> dict[str, float]:
        """AP of every category by name; empty if categories were not told apart."""
        return {name: numbers.ap for name, numbers in self.classes.items()}

    def as_dict(self) -> dict[str, float]:
        """The numbers by name, in COCO's order: AP, AP50, ..., AR1, AR10, AR100 (named after the limit), ..., ARl."""
        numbers = _published_numbers(self.iou_type, self.max_detections)
        return {number.name: value for number, value in zip(numbers, self.stats, strict=True)}

    def table(self) -> str:
        """The table as COCO prints it: one line per number with its IoU, area and detections per image."""
        lines = []
        for number, value in zip(_published_numbers(self.iou_type, self.max_detections), self.stats, strict=True):
            title = "Average Precision" if number.kind == "AP" else "Average Recall"
            iou = "0.50:0.95" if number.iou is None else f"{number.iou:.2f}"
            lines.append(
                f" {title:<18} ({number.kind}) @[ IoU={iou:<9} | area={number.area:>6} "
                f"| maxDets={number.max_detections:>3} ] = {value:.3f}"
            )
        return "\n".join(lines)

    def class_table(self) -> str:
        """Objects, AP, AP50 and AP75 per category, one line each below a header, "-" for what has no objects; empty if
        categories were not told apart.
        """
        if not self.classes:
            return ""
        width = max(len(name) for name in ("class", *self.classes))
        lines = [f" {'class':<{width}}  {'objects':>7}  {'AP':>5}  {'AP50':>5}  {'AP75':>5}"]
        for name, (*values, objects) in self.classes.items():
            columns = "  ".join("    -" if value < 0 else f"{value:.3f}" for value in values)
            lines.append(f" {name:<{width}}  {objects:>7}  {columns}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CocoTask:
    """What to measure, against what.

    Args:
        truth: the indexed ground truth.
        iou_type: what to compare.
        limit: detections that count per image and category.
        parameters: pycocotools' parameters; image ids are not set.
        num_keypoints: keypoints per object; 0 unless they are compared.
    """

    truth: COCO
    iou_type: IouType
    limit: int
    parameters: Params
    num_keypoints: int

    @classmethod
    def of(
        cls,
        ground_truth: dict[str, Any] | str | os.PathLike[str],
        iou_type: IouType,
        max_detections: int | None,
        use_categories: bool,
        sigmas: Sequence[float] | None,
    ) -> "CocoTask":
        """Check the arguments, which are those of :func:`fastmrcnn.coco_eval.evaluate_coco`, and read the truth."""
        if iou_type not in get_args(IouType):
            raise ValueError(f"iou_type must be one of {get_args(IouType)}, got {iou_type!r}")
        if max_detections is not None and max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        keypoints = iou_type == "keypoints"
        if keypoints and not use_categories:
            raise ValueError("use_categories=False cannot be combined with keypoints: OKS is defined per category")
        truth = load_ground_truth(ground_truth, iou_type)
        limit = max_detections or (20 if keypoints else 100)
        num_keypoints = count_keypoints(truth) if keypoints else 0
        parameters = Params(iou_type)
        parameters.catIds = sorted(truth.cats)
        parameters.useCats = int(use_categories)
        parameters.maxDets = [limit] if keypoints else sorted({1, 10, limit})
        if keypoints:
            parameters.kpt_oks_sigmas = _oks_sigmas(num_keypoints, sigmas, parameters.kpt_oks_sigmas)
        return cls(truth, iou_type, limit, parameters, num_keypoints)


def _oks_sigmas(count: int, sigmas: Sequence[float] | None, coco: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keypoint deviations, float [count]."""
    if sigmas is None:
        return coco if count == len(coco) else np.full(count, _MEAN_COCO_SIGMA)
    if len(sigmas) != count:
        raise ValueError(f"sigmas must have one value per keypoint, {count}, got {len(sigmas)}")
    return np.asarray(sigmas, dtype=float)


def summarize(
    task: CocoTask, precision: NDArray[np.float64], recall: NDArray[np.float64], image_ids: Iterable[int]
) -> CocoMetrics:
    """The numbers of an evaluation.

    Args:
        task: what was measured.
        precision: float64 [T, R, K, A, M] over IoU thresholds, recalls, categories, areas and limits; -1 marks what
            there is no ground truth for.
        recall: float64 [T, K, A, M], as precision.
        image_ids: the images it was measured on.
    """
    numbers = _published_numbers(task.iou_type, task.limit)
    stats = tuple(_average(task, precision, recall, number) for number in numbers)
    whole = (task.parameters.areaRngLbl.index("all"), task.parameters.maxDets.index(task.limit))
    # The first three are AP, AP50 and AP75 for every type.
    classes = {}
    if task.parameters.useCats:
        objects = _count_objects(task, image_ids)
        names = [str(task.truth.cats[category_id]["name"]) for category_id in task.parameters.catIds]
        for k, (category_id, name) in enumerate(zip(task.parameters.catIds, names, strict=True)):
            key = name if names.count(name) == 1 else f"{name} ({category_id})"
            ap, ap50, ap75 = (_average(task, precision, recall, number, k) for number in numbers[:3])
            classes[key] = ClassMetrics(ap, ap50, ap75, objects.get(category_id, 0))
    return CocoMetrics(task.iou_type, task.limit, stats, classes, precision[(..., *whole)].copy())


def _average(
    task: CocoTask,
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    number: _Number,
    category: int | slice = slice(None),
) -> float:
    """Mean over everything measured (-1 marks what was not), or -1 if nothing was."""
    parameters = task.parameters
    values = precision if number.kind == "AP" else recall
    values = values[..., parameters.areaRngLbl.index(number.area), parameters.maxDets.index(number.max_detections)]
    values = values[..., category]
    if number.iou is not None:
        values = values[np.isclose(parameters.iouThrs, number.iou)]
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _count_objects(task: CocoTask, image_ids: Iterable[int]) -> dict[int, int]:
    """Objects per category that a detector has to find."""
    counts: dict[int, int] = {}
    for image_id in image_ids:
        for annotation in task.truth.imgToAnns.get(image_id, ()):
            marked = task.iou_type != "keypoints" or annotation["num_keypoints"] > 0
            if marked and not annotation["iscrowd"]:
                counts[annotation["category_id"]] = counts.get(annotation["category_id"], 0) + 1
    return counts
