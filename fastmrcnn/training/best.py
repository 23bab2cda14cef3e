"""Which evaluation was the best so far, and when to give up on a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastmrcnn.coco_metrics import CocoMetrics
from fastmrcnn.coco_records import IouType

__all__ = ["Best", "main_metric"]


def main_metric(metrics: Mapping[IouType, CocoMetrics]) -> float:
    """The average precision that decides which checkpoint is best: of masks, else keypoints, else boxes."""
    order: tuple[IouType, ...] = ("segm", "keypoints", "bbox")
    return next(metrics[iou_type].ap for iou_type in order if iou_type in metrics)


class Best:
    """The best evaluation so far.

    Args:
        patience: evaluations in a row without a better one after which training ends; None is never.

    Raises:
        ValueError: `patience` is less than 1.
    """

    def __init__(self, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.score = -math.inf
        self.waited = 0

    def improved(self, metrics: Mapping[IouType, CocoMetrics]) -> bool:
        """Take note of an evaluation; returns whether it is the first, or better than all before."""
        score = main_metric(metrics)
        better = score > self.score
        self.score = max(score, self.score)
        self.waited = 0 if better else self.waited + 1
        return better

    def exhausted(self) -> bool:
        """Whether as many evaluations as `patience` says have passed without a better one."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint has to hold; `patience` is the run's choice and no part of it."""
        return {"score": self.score, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self.score, self.waited = float(state["score"]), int(state["waited"])
