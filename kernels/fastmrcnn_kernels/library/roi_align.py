"""Multi-level RoIAlign as a PyTorch operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.host import KERNEL_DEVICES
from fastmrcnn_kernels.reference.roi_align import level_bounds
from fastmrcnn_kernels.sampler import Sampler

_SEMANTICS = (
    "float[] scales, int sampling_ratio, bool aligned, str interpolation, str sampling, "
    "float canonical_scale, int canonical_level"
)
torch.library.define(
    "fastmrcnn::multilevel_roi_align",
    f"(Tensor[] features, Tensor rois, Tensor? levels, SymInt[] output_size, {_SEMANTICS}, Tensor? extents=None) "
    "-> Tensor",
)
torch.library.define(
    "fastmrcnn::multilevel_roi_align_backward",
    "(Tensor pooled, Tensor rois, Tensor? levels, SymInt num_images, SymInt[] heights, SymInt[] widths, "
    f"{_SEMANTICS}) -> Tensor[]",
)


@torch.library.impl("fastmrcnn::multilevel_roi_align", KERNEL_DEVICES)
def _multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    interpolation: str,
    sampling: str,
    canonical_scale: float,
    canonical_level: int,
    extents: Tensor | None = None,
) -> Tensor:
    from fastmrcnn_kernels.triton.roi_align import roi_align_forward

    sampler = Sampler(sampling_ratio, aligned, interpolation == "bicubic", sampling == "corner")
    bounds = _bounds(levels, scales, canonical_scale, canonical_level)
    return roi_align_forward(features, rois, levels, output_size, scales, sampler, bounds, extents)


@torch.library.impl("fastmrcnn::multilevel_roi_align_backward", KERNEL_DEVICES)
def _multilevel_roi_align_backward(
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    interpolation: str,
    sampling: str,
    canonical_scale: float,
    canonical_level: int,
) -> list[Tensor]:
    from fastmrcnn_kernels.triton.roi_align_backward import roi_align_backward

    sampler = Sampler(sampling_ratio, aligned, interpolation == "bicubic", sampling == "corner")
    bounds = _bounds(levels, scales, canonical_scale, canonical_level)
    return roi_align_backward(pooled, rois, levels, num_images, heights, widths, scales, sampler, bounds)


def _bounds(
    levels: Tensor | None, scales: Sequence[float], canonical_scale: float, canonical_level: int
) -> tuple[float, ...]:
    if levels is not None:
        return ()
    return level_bounds(len(scales), round(-math.log2(scales[0])), canonical_scale, canonical_level)


@torch.library.register_fake("fastmrcnn::multilevel_roi_align")
def _pooled_shape(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, output_size: Sequence[int], *semantics: Any
) -> Tensor:
    return features[0].new_empty(rois.shape[0], *output_size, features[0].shape[1]).permute(0, 3, 1, 2)


@torch.library.register_fake("fastmrcnn::multilevel_roi_align_backward")
def _gradient_shapes(
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    *semantics: Any,
) -> list[Tensor]:
    channels = pooled.shape[1]
    shapes = zip(heights, widths, strict=True)
    return [pooled.new_empty(num_images, *shape, channels).permute(0, 3, 1, 2) for shape in shapes]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, _, *semantics, _ = inputs
    ctx.semantics = semantics
    ctx.save_for_backward(rois, levels)
    ctx.num_images = features[0].shape[0]
    ctx.heights, ctx.widths = [x.shape[2] for x in features], [x.shape[3] for x in features]


def _backward(ctx: Any, pooled: Tensor) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    gradients = torch.ops.fastmrcnn.multilevel_roi_align_backward(
        pooled, rois, levels, ctx.num_images, ctx.heights, ctx.widths, *ctx.semantics
    )
    return gradients, *[None] * (4 + len(ctx.semantics))


torch.library.register_autograd("fastmrcnn::multilevel_roi_align", _backward, setup_context=_save_for_backward)


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    interpolation: str = "bilinear",
    sampling: str = "average",
    canonical_scale: float = 224,
    canonical_level: int = 4,
    extents: Tensor | None = None,
) -> Tensor:
    """See `fastmrcnn.ops.multilevel_roi_align`; `levels` None: assigned inside the kernel."""
    if extents is not None and torch.is_grad_enabled() and any(feature.requires_grad for feature in features):
        raise NotImplementedError("multilevel_roi_align: with extents the kernel has no gradient: use impl='reference'")
    return torch.ops.fastmrcnn.multilevel_roi_align(
        features,
        rois,
        levels,
        output_size,
        scales,
        sampling_ratio,
        aligned,
        interpolation,
        sampling,
        canonical_scale,
        canonical_level,
        extents,
    )


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    interpolation: str = "bilinear",
    sampling: str = "average",
) -> Tensor:
    """See `fastmrcnn.ops.roi_align`: a pyramid of one level."""
    return multilevel_roi_align(
        [features], rois, None, output_size, [spatial_scale], sampling_ratio, aligned, interpolation, sampling
    )
