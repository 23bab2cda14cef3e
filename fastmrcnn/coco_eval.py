"""COCO average precision: from annotations and results, as dicts or files, to numbers.

The matching is pycocotools' or faster-coco-eval's. Around it: checked input (`coco_records.py`), an empty result list,
any limit of detections per image, and numbers one can read by name (`coco_metrics.py`).
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from fastmrcnn.coco_faster import accumulate_faster, require_faster
from fastmrcnn.coco_matching import accumulate, match_image
from fastmrcnn.coco_metrics import ClassMetrics, CocoMetrics, CocoTask, summarize
from fastmrcnn.coco_records import IouType, load_results

__all__ = ["Backend", "ClassMetrics", "CocoMetrics", "check_backend", "evaluate_coco"]

Backend = Literal["pycocotools", "faster_coco_eval"]


def evaluate_coco(
    ground_truth: dict[str, Any] | str | os.PathLike[str],
    results: list[dict[str, Any]] | str | os.PathLike[str],
    iou_type: IouType,
    *,
    max_detections: int | None = None,
    use_categories: bool = True,
    image_ids: Iterable[int] | None = None,
    sigmas: Sequence[float] | None = None,
    backend: Backend = "pycocotools",
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
        backend: "faster_coco_eval" matches in C++, with the same numbers up to the last bit of float64. It needs the
            package faster-coco-eval (the extra ``eval``) and ids that are whole numbers.

    Raises:
        FileNotFoundError: a path names no file.
        ValueError: malformed JSON or records (named by file and position), or ids unknown to the ground truth; or the
            backend is not installed.
    """
    check_backend(backend)
    task = CocoTask.of(ground_truth, iou_type, max_detections, use_categories, sigmas)
    detections = load_results(results, task.truth, iou_type, task.num_keypoints)
    measured = sorted(task.truth.imgs if image_ids is None else set(image_ids))
    unknown = [image_id for image_id in measured if image_id not in task.truth.imgs]
    if unknown:
        raise ValueError(f"image_ids: {unknown[:5]} not among the images of the ground truth")
    if backend == "faster_coco_eval":
        return summarize(task, *accumulate_faster(task, detections, measured), measured)
    of_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in task.truth.imgs}
    for detection in detections:
        of_image[detection["image_id"]].append(detection)
    images = {image_id: match_image(task, image_id, of_image[image_id]) for image_id in measured}
    return summarize(task, *accumulate(task, images), measured)


def check_backend(backend: Backend) -> None:
    """Raise ValueError if there is no such backend, or if its package is not installed."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "faster_coco_eval":
        require_faster()
