"""Greedy non-maximum suppression of sorted segments: which of two kernels, by shape.  Both give the same result."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.triton.nms_matrix import nms_by_matrix
from fastmrcnn_kernels.triton.nms_stream import nms_by_stream

STREAM_AT_MOST, STREAM_FROM = 256, 2048
"""The stream is for at most so many survivors of at least so many boxes per segment: it ends when it has them."""


def sorted_nms(
    boxes: Tensor, alive: Tensor, groups: Tensor | None, order: Tensor | None, threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """See `fastmrcnn_kernels.library.nms.sorted_nms`."""
    segments, num_boxes = alive.shape
    if not (segments and num_boxes and max_keep):
        kept = torch.full((segments, max_keep), -1, dtype=torch.int64, device=boxes.device)
        return kept, kept.new_zeros(segments)
    run = nms_by_stream if max_keep <= STREAM_AT_MOST and num_boxes >= STREAM_FROM else nms_by_matrix
    groups, order = (None if x is None else x.contiguous() for x in (groups, order))
    return run(boxes.float().contiguous(), alive.contiguous().view(torch.uint8), groups, order, threshold, max_keep)
