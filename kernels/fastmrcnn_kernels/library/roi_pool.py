"""RoIPool as a PyTorch operator, which also returns where the maxima are, for its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define(
    "fastmrcnn::roi_pool", "(Tensor features, Tensor rois, SymInt[] output_size, float scale) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastmrcnn::roi_pool_backward",
    "(Tensor pooled, Tensor position, Tensor rois, SymInt num_images, SymInt height, SymInt width, float scale) "
    "-> Tensor",
)


implement("roi_pool", "roi_pool", "roi_pool_forward")
implement("roi_pool_backward", "roi_pool", "roi_pool_backward")


@torch.library.register_fake("fastmrcnn::roi_pool")
def _pooled_shape(features: Tensor, rois: Tensor, output_size: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    pooled = features.new_empty(rois.shape[0], *output_size, features.shape[1]).permute(0, 3, 1, 2)
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


@torch.library.register_fake("fastmrcnn::roi_pool_backward")
def _gradient_shape(
    pooled: Tensor, position: Tensor, rois: Tensor, num_images: int, height: int, width: int, scale: float
) -> Tensor:
    return pooled.new_empty(num_images, height, width, pooled.shape[1]).permute(0, 3, 1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, rois, _, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], rois)
    ctx.num_images, _, ctx.height, ctx.width = features.shape


def _backward(ctx: Any, pooled: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    position, rois = ctx.saved_tensors
    gradient = torch.ops.fastmrcnn.roi_pool_backward(
        pooled, position, rois, ctx.num_images, ctx.height, ctx.width, ctx.scale
    )
    return gradient, None, None, None


torch.library.register_autograd("fastmrcnn::roi_pool", _backward, setup_context=_save_for_backward)


def roi_pool(features: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float) -> Tensor:
    """See `fastmrcnn.ops.roi_pool`."""
    return torch.ops.fastmrcnn.roi_pool(features, rois, output_size, spatial_scale)[0]
