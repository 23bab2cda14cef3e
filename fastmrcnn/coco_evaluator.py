"""COCO average precision of results that come image by image, from one process or several."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastmrcnn.coco_matching import ImageMatches, accumulate, match_image
from fastmrcnn.coco_metrics import CocoMetrics, CocoTask, summarize
from fastmrcnn.coco_records import IouType, check_results

__all__ = ["CocoEvaluator"]


class CocoEvaluator:
    """Takes the results of one image after the other and keeps little of each: not the records, not the masks.

    The numbers equal those of :func:`fastmrcnn.coco_eval.evaluate_coco` for all records at once, whatever the order of
    the images. Only images that were added count, those without any detection among them: add them, too.

    Args:
        ground_truth: COCO annotations (images, annotations, categories), or the JSON file; left as it is.
        iou_types: what to compare, any of bbox, segm and keypoints.
        max_detections: the most confident detections that count per image and category. None is COCO's standard:
            100, for keypoints 20.
        use_categories: False compares regions only, whatever their category (not for keypoints).
        sigmas: keypoint deviations of the OKS, as in :func:`fastmrcnn.coco_eval.evaluate_coco`.

    Raises:
        FileNotFoundError: a path names no file.
        ValueError: an argument is out of range, or malformed JSON or records (named by file and position).
    """

    def __init__(
        self,
        ground_truth: dict[str, Any] | str | os.PathLike[str],
        iou_types: Sequence[IouType],
        *,
        max_detections: int | None = None,
        use_categories: bool = True,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        if not iou_types or isinstance(iou_types, str):
            raise ValueError(f"iou_types must be a list of one or more of bbox, segm and keypoints, got {iou_types!r}")
        self._tasks = {
            iou_type: CocoTask.of(ground_truth, iou_type, max_detections, use_categories, sigmas)
            for iou_type in iou_types
        }
        self._images: dict[int, dict[IouType, ImageMatches]] = {}

    @property
    def image_ids(self) -> set[int]:
        """The images added so far."""
        return set(self._images)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._images

    def add(self, image_id: int, records: Sequence[dict[str, Any]]) -> None:
        """Match the results of one image with its ground truth.

        Args:
            image_id: an image of the ground truth that was not added before.
            records: all its COCO results, none for an image in which nothing was found; left as they are.

        Raises:
            ValueError: the image is unknown or was added before, or a record is malformed or of another image; named
                by its position. Nothing of the image is added then.
        """
        if image_id in self._images:
            raise ValueError(f"image_id {image_id!r} was added before: an image counts once, with all its results")
        matches: dict[IouType, ImageMatches] = {}
        for iou_type, task in self._tasks.items():
            if image_id not in task.truth.imgs:
                raise ValueError(f"image_id {image_id!r} is not in the ground truth")
            name = f"results of image {image_id}"
            detections = check_results(records, task.truth, iou_type, task.num_keypoints, name)
            for i, detection in enumerate(detections):
                if detection["image_id"] != image_id:
                    raise ValueError(f"{name}[{i}]: it is of image {detection['image_id']!r}")
            matches[iou_type] = match_image(task, image_id, detections)
        self._images[image_id] = matches

    def state(self) -> dict[int, dict[IouType, ImageMatches]]:
        """What was kept of each image, by image id; for :meth:`merge` in another process (it can be pickled)."""
        return dict(self._images)

    def merge(self, state: Mapping[int, Mapping[IouType, ImageMatches]]) -> None:
        """Add the images of another evaluator's :meth:`state`; an image that both have counts once, as it is here.

        Args:
            state: of an evaluator that was made with the same arguments.

        Raises:
            ValueError: the other one compared other things, or other images.
        """
        for image_id, matches in state.items():
            if matches.keys() != self._tasks.keys():
                raise ValueError(f"the states differ in what they compare: {list(matches)}, here {list(self._tasks)}")
            if any(image_id not in task.truth.imgs for task in self._tasks.values()):
                raise ValueError(f"image_id {image_id!r} of the other state is not in the ground truth")
            self._images.setdefault(image_id, dict(matches))

    def metrics(self) -> dict[IouType, CocoMetrics]:
        """The numbers over the images added so far; more can be added afterwards."""
        return {
            iou_type: summarize(
                task,
                *accumulate(task, {image_id: matches[iou_type] for image_id, matches in self._images.items()}),
                self._images,
            )
            for iou_type, task in self._tasks.items()
        }
