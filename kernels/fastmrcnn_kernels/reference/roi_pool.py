"""RoIPool (Fast R-CNN): the largest cell of each bin.  Maxima are separable: first along rows, then down columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn_kernels.reference.roi_align import ELEMENTS_AT_ONCE


def round_half_away(value: Tensor) -> Tensor:
    """`value` to the nearest integer, halves away from zero, as C rounds; `torch.round` takes them to even numbers."""
    whole = value.trunc()
    return whole + value.sign() * ((value - whole).abs() >= 0.5)


def cells_of_bins(start: Tensor, extent: Tensor, bins: int, length: int) -> Tensor:
    """Which of `length` cells each of `bins` bins of the cells `start` .. `start` + `extent` covers: [R, bins, length].

    A bin ends with the cell that its last fraction lies in, so neighbours may share one.
    """
    index = torch.arange(bins, device=start.device)
    cell = torch.arange(length, device=start.device)
    size = (extent / bins)[:, None]
    first = start[:, None] + (index * size).floor()
    end = start[:, None] + ((index + 1) * size).ceil()
    return (cell >= first[..., None]) & (cell < end[..., None])


def roi_pool(features: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float) -> Tensor:
    """See `fastmrcnn.ops.roi_pool`; `rois` [R, 5] are (batch index, x1, y1, x2, y2)."""
    num_images, channels, height, width = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    image = rois[:, 0]
    corners = round_half_away(rois[:, 1:].detach().to(dtype) * spatial_scale)
    extent = (corners[:, 2:] - corners[:, :2] + 1).clamp(min=1)
    present = (image >= 0) & (image < num_images) & extent.isfinite().all(dim=1)
    image = torch.where(present, image, 0).to(torch.int64)

    pooled = []
    chunk = max(1, ELEMENTS_AT_ONCE // max(1, channels * height * width))
    for part in torch.arange(len(rois), device=rois.device).split(chunk):
        columns = cells_of_bins(corners[part, 0], extent[part, 0], output_size[1], width)
        rows = cells_of_bins(corners[part, 1], extent[part, 1], output_size[0], height)
        cells = features[image[part]].to(dtype)
        bins = largest_cells(cells, rows, columns)
        pooled.append(torch.where(present[part, None, None, None], bins, 0))
    return torch.cat(pooled).to(features.dtype) if pooled else features.new_zeros(0, channels, *output_size)


def largest_cells(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Largest of `cells` [R, C, H, W] in each bin, which has `rows` [R, P, H] and `columns` [R, Q, W]: [R, C, P, Q]."""
    compared = torch.where(cells.isnan(), -torch.inf, cells).detach()
    across = [torch.where(columns[:, None, None, q], compared, -torch.inf).max(dim=3) for q in range(columns.shape[1])]
    largest, x = (torch.stack(parts, dim=3) for parts in zip(*across, strict=True))  # [R, C, H, Q]
    down = [torch.where(rows[:, None, p, :, None], largest, -torch.inf).max(dim=2) for p in range(rows.shape[1])]
    largest, y = (torch.stack(parts, dim=2) for parts in zip(*down, strict=True))  # [R, C, P, Q]
    index = y * cells.shape[3] + x.gather(2, y)
    found = cells.flatten(2).gather(2, index.flatten(2)).view_as(index)
    covers = rows.any(dim=2)[:, None, :, None] & columns.any(dim=2)[:, None, None, :]
    return torch.where(largest > -torch.inf, found, torch.where(covers, -torch.inf, 0.0))
