"""Which candidates are detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Selection(NamedTuple):
    """Limits and semantics of the selection of detections.

    Attributes:
        score_threshold: scores of candidates exceed it.
        iou_threshold: overlaps above it suppress.
        max_detections: at most so many detections per image.
        min_size: shortest side of a candidate, in pixels.
        weights: of dx, dy, dw, dh.
        class_agnostic: suppresses across classes, too.
    """

    score_threshold: float
    iou_threshold: float
    max_detections: int
    min_size: float
    weights: Sequence[float]
    class_agnostic: bool
