"""COCO average precision: from annotations and results, as dicts or files, to numbers.

The matching is pycocotools'. Around it: checked input (`coco_records.py`), an empty result list, any limit of
detections per image, and numbers one can read by name.
"""

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastmrcnn.coco_records import IouType, count_keypoints, load_ground_truth, load_results

__all__ = ["CocoMetrics", "evaluate_coco"]

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


@dataclass(frozen=True)
class CocoMetrics:
    """The numbers of one evaluation; -1 where there is no ground truth to measure on, as in COCO.

    Args:
        iou_type: what was compared: boxes, masks or keypoints.
        max_detections: detections counted per image (and category).
        stats: COCO's 12 numbers (keypoints: 10) in COCO's order, each in 0..1 or -1.
        per_class: AP of every category by name; empty if categories were not told apart.
    """

    iou_type: IouType
    max_detections: int
    stats: tuple[float, ...]
    per_class: dict[str, float] = field(default_factory=dict)

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
        """AP per category, one line each; empty if categories were not told apart."""
        width = max(map(len, self.per_class), default=0)
        return "\n".join(f" {name:<{width}}  AP = {value:.3f}" for name, value in self.per_class.items())


def evaluate_coco(
    ground_truth: dict[str, Any] | str | os.PathLike[str],
    results: list[dict[str, Any]] | str | os.PathLike[str],
    iou_type: IouType,
    *,
    max_detections: int | None = None,
    use_categories: bool = True,
    image_ids: Iterable[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> CocoMetrics:
    """Measure detections against COCO ground truth, with the numbers of pycocotools' ``COCOeval``.

    Neither argument is changed. Ground-truth annotations are renumbered inside, because COCOeval takes a match with
    the annotation of id 0 for no match.

    The area of a detection, which decides whether it counts as small, medium or large, is its box's for ``bbox``; for
    ``segm`` the mask's, as in torchvision's and detectron2's evaluations (pycocotools' ``loadRes`` would take the box's
    where a record has both; for polygons that is kept); for ``keypoints`` the box's, or the keypoints' extent without
    one.

    Args:
        ground_truth: COCO annotations (images, annotations, categories), or the JSON file.
        results: COCO results, or the JSON file: one record per detection with image_id, category_id, score and bbox
            (x, y, width, height in pixels), segmentation (RLE or polygons) or keypoints (x, y, v flattened).
        iou_type: what to compare.
        max_detections: the most confident detections that count per image and category. None is COCO's standard:
            100, for keypoints 20.
        use_categories: False compares regions only, whatever their category (not for keypoints).
        image_ids: the images to measure on; None is all images of the ground truth.
        sigmas: keypoint deviations of the OKS, one per keypoint. None is COCO's for 17 keypoints, and for any other
            number 0.067 each, the mean of COCO's.

    Raises:
        FileNotFoundError: a path names no file.
        ValueError: malformed JSON or records (named by file and position), or ids unknown to the ground truth.
    """
    if iou_type not in get_args(IouType):
        raise ValueError(f"iou_type must be one of {get_args(IouType)}, got {iou_type!r}")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    if iou_type == "keypoints" and not use_categories:
        raise ValueError("use_categories=False cannot be combined with keypoints: OKS is defined per category")
    truth = load_ground_truth(ground_truth, iou_type)
    detections = load_results(results, truth, iou_type)
    limit = max_detections or (20 if iou_type == "keypoints" else 100)

    evaluator = COCOeval(truth, detections, iou_type)
    parameters = evaluator.params
    parameters.useCats = int(use_categories)
    parameters.maxDets = [limit] if iou_type == "keypoints" else sorted({1, 10, limit})
    if image_ids is not None:
        parameters.imgIds = sorted(set(image_ids))
        unknown = [image_id for image_id in parameters.imgIds if image_id not in truth.imgs]
        if unknown:
            raise ValueError(f"image_ids: {unknown[:5]} not among the images of the ground truth")
    if iou_type == "keypoints":
        parameters.kpt_oks_sigmas = _oks_sigmas(truth, sigmas, parameters.kpt_oks_sigmas)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    stats = tuple(_average(evaluator, number) for number in _published_numbers(iou_type, limit))
    per_class = _ap_per_class(evaluator, truth, limit) if use_categories else {}
    return CocoMetrics(iou_type, limit, stats, per_class)


def _average(evaluator: COCOeval, number: _Number, category: int | slice = slice(None)) -> float:
    """Mean over everything measured (-1 marks what was not), or -1 if nothing was."""
    parameters = evaluator.params
    # precision is [T, R, K, A, M], recall [T, K, A, M]: IoU thresholds, recalls, categories, areas, limits.
    values = evaluator.eval["precision" if number.kind == "AP" else "recall"]
    values = values[..., parameters.areaRngLbl.index(number.area), parameters.maxDets.index(number.max_detections)]
    values = values[..., category]
    if number.iou is not None:
        values = values[np.isclose(parameters.iouThrs, number.iou)]
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _ap_per_class(evaluator: COCOeval, truth: COCO, limit: int) -> dict[str, float]:
    names = [str(truth.cats[category_id]["name"]) for category_id in evaluator.params.catIds]
    ap = _Number("AP", "AP", None, "all", limit)
    per_class = {}
    for k, (category_id, name) in enumerate(zip(evaluator.params.catIds, names, strict=True)):
        key = name if names.count(name) == 1 else f"{name} ({category_id})"
        per_class[key] = _average(evaluator, ap, k)
    return per_class


def _oks_sigmas(truth: COCO, sigmas: Sequence[float] | None, coco: np.ndarray) -> np.ndarray:
    """Keypoint deviations, float [K]."""
    count = count_keypoints(truth)
    if sigmas is None:
        return coco if count == len(coco) else np.full(count, _MEAN_COCO_SIGMA)
    if len(sigmas) != count:
        raise ValueError(f"sigmas must have one value per keypoint, {count}, got {len(sigmas)}")
    return np.asarray(sigmas, dtype=float)
