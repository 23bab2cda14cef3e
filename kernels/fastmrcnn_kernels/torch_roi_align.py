"""RoIAlign on a CPU: a sparse matrix, of bins by cells, times the features, by PyTorch's `embedding_bag`.

A bin is a weighted sum of cells, and a cell, in memory channels_last, a row of C numbers that lie side by side.  A sum
of rows by number is what `embedding_bag` is for, in which several channels are added at a time; and so is its gradient,
the transposed matrix times the gradient of the bins.  torchvision's operation adds number by number.

RoIs of one level that have equally many samples are taken together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastmrcnn_kernels.sampler import Sampler

ENTRIES_AT_ONCE = 1 << 23
"""How many weights of cells in bins are in memory at a time; RoIs are taken in chunks."""


class Axis(NamedTuple):
    """What R intervals of B bins see along an axis: numbers of cells, and their weights, both [R, B, entries]."""

    cells: Tensor
    weights: Tensor


def sampled(start: Tensor, end: Tensor, bins: int, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Size in cells of each of the bins of the intervals [`start`, `end`], and how many samples it has: floats [R]."""
    extent = end - start
    if sampler.corner:
        return extent / max(bins - 1, 1), torch.ones_like(extent)
    extent = extent if sampler.aligned else extent.clamp(min=1)
    bin_size = extent / bins
    return bin_size, bin_size.ceil() if sampler.sampling_ratio <= 0 else torch.full_like(extent, sampler.sampling_ratio)


def visited(start: Tensor, end: Tensor, bins: int, length: int, sampler: Sampler) -> Tensor:
    """How many samples of a bin are looked at, int64 [R]: all, or as many as there can be on a map of `length` cells.

    Where their number follows the box they are more than half a cell apart, or there is just one.  Two are added before
    the map and behind it, for the sake of rounding.
    """
    bin_size, grid = sampled(start, end, bins, sampler)
    if sampler.sampling_ratio <= 0 and not sampler.corner:
        grid = torch.minimum(grid, ((length + 1) / (bin_size / grid)).floor() + 5).clamp(min=0)
    return grid.nan_to_num(0).to(torch.int64)  # of inverted boxes none


def seen(start: Tensor, end: Tensor, bins: int, length: int, samples: int, sampler: Sampler) -> Axis:
    """Cells and weights of every bin, of intervals that all have so many `samples` to look at.

    Positions are computed in the order of operations of `reference/roi_align.py`, to the same bits.
    """
    bin_size, grid = (x[:, None, None] for x in sampled(start, end, bins, sampler))
    start, end = start[:, None, None], end[:, None, None]
    index = torch.arange(bins)[:, None]
    if sampler.corner:
        position = start + ((end - start) / 2 if bins == 1 else index * bin_size)
        counts = (position >= 0) & (position <= length - 1)
    else:
        origin = start + index * bin_size
        first = (((-1 - origin) / (bin_size / grid)).floor() - 2).clamp(min=0) if sampler.sampling_ratio <= 0 else 0
        sample = first + torch.arange(samples)
        position = origin + (sample + 0.5) * bin_size / grid
        counts = (sample < grid) & (position >= -1) & (position <= length)
    position = torch.where(counts, position, 0).clamp(0, length - 1)
    low = position.floor()
    beyond = position - low
    near = torch.arange(-1, 3) if sampler.bicubic else torch.arange(2)
    weights = torch.stack(keys(beyond) if sampler.bicubic else (1 - beyond, beyond), dim=-1)
    weights = torch.where(counts[..., None], weights, 0) / grid[..., None]
    cells = (low.to(torch.int64)[..., None] + near).clamp(0, length - 1)
    return merged(Axis(cells.flatten(2), weights.flatten(2)))


