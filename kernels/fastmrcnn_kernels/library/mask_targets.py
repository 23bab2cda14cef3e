"""Targets of the mask head as a PyTorch operator; they have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define(
    "fastmrcnn::mask_targets",
    "(Tensor words, Tensor offsets, Tensor views, Tensor boxes, Tensor matched, Tensor valid, SymInt size) -> Tensor",
)
implement("mask_targets", "mask_targets", "mask_targets")


@torch.library.register_fake("fastmrcnn::mask_targets")
def _targets_shape(
    words: Tensor, offsets: Tensor, views: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, size: int
) -> Tensor:
    return boxes.new_empty(*boxes.shape[:2], size, size)


def mask_targets(
    words: Tensor, offsets: Tensor, views: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, size: int
) -> Tensor:
    """See `fastmrcnn.ops.mask_targets`."""
    return torch.ops.fastmrcnn.mask_targets(words, offsets, views, boxes, matched, valid, size)
