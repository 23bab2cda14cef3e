"""The selection of detections as a PyTorch operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn_kernels.host import KERNEL_DEVICES

torch.library.define(
    "fastmrcnn::select_detections",
    "(Tensor logits, Tensor deltas, Tensor proposals, Tensor counts, Tensor sizes, float score_threshold, "
    "float iou_threshold, SymInt max_detections, float min_size, float[] weights, bool class_agnostic) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastmrcnn::select_detections", KERNEL_DEVICES)
def _select_detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    sizes: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    min_size: float,
    weights: Sequence[float],
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastmrcnn_kernels.triton import detections

    return detections.select_detections(
        logits,
        deltas,
        proposals,
        counts,
        sizes,
        score_threshold,
        iou_threshold,
        max_detections,
        min_size,
        weights,
        class_agnostic,
    )


@torch.library.register_fake("fastmrcnn::select_detections")
def _detections_shape(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    sizes: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    min_size: float,
    weights: Sequence[float],
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = logits.new_empty(logits.shape[0], max_detections, dtype=torch.float32)
    labels = torch.empty_like(scores, dtype=torch.int64)
    return scores.new_empty(*scores.shape, 4), scores, labels, labels.new_empty(logits.shape[0])


def select_detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    sizes: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    min_size: float,
    weights: Sequence[float],
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastmrcnn.ops.select_detections`."""
    return torch.ops.fastmrcnn.select_detections(
        logits,
        deltas,
        proposals,
        counts,
        sizes,
        score_threshold,
        iou_threshold,
        max_detections,
        min_size,
        weights,
        class_agnostic,
    )