def keys(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the cells -1, 0, 1 and 2 at position `x` in 0 .. 1: Keys' cubic kernel with a = -0.75 (PyTorch's)."""

    def within(distance: Tensor) -> Tensor:
        return (1.25 * distance - 2.25) * distance * distance + 1

    def outside(distance: Tensor) -> Tensor:
        return ((-0.75 * distance + 3.75) * distance - 6) * distance + 3

    return outside(1 + x), within(x), within(1 - x), outside(2 - x)


def merged(axis: Axis) -> Axis:
    """The same sums of cells, with one entry for each cell between the first and last of a bin, if these are fewer."""
    first, last = axis.cells.aminmax(dim=2, keepdim=True)
    span = int((last - first).max()) + 1
    if span >= axis.cells.shape[2]:
        return axis
    weights = axis.weights.new_zeros(*axis.cells.shape[:2], span).scatter_add_(2, axis.cells - first, axis.weights)
    return Axis(torch.minimum(first + torch.arange(span), last), weights)


class Part(NamedTuple):
    """RoIs of a level that are taken together: their numbers [R], and `cells` and `weights` [R, P, Q, entries]."""

    rois: Tensor
    cells: Tensor
    weights: Tensor


def parts(
    rois: Tensor, here: Tensor, shape: Sequence[int], size: tuple[int, int], scale: float, sampler: Sampler
) -> Iterator[Part]:
    """Those RoIs of a level with features of `shape` that are `here` [R], in turn; what sees nothing is left out."""
    images, _, height, width = shape
    boxes = rois[:, 1:] * scale - (0.5 if sampler.aligned else 0.0)
    usable = here & (rois[:, 0] >= 0) & (rois[:, 0] < images) & (boxes[:, 2:] - boxes[:, :2]).isfinite().all(dim=1)
    numbers = usable.nonzero().squeeze(1)
    image = rois[numbers, 0].to(torch.int64)
    x1, y1, x2, y2 = boxes[numbers].unbind(dim=1)
    samples = torch.stack((visited(y1, y2, size[0], height, sampler), visited(x1, x2, size[1], width, sampler)), dim=1)
    grids, of_roi = samples.unique(dim=0, return_inverse=True)
    for i, (tall, wide) in enumerate(grids.tolist()):
        entries = size[0] * size[1] * tall * wide * (16 if sampler.bicubic else 4)
        if not entries:
            continue
        for r in (of_roi == i).nonzero().squeeze(1).split(max(1, ENTRIES_AT_ONCE // entries)):
            y = seen(y1[r], y2[r], size[0], height, tall, sampler)
            x = seen(x1[r], x2[r], size[1], width, wide, sampler)
            row = image[r, None, None] * height + y.cells
            cells = row[:, :, None, :, None] * width + x.cells[:, None, :, None, :]
            weights = y.weights[:, :, None, :, None] * x.weights[:, None, :, None, :]
            yield Part(numbers[r], cells.flatten(3), weights.flatten(3))


class MultilevelRoIAlign(torch.autograd.Function):
    """`multilevel_roi_align` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rois: Tensor,
        levels: Tensor,
        size: tuple[int, int],
        scales: Sequence[float],
        sampler: Sampler,
        *features: Tensor,
    ) -> Tensor:
        """Bins [R, C, P, Q] of all `features`, float32 or float64, laid out channels_last."""
        ctx.save_for_backward(rois, levels)
        ctx.semantics, ctx.shapes = (size, scales, sampler), [feature.shape for feature in features]
        channels = features[0].shape[1]
        pooled = rois.new_zeros(len(rois), size[0] * size[1], channels)
        for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
            table = feature.permute(0, 2, 3, 1).reshape(-1, channels)
            for part in parts(rois, levels == level, feature.shape, size, scale, sampler):
                rows, weights = part.cells.flatten(0, 2), part.weights.flatten(0, 2)
                found = functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
                pooled[part.rois] = found.view(len(part.rois), -1, channels)
        return pooled.view(len(rois), *size, channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the features, channels_last, too."""
        rois, levels = ctx.saved_tensors
        size, scales, sampler = ctx.semantics
        bins = size[0] * size[1]
        table = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
        gradients: list[Tensor | None] = []
        for level, (shape, scale, needed) in enumerate(zip(ctx.shapes, scales, ctx.needs_input_grad[5:], strict=True)):
            if not needed:
                gradients.append(None)
                continue
            images, channels, height, width = shape
            total = table.new_zeros(images * height * width, channels)
            for some in together(parts(rois, levels == level, shape, size, scale, sampler)):
                total += transposed_product(some, table, bins, len(total))
            gradients.append(total.view(images, height, width, channels).permute(0, 3, 1, 2))
        return None, None, None, None, None, *gradients


def together(found: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in lists of at least `ENTRIES_AT_ONCE` weights, but for the last."""
    some: list[Part] = []
    for part in found:
        some.append(part)
        if sum(part.weights.numel() for part in some) >= ENTRIES_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def transposed_product(some: Sequence[Part], table: Tensor, bins: int, cells: int) -> Tensor:
    """For each of `cells` cells the weighted sum of those rows of `table`, bins of all RoIs, that it is an entry of."""
    cell = torch.cat([part.cells.flatten() for part in some])
    weight = torch.cat([part.weights.flatten() for part in some])
    of_part = [part.rois[:, None, None] * bins + torch.arange(bins)[:, None] for part in some]
    row = torch.cat(
        [rows.expand(-1, -1, part.cells.shape[3]).flatten() for rows, part in zip(of_part, some, strict=True)]
    )
    cell, order = cell.sort(stable=True)
    first = torch.searchsorted(cell, torch.arange(cells))
    return functional.embedding_bag(row[order], table, first, mode="sum", per_sample_weights=weight[order])


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
) -> Tensor:
    """See `fastmrcnn.ops.multilevel_roi_align`; `levels` [R] are given, all in CPU memory."""
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    sampler = Sampler(sampling_ratio, aligned, interpolation == "bicubic", sampling == "corner")
    wide = [feature.to(dtype) for feature in features]
    rois = rois.detach().to(dtype)
    pooled: Tensor = MultilevelRoIAlign.apply(rois, levels, output_size, spatial_scales, sampler, *wide)
    return pooled.to(features[0].dtype)


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
    levels = torch.zeros(len(rois), dtype=torch.int64)
    return multilevel_roi_align(
        [features], rois, levels, output_size, [spatial_scale], sampling_ratio, aligned, interpolation, sampling
    )
