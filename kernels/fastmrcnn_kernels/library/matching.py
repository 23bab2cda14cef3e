"""The matching of boxes to objects as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define(
    "fastmrcnn::match_boxes",
    "(Tensor boxes, Tensor truth, Tensor count, float high, float low, bool allow_low_quality) -> Tensor",
)


implement("match_boxes", "matching", "match_boxes")


@torch.library.register_fake("fastmrcnn::match_boxes")
def _matched_shape(boxes: Tensor, truth: Tensor, *rest: Any) -> Tensor:
    return boxes.new_empty(truth.shape[0], boxes.shape[1], dtype=torch.int64)


def match_boxes(
    boxes: Tensor, truth: Tensor, count: Tensor, high: float, low: float, allow_low_quality: bool
) -> Tensor:
    """See `fastmrcnn.ops.match_boxes`."""
    return torch.ops.fastmrcnn.match_boxes(boxes, truth, count, high, low, allow_low_quality)
