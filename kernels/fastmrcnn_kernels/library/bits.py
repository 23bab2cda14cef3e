"""Overlaps of packed masks as a PyTorch operator."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define("fastmrcnn::mask_iou", "(Tensor a, Tensor b, Tensor? crowd) -> Tensor")


implement("mask_iou", "mask_iou", "mask_iou")


@torch.library.register_fake("fastmrcnn::mask_iou")
def _iou_shape(a: Tensor, b: Tensor, crowd: Tensor | None) -> Tensor:
    return torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)


def mask_iou(a: Tensor, b: Tensor, crowd: Tensor | None = None) -> Tensor:
    """See `fastmrcnn_kernels.reference.bits.mask_iou`."""
    return torch.ops.fastmrcnn.mask_iou(a, b, crowd)
