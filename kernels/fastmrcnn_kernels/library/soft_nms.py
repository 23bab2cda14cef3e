"""Soft non-maximum suppression as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define(
    "fastmrcnn::soft_nms",
    "(Tensor boxes, Tensor scores, Tensor valid, Tensor? groups, bool gaussian, float iou_threshold, float sigma, "
    "float min_score, SymInt max_keep) -> (Tensor, Tensor, Tensor)",
)


implement("soft_nms", "soft_nms", "padded_soft_nms")


@torch.library.register_fake("fastmrcnn::soft_nms")
def _taken_shape(boxes: Tensor, scores: Tensor, valid: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    max_keep = rest[-1]
    indices = torch.empty(valid.shape[0], max_keep, dtype=torch.int64, device=boxes.device)
    return indices, torch.empty_like(indices, dtype=torch.float32), indices.new_empty(valid.shape[0])


def padded_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    groups: Tensor | None,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastmrcnn_kernels.reference.soft_nms.padded_soft_nms`; scores are float32."""
    return torch.ops.fastmrcnn.soft_nms(
        boxes, scores, valid, groups, method == "gaussian", iou_threshold, sigma, min_score, max_keep
    )
