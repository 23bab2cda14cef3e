"""Preprocessing of images as a PyTorch operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement
from fastmrcnn_kernels.reference.images import affine

torch.library.define(
    "fastmrcnn::resize_images",
    "(Tensor pixels, Tensor offsets, Tensor views, SymInt height, SymInt width, float[] scale, float[] shift, "
    "ScalarType dtype) -> Tensor",
)
implement("resize_images", "images", "resize_images")


@torch.library.register_fake("fastmrcnn::resize_images")
def _batch_shape(
    pixels: Tensor, offsets: Tensor, views: Tensor, height: int, width: int, scale: Sequence[float], *rest: Any
) -> Tensor:
    return pixels.new_empty(len(views), height, width, len(scale), dtype=rest[-1]).permute(0, 3, 1, 2)


def resize_images(
    pixels: Tensor,
    offsets: Tensor,
    views: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See `fastmrcnn.ops.resize_images`."""
    return torch.ops.fastmrcnn.resize_images(pixels, offsets, views, *size, *affine(mean, std), dtype)
