"""COCO's evaluation by the C++ code of the package faster-coco-eval: all results at once, a few times as fast.

Its precision is the quotient of two counts. pycocotools adds 2.2e-16 to the divisor, which turns 1 / 1 into
1 - 2.2e-16 and changes no other quotient; in every other respect the two agree.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.coco_metrics import CocoTask

__all__ = ["accumulate_faster", "require_faster"]


def require_faster() -> None:
    """Raise ValueError, saying what to install, where the package is missing."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ValueError('backend="faster_coco_eval" needs the package faster-coco-eval: pip install "fastmrcnn[eval]"')


def accumulate_faster(
    task: CocoTask, detections: Sequence[dict[str, Any]], image_ids: Iterable[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [T, R, K, A, M] and recall [T, K, A, M], as :func:`fastmrcnn.coco_matching.accumulate` gives them.

    Args:
        task: what to measure; fields are added to its ground truth.
        detections: results as :func:`fastmrcnn.coco_records.check_results` returns them; fields are added.
        image_ids: the images to measure on.

    Raises:
        ValueError: the package is not installed, or an image or category id is not a whole number below 2^53 in size.
    """
    require_faster()
    from faster_coco_eval import COCO, COCOeval_faster

    # It passes ids through float64.
    for kind, ids in (("image", task.truth.imgs), ("category", task.truth.cats)):
        for i in ids:
            if not isinstance(i, int) or abs(i) >= 2**53:
                raise ValueError(f'backend="faster_coco_eval" cannot tell {kind} ids such as {i!r} apart')

    def indexed(annotations: Sequence[dict[str, Any]]) -> Any:
        coco = COCO()
        coco.dataset = {**task.truth.dataset, "annotations": annotations}
        coco.createIndex()
        return coco

    evaluator = COCOeval_faster(indexed(task.truth.dataset["annotations"]), indexed(detections), task.iou_type)
    for name in ("catIds", "useCats", "maxDets", "iouThrs", "recThrs", "areaRng", "areaRngLbl"):
        setattr(evaluator.params, name, getattr(task.parameters, name))
    if task.iou_type == "keypoints":
        evaluator.params.kpt_oks_sigmas = task.parameters.kpt_oks_sigmas
    evaluator.params.imgIds = sorted(image_ids)
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])
