"""COCO's evaluation one image at a time, with pycocotools' own code for both of its halves.

Matching (`COCOeval.evaluateImg`) looks at one image. Accumulation (`COCOeval.accumulate`) needs of each image only the
scores and, per detection, two bits for every IoU threshold and area range. That is all that is kept.
"""

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastmrcnn.coco_metrics import CocoTask

__all__ = ["ImageMatches", "accumulate", "match_image"]


class ImageMatches(NamedTuple):
    """What counts of one image; its detections lie category by category, in each the best scored first.

    Shapes: C categories that occur in the image, D detections, A area ranges, T IoU thresholds. The flags of a
    detection, one per area range and threshold, are bits: about 14 bytes per detection in all.
    """

    categories: NDArray[np.int32]  # [C], positions in the task's list of categories
    ends: NDArray[np.int32]  # [C], where the detections of each end
    objects: NDArray[np.int32]  # [C, A], ground truth to be found
    scores: NDArray[Any]  # [D], float32 where that is exact, else float64
    matched: NDArray[np.uint8]  # [D, ceil(A * T / 8)]
    ignored: NDArray[np.uint8]  # [D, ceil(A * T / 8)]


def match_image(task: CocoTask, image_id: int, detections: Sequence[dict[str, Any]]) -> ImageMatches:
    """Match the detections of one image with its ground truth.

    Args:
        task: what to measure.
        image_id: an image of the ground truth.
        detections: the image's results as :func:`fastmrcnn.coco_records.check_results` returns them.
    """
    parameters = copy.copy(task.parameters)
    parameters.imgIds = [image_id]
    occurring = {record["category_id"] for record in (*task.truth.imgToAnns.get(image_id, ()), *detections)}
    parameters.catIds = [category_id for category_id in parameters.catIds if category_id in occurring]
    # Only what COCOeval asks for: an index of its own would cost more than the matching.
    results = COCO()
    results.imgs = task.truth.imgs
    results.anns = {detection["id"]: detection for detection in detections}
    results.imgToAnns = {image_id: list(detections)}

    evaluator = COCOeval(iouType=task.iou_type)
    evaluator.cocoGt, evaluator.cocoDt, evaluator.params = task.truth, results, parameters
    evaluator._prepare()
    compute = evaluator.computeOks if task.iou_type == "keypoints" else evaluator.computeIoU
    positions, ends, objects, scores, matched, ignored = [], [], [], [], [], []
    keys = parameters.catIds if parameters.useCats else [-1] * bool(occurring)
    for key in keys:
        evaluator.ious = {(image_id, key): compute(image_id, key)}
        areas = [evaluator.evaluateImg(image_id, key, area, parameters.maxDets[-1]) for area in parameters.areaRng]
        if areas[0] is None:  # only annotations of categories that the ground truth does not list
            continue
        positions.append(task.parameters.catIds.index(key) if parameters.useCats else 0)
        scores += areas[0]["dtScores"]
        ends.append(len(scores))
        objects.append([np.count_nonzero(np.asarray(area["gtIgnore"]) == 0) for area in areas])
        matched.append(_pack([area["dtMatches"] for area in areas]))
        ignored.append(_pack([area["dtIgnore"] for area in areas]))
    exact = np.asarray(scores, dtype=np.float64)
    with np.errstate(over="ignore"):
        short = exact.astype(np.float32)
    width = _num_bytes(task)
    return ImageMatches(
        np.asarray(positions, dtype=np.int32),
        np.asarray(ends, dtype=np.int32),
        np.asarray(objects, dtype=np.int32).reshape(-1, len(parameters.areaRng)),
        short if np.array_equal(short, exact) else exact,
        np.concatenate([np.zeros((0, width), dtype=np.uint8), *matched]),
        np.concatenate([np.zeros((0, width), dtype=np.uint8), *ignored]),
    )


def accumulate(task: CocoTask, images: Mapping[int, ImageMatches]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [T, R, K, A, M] and recall [T, K, A, M] over IoU thresholds, recalls, categories, areas and limits.

    Args:
        task: what was measured.
        images: what :func:`match_image` returned, by image id. Detections of equal score count in the order of these
            ids, whatever the order of the mapping.
    """
    parameters = task.parameters
    num_classes = len(parameters.catIds) if parameters.useCats else 1
    num_thresholds, num_areas = len(parameters.iouThrs), len(parameters.areaRng)
    ends = (num_classes, num_areas, len(parameters.maxDets))
    precision = -np.ones((num_thresholds, len(parameters.recThrs), *ends))
    recall = -np.ones((num_thresholds, *ends))
    where: dict[int, list[tuple[ImageMatches, int]]] = {}
    for image_id in sorted(images):
        for i, k in enumerate(images[image_id].categories.tolist()):
            where.setdefault(k, []).append((images[image_id], i))
    # One category at a time, so that no more than one is unpacked.
    for k, places in where.items():
        unpacked = [_unpack(task, image, i) for image, i in places]
        evaluator = COCOeval(iouType=task.iou_type)
        evaluator.evalImgs = [areas[a] for a in range(num_areas) for areas in unpacked]
        evaluator.params = copy.copy(parameters)
        evaluator.params.catIds = [parameters.catIds[k]] if parameters.useCats else [-1]
        evaluator.params.imgIds = list(range(len(places)))
        evaluator._paramsEval = evaluator.params
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.accumulate()
        precision[:, :, k] = evaluator.eval["precision"][:, :, 0]
        recall[:, k] = evaluator.eval["recall"][:, 0]
    return precision, recall


def _num_bytes(task: CocoTask) -> int:
    return -(-len(task.parameters.areaRng) * len(task.parameters.iouThrs) // 8)


def _pack(flags: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Arrays [T, D], one per area range, as bits: [D, ceil(A * T / 8)]."""
    bits = np.concatenate([np.asarray(flag, dtype=bool) for flag in flags])
    return np.packbits(bits.T, axis=1)


def _unpack(task: CocoTask, image: ImageMatches, i: int) -> list[dict[str, Any]]:
    """What COCOeval keeps of an image and category, as far as it accumulates it; one dict per area range."""
    num_areas, num_thresholds = len(task.parameters.areaRng), len(task.parameters.iouThrs)
    rows = slice(int(image.ends[i - 1]) if i else 0, int(image.ends[i]))
    shape = (num_areas, num_thresholds, rows.stop - rows.start)
    matched, ignored = (
        np.unpackbits(bits[rows], axis=1, count=num_areas * num_thresholds).T.reshape(shape)
        for bits in (image.matched, image.ignored)
    )
    scores = image.scores[rows].astype(np.float64)
    return [
        {
            "dtScores": scores,
            "dtMatches": matched[a],
            "dtIgnore": ignored[a],
            "gtIgnore": np.zeros(image.objects[i, a]),  # those to be ignored have no other effect
        }
        for a in range(num_areas)
    ]
