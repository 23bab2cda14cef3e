"""The selection of detections as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement
from fastmrcnn_kernels.selection import Selection

torch.library.define(
    "fastmrcnn::select_detections",
    "(Tensor logits, Tensor deltas, Tensor proposals, Tensor counts, Tensor sizes, float score_threshold, "
    "float iou_threshold, SymInt max_detections, float min_size, float[] weights, bool class_agnostic) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
implement("select_detections", "detections", "select_detections")


@torch.library.register_fake("fastmrcnn::select_detections")
def _detections_shape(
    logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor, *selection: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = logits.new_empty(logits.shape[0], Selection(*selection).max_detections, dtype=torch.float32)
    labels = torch.empty_like(scores, dtype=torch.int64)
    return scores.new_empty(*scores.shape, 4), scores, labels, labels.new_empty(logits.shape[0])


def select_detections(
    logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastmrcnn.ops.select_detections`."""
    return torch.ops.fastmrcnn.select_detections(logits, deltas, proposals, counts, sizes, *selection)
