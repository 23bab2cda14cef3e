"""RoIAlign as two small matrix products per RoI.

The sample grid of a bin is a product of y and x positions, bilinear weights are products, and the rule "a sample
outside [-1, H] x [-1, W] counts 0" is a product of two indicators.  So for one RoI and one channel

    out[p, q] = sum_y sum_x Wy[p, y] * F[y, x] * Wx[q, x]            out = Wy F Wx^T

with Wy [P, H] and Wx [Q, W] computed from the box alone.  Same numbers as torchvision's, which visits every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 1 << 24
"""How many feature values are gathered at a time: RoIs are taken in chunks, so memory does not grow with them."""


def axis_weights(
    start: Tensor,
    extent: Tensor,
    bins: int,
    length: int,
    sampling_ratio: int,
    interpolation: str = "bilinear",
    sampling: str = "average",
    limit: Tensor | None = None,
) -> Tensor:
    """Weight of each of `length` cells in each of `bins` bins of an interval: [R, bins, length].

    The intervals are [start, start + extent]; `start`, `extent` [R] are in cells.  Each bin averages `sampling_ratio`
    evenly spaced interpolations, or ceil(extent / bins) of them where that is not positive.  Then the number of samples
    depends on the RoI, but they are more than half a cell apart, or there is just one, so no more than five of them lie
    within one cell of a given cell (bicubic: nine within two), and each cell looks at so many candidates and one more,
    whatever the size of the RoI.  With a `limit` [R] only so many of the cells are there.
    """
    reach = 2 if interpolation == "bicubic" else 1
    cell = torch.arange(length, device=start.device, dtype=start.dtype)[:, None]
    start, extent = start[:, None, None, None], extent[:, None, None, None]
    index = torch.arange(bins, device=start.device)[:, None, None]
    there = start.new_full((1, 1, 1, 1), length) if limit is None else limit[:, None, None, None].to(start.dtype)
    if sampling == "corner":
        bin_size, grid = extent / max(bins - 1, 1), torch.ones_like(extent)
        position = start + (extent / 2 if bins == 1 else index * bin_size)
        counts = (position >= 0) & (position <= there - 1)
    else:
        bin_size = extent / bins
        origin = start + index * bin_size
        if sampling_ratio > 0:
            grid = torch.full_like(bin_size, sampling_ratio)
            sample = torch.arange(sampling_ratio, device=start.device, dtype=start.dtype)
        else:
            grid = bin_size.ceil()
            first = ((cell - reach - origin) / (bin_size / grid) - 0.5).floor().clamp(min=0)
            sample = first + torch.arange(4 * reach + 2, device=start.device)
        position = origin + (sample + 0.5) * bin_size / grid
        counts = (sample < grid) & (position >= -1) & (position <= there)
    weight = INTERPOLATIONS[interpolation](cell, position.minimum(there - 1).clamp(min=0), there)
    return torch.where(counts & (cell < there), weight, 0).sum(dim=-1) / torch.where(grid >= 1, grid, 1).squeeze(
        -1
    )  # NaN is not


def bilinear(cell: Tensor, position: Tensor, length: Tensor) -> Tensor:
    """Weight of `cell` in the linear interpolation at `position`, on a map of `length` cells."""
    return (1 - (cell - position).abs()).clamp(min=0)


def bicubic(cell: Tensor, position: Tensor, length: Tensor) -> Tensor:
    """The same for Keys' cubic kernel with a = -0.75 (PyTorch's), where a border cell stands for those beyond it."""

    def keys(distance: Tensor) -> Tensor:
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))

    below = torch.where(cell == 0, keys(position + 1), 0)
    above = torch.where(cell == length - 1, keys(length - position), 0)
    return keys((cell - position).abs()) + below + above


INTERPOLATIONS = {"bilinear": bilinear, "bicubic": bicubic}


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    interpolation: str = "bilinear",
    sampling: str = "average",
    extents: Tensor | None = None,
) -> Tensor:
    """See `fastmrcnn.ops.roi_align`; `rois` [R, 5] are (batch index, x1, y1, x2, y2).

    `extents` [N, 2] are the rows and columns of the map that belong to each image, by default all.
    """
    num_images, channels, height, width = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    image, boxes = rois[:, 0], rois[:, 1:].detach().to(dtype) * spatial_scale - (0.5 if aligned else 0.0)
    present = (image >= 0) & (image < num_images) & rois[:, 1:].isfinite().all(dim=1)
    image = torch.where(present, image, 0).to(torch.int64)
    extent = boxes[:, 2:] - boxes[:, :2]
    if not aligned and sampling == "average":
        extent = extent.clamp(min=1)

    pooled = []
    options = (sampling_ratio, interpolation, sampling)
    chunk = max(1, ELEMENTS_AT_ONCE // max(1, channels * height * width))
    for part in torch.arange(len(rois), device=rois.device).split(chunk):
        rows, columns = (None, None) if extents is None else extents[image[part]].unbind(1)
        wx = axis_weights(boxes[part, 0], extent[part, 0], output_size[1], width, *options, columns)
        wy = axis_weights(boxes[part, 1], extent[part, 1], output_size[0], height, *options, rows)
        bins = wy[:, None] @ features[image[part]].to(dtype) @ wx[:, None].mT
        pooled.append(torch.where(present[part, None, None, None], bins, 0))
    return torch.cat(pooled).to(features.dtype) if pooled else features.new_zeros(0, channels, *output_size)


def assign_levels(
    boxes: Tensor, num_levels: int, finest_level: int, canonical_scale: float, canonical_level: int
) -> Tensor:
    """Pyramid level 0 .. `num_levels` - 1 of `boxes` [R, 4] by equation 1 of the FPN paper: int64 [R].

    A box of area `canonical_scale`^2 belongs to level `canonical_level`, where level 0 of the result is
    `finest_level`.  Same operations as torchvision's `LevelMapper`, so equal at every edge.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    scale = torch.sqrt(extent[:, 0] * extent[:, 1])
    level = torch.floor(canonical_level + torch.log2(scale / canonical_scale) + 1e-6) - finest_level
    return level.clamp(0, num_levels - 1).nan_to_num(0).to(torch.int64)


@lru_cache
def level_bounds(num_levels: int, finest_level: int, canonical_scale: float, canonical_level: int) -> tuple[float, ...]:
    """The least square root of an area, a float32, that `assign_levels` gives each level from 1 on.

    Found by bisection on that function over the bits of positive floats, which are ordered as the floats are.
    """
    low = torch.full((num_levels - 1,), 1e-15).view(torch.int32)
    high = torch.full((num_levels - 1,), 1e15).view(torch.int32)
    wanted = torch.arange(1, num_levels)
    while (high - low).amax() > 1 if num_levels > 1 else False:
        middle = low + (high - low) // 2
        size = middle.view(torch.float32)
        square = torch.stack((0 * size, 0 * size, size, size), dim=1)  # sqrt(size * size) is size
        reached = assign_levels(square, num_levels, finest_level, canonical_scale, canonical_level) >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return tuple(high.view(torch.float32).tolist())


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    interpolation: str = "bilinear",
    sampling: str = "average",
    extents: Tensor | None = None,
) -> Tensor:
    """See `fastmrcnn.ops.multilevel_roi_align`; `levels` [R] are given."""
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], *output_size)
    for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
        here = torch.cat((torch.where(levels == level, rois[:, 0], -1)[:, None], rois[:, 1:]), dim=1)
        semantics = (output_size, scale, sampling_ratio, aligned, interpolation, sampling)
        pooled = pooled + roi_align(feature, here, *semantics, None if extents is None else extents[:, level])
    return pooled
