"""Features of regions of interest: RoIAlign on one map or a pyramid, and RoIPool."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torchvision
from torch import Tensor

from fastmrcnn.ops.checks import as_rois, check, check_pyramid, pair
from fastmrcnn.ops.implementations import Impl, choose_kernel
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.reference.canvases import cells
from fastmrcnn_kernels.reference.roi_align import assign_levels

Interpolation = Literal["bilinear", "bicubic"]
Sampling = Literal["average", "corner"]
LevelRule = Literal["torchvision", "detectron2", "mmdetection", "maskrcnn_benchmark"]


def _choose_sampler(
    op: str, impl: str, features: Tensor, interpolation: str, sampling: str, partial: bool = False
) -> tuple[str, Callable[..., Any]]:
    """Name and function of an implementation of `op` that samples so; ValueError for what there is not."""
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation={interpolation!r}: expected 'bilinear' or 'bicubic'")
    if sampling not in ("average", "corner"):
        raise ValueError(f"sampling={sampling!r}: expected 'average' or 'corner'")
    usual = interpolation == "bilinear" and sampling == "average"
    if impl == "torchvision" and not usual:
        raise NotImplementedError("impl='torchvision' has interpolation='bilinear' with sampling='average' only")
    if partial and impl in ("torchvision", "torch"):
        raise NotImplementedError(f"impl={impl!r} has no extents: use impl='auto', 'reference' or 'triton'")
    without_kernel = "torch" if on_host(features) else "torchvision" if usual else "reference"
    if partial:
        without_kernel = "reference"
    return choose_kernel(op, impl, features, without_kernel)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    interpolation: Interpolation = "bilinear",
    sampling: Sampling = "average",
    impl: Impl = "auto",
) -> Tensor:
    """RoIAlign (Mask R-CNN), by default with the semantics of `torchvision.ops.roi_align`.

    Args:
        input: features [N, C, H, W].
        boxes: RoIs [R, 5] (batch index, x1, y1, x2, y2), or one [L, 4] per image.  No gradient reaches them.  A batch
            index outside 0 .. N - 1, such as the -1 of padding, and a box that is not finite give zeros.
        output_size: bins (height, width), or one int for both.
        spatial_scale: cells of `input` per pixel of `boxes`.
        sampling_ratio: samples per bin and axis; not positive: ceil(RoI extent / bins), as detectron2 does.
        aligned: shift boxes by half a cell, so that cell centres lie at integers + 0.5 (detectron2's ROIAlignV2).
        interpolation: between cells; `"bicubic"` is Keys' with a = -0.75, as PyTorch's, cells repeated at the border.
        sampling: `"average"` of the samples of a bin; or one sample per bin, the first and last at the `"corner"`s of
            the box and none outside the map counting (TensorFlow's `crop_and_resize`, with boxes in cells).

    Returns:
        [R, C, height, width] in the dtype of `input`; arithmetic in float32 (float64 for float64).
    """
    check("input", input, None, None, None, None)
    name, run = _choose_sampler("roi_align", impl, input, interpolation, sampling)
    sampler = () if name == "torchvision" else (interpolation, sampling)
    size = pair(output_size, "output_size")
    return run(input, as_rois(boxes), size, spatial_scale, sampling_ratio, aligned, *sampler)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    *,
    levels: Tensor | None = None,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    interpolation: Interpolation = "bilinear",
    sampling: Sampling = "average",
    extents: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """RoIAlign on a feature pyramid: each RoI is pooled from one level.

    Args:
        features: L maps [N, C, Hl, Wl], finest first.
        boxes, output_size, sampling_ratio, aligned, interpolation, sampling: as in `roi_align`.
        spatial_scales: cells per pixel of each level, a power of two, for example (1/4, 1/8, 1/16, 1/32).
        levels: level 0 .. L - 1 of each RoI, int64 [R]; by default from its area by equation 1 of the FPN paper,
            floor(`canonical_level` + log2(sqrt(area) / `canonical_scale`)), as torchvision's `MultiScaleRoIAlign`.
            A RoI of another level pools to zeros.
        extents: rows and columns of the maps that belong to each image, int64 [N, L, 2], as if the others were not
            there; by default all.  The kernel has no gradient then.

    Returns:
        [R, C, height, width] in the dtype of the features.
    """
    if not features or len(features) != len(spatial_scales):
        raise ValueError(f"spatial_scales: {len(spatial_scales)} given for {len(features)} feature maps")
    check_pyramid(features)
    rois = as_rois(boxes)
    if levels is not None:
        check("levels", levels, len(rois), dtype=torch.int64)
    if extents is not None:
        check("extents", extents, len(features[0]), len(features), 2, dtype=torch.int64)
    size = pair(output_size, "output_size")
    name, run = _choose_sampler("multilevel_roi_align", impl, features[0], interpolation, sampling, extents is not None)
    if name == "triton":
        sampler = (interpolation, sampling, canonical_scale, canonical_level)
        return run(features, rois, levels, size, spatial_scales, sampling_ratio, aligned, *sampler, extents)
    if levels is None:
        finest = round(-math.log2(spatial_scales[0]))
        levels = assign_levels(rois[:, 1:], len(features), finest, canonical_scale, canonical_level)
    return run(
        features,
        rois,
        levels,
        size,
        spatial_scales,
        sampling_ratio,
        aligned,
        *(() if name == "torchvision" else (interpolation, sampling)),
        *(() if extents is None else (extents,)),
    )


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """RoIPool (Fast R-CNN): the largest cell of each bin, with the semantics of `torchvision.ops.roi_pool`.

    Args:
        input: features [N, C, H, W].  A NaN is never the largest.
        boxes, output_size, spatial_scale: as in `roi_align`.  Corners are rounded to whole cells, and both count.

    Returns:
        [R, C, height, width] in the dtype of `input`; zero where a bin lies outside the map, -inf where no cell exceeds
        that.  The gradient goes to the first of equal cells, row by row.
    """
    check("input", input, None, None, None, None)
    _, run = choose_kernel("roi_pool", impl, input, "torchvision")
    return run(input, as_rois(boxes), pair(output_size, "output_size"), spatial_scale)


class MultiScaleRoIAlign(torchvision.ops.MultiScaleRoIAlign):
    """`torchvision.ops.MultiScaleRoIAlign`: constructor, call and result.

    The scale of a level is inferred from each call's shapes; torchvision keeps those of its first call.

    Args:
        featmap_names, output_size, sampling_ratio, canonical_scale, canonical_level: torchvision's.
        aligned: as in `roi_align`.
        level_rule: whose equation 1 of the FPN paper: torchvision's, with 1e-6 added to the logarithm, or that of
            detectron2, mmdetection or maskrcnn_benchmark, with 1e-8, 1e-6 and 1e-6 added to its argument.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        level_rule: LevelRule = "torchvision",
    ) -> None:
        super().__init__(
            featmap_names,
            output_size,
            sampling_ratio,
            canonical_scale=canonical_scale,
            canonical_level=canonical_level,
        )
        self.aligned = aligned
        self.level_rule: LevelRule = level_rule

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool `boxes`, [L, 4] per image, from the maps of `x` named in `featmap_names`: [sum of L, C, P, P].

        `image_shapes` are the (height, width) of the images as they entered the network.
        """
        return pool_like(self, x, as_rois(boxes), max(height for height, _ in image_shapes))


def pool_like(
    pooler: torchvision.ops.MultiScaleRoIAlign,
    features: Mapping[str, Tensor],
    rois: Tensor,
    image_height: int,
    canvases: Tensor | None = None,
) -> Tensor:
    """RoI features [R, C, P, P] of `rois` [R, 5] by the options of `pooler`, from those `features` that it names.

    Cells per pixel are the height of each map over `image_height`, rounded to a power of two: torchvision's rule.  Of
    images with `canvases`, (height, width) int64 [N, 2] in pixels, maps end with these.
    """
    maps = [feature for name, feature in features.items() if name in pooler.featmap_names]
    halvings = [round(math.log2(image_height / feature.shape[-2])) for feature in maps]
    aligned = getattr(pooler, "aligned", False)
    rule: LevelRule = getattr(pooler, "level_rule", "torchvision")
    levels = None
    if rule != "torchvision" and len(maps) > 1:
        levels = levels_by(rule, rois[:, 1:], len(maps), halvings[0], pooler.canonical_scale, pooler.canonical_level)
    extents = None
    if canvases is not None:
        extents = torch.stack([cells(canvases, 2**times) for times in halvings], dim=1)
    return multilevel_roi_align(
        maps,
        rois,
        pooler.output_size,
        [0.5**times for times in halvings],
        pooler.sampling_ratio,
        aligned,
        levels=levels,
        canonical_scale=pooler.canonical_scale,
        canonical_level=pooler.canonical_level,
        extents=extents,
    )


def levels_by(
    rule: LevelRule, boxes: Tensor, num_levels: int, finest_level: int, canonical_scale: float, canonical_level: int
) -> Tensor:
    """Pyramid level 0 .. `num_levels` - 1 of `boxes` [R, 4] by the equation of a library: int64 [R].

    A box of area `canonical_scale`^2 belongs to level `canonical_level`, where level 0 of the result is `finest_level`.
    """
    if rule == "torchvision":
        return assign_levels(boxes, num_levels, finest_level, canonical_scale, canonical_level)
    extent = boxes[:, 2:] - boxes[:, :2]
    scale = torch.sqrt(extent[:, 0] * extent[:, 1])
    if rule in ("detectron2", "maskrcnn_benchmark"):
        least = 1e-8 if rule == "detectron2" else 1e-6
        level = torch.floor(canonical_level + torch.log2(scale / canonical_scale + least)) - finest_level
    elif rule == "mmdetection":
        finest_scale = canonical_scale / 2 ** (canonical_level - finest_level)
        level = torch.floor(torch.log2(scale / finest_scale + 1e-6))
    else:
        raise ValueError(f"level_rule={rule!r}: expected one of {', '.join(get_args(LevelRule))}")
    return level.clamp(0, num_levels - 1).nan_to_num(0).to(torch.int64)
