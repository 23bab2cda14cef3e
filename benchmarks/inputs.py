"""Feature pyramids and RoIs of the sizes that models meet, and how many bytes they are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import device_name
from fastmrcnn.data import Shapes
from fastmrcnn_kernels.reference.roi_align import assign_levels, axis_weights

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
CHANNELS = 256
PHOTO = (800, 1333)
"""Height and width of a photo as it enters a detector."""
SMALL = (400, 666)
"""What a CPU is given instead."""


class Pooling(NamedTuple):
    """A batch of images, how many RoIs each has and into how many bins they are pooled."""

    images: int
    rois: int
    bins: int
    size: tuple[int, int] = PHOTO

    def __str__(self) -> str:
        return f"{self.images} x {self.rois} RoIs, {self.bins}x{self.bins}, {self.size[0]}x{self.size[1]}"


def leave_out(op: str, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
    """Skip the benchmark where a CPU has no use for it: at the size of photos, and in 16-bit dtypes."""
    if not torch.cuda.is_available():
        if size == PHOTO:
            pytest.skip(f"left out, for want of a GPU: {op} at {size[0]}x{size[1]}")
        if dtype != torch.float32:
            pytest.skip(f"left out, for want of a GPU: {op} in {str(dtype).removeprefix('torch.')}")


def pyramid(case: Pooling, dtype: torch.dtype, scales: Sequence[float] = SCALES) -> list[Tensor]:
    """Random maps [N, 256, Hl, Wl], channels_last, of images padded to whole cells of the coarsest map."""
    generator = torch.Generator(device_name()).manual_seed(0)
    cell = round(1 / scales[-1])
    height, width = (math.ceil(side / cell) * cell for side in case.size)
    shapes = [(round(height * scale), round(width * scale)) for scale in scales]
    maps = [torch.randn(case.images, *s, CHANNELS, generator=generator, device=device_name()) for s in shapes]
    return [x.permute(0, 3, 1, 2).to(dtype) for x in maps]


def random_rois(case: Pooling) -> Tensor:
    """RoIs [N * R, 5] inside the images; sides spread evenly from 16 to 640 pixels on a logarithmic scale."""
    generator = torch.Generator().manual_seed(0)
    height, width = case.size
    limits = torch.tensor([width, height], dtype=torch.float32)
    count = case.images * case.rois
    side = 16 * 40 ** torch.rand(count, 1, generator=generator)
    aspect = 4 ** (torch.rand(count, 1, generator=generator) - 0.5)
    extent = torch.minimum(side * torch.cat((aspect, 1 / aspect), dim=1), limits)
    start = torch.rand(count, 2, generator=generator) * (limits - extent)
    index = torch.arange(case.images, dtype=torch.float32).repeat_interleave(case.rois)
    return torch.cat((index[:, None], start, torch.minimum(start + extent, limits)), dim=1).to(device_name())


def shapes_folder(folder: Path, images: int = 4) -> Path:
    """Fill `folder` with generated images, laid out as the README says of nuclei; returns it."""
    for seed, split in enumerate(("train", "val")):
        data = Shapes(images, image_size=(64, 64), seed=seed)
        (folder / split).mkdir(parents=True, exist_ok=True)
        for record, (image, _) in zip(data.coco["images"], data, strict=True):
            pixels = (image * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / split / record["file_name"])
        (folder / "annotations").mkdir(exist_ok=True)
        for size in ("", "_mini"):
            (folder / "annotations" / f"instances_{split}{size}.json").write_text(json.dumps(data.coco))
    return folder


HEAD_STRIDES = (4, 8, 16, 32, 64)
ANCHORS = 3


def head_outputs(images: int, size: tuple[int, int], dtype: torch.dtype, *, clustered: bool) -> list[list[Tensor]]:
    """Logits [N, 3, Hl, Wl] and deltas [N, 12, Hl, Wl] of five levels, channels_last, as an RPN head returns them.

    High scores are anywhere, or, `clustered`, about twenty places per image, as a trained head has them.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = (math.ceil(side / 32) * 32 for side in size)
    places = torch.rand(images, 20, 2, generator=generator) * torch.tensor([height, width])
    outputs: list[list[Tensor]] = [[], []]
    for stride in HEAD_STRIDES:
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        logits = torch.randn(images, rows, columns, ANCHORS, generator=generator)
        deltas = torch.randn(images, rows, columns, 4 * ANCHORS, generator=generator) * 0.3
        if clustered:
            y, x = torch.arange(rows) * stride, torch.arange(columns) * stride
            dy, dx = (y[:, None] - places[..., None, :1]), (x[:, None] - places[..., None, 1:])
            distance = dy.square() + dx.square().mT  # [N, 20, H, W]
            logits += 8 * torch.exp(-distance / (2 * (6 * stride) ** 2)).amax(dim=1)[..., None] - 4
        for kind, values in zip(outputs, (logits, deltas), strict=True):
            kind.append(values.to(device_name(), dtype).permute(0, 3, 1, 2))
    return outputs


def scored_boxes(count: int, *, clustered: bool, extent: float = 1000.0) -> tuple[Tensor, Tensor]:
    """Boxes [count, 4] of 20 .. 120 pixels anywhere in a square image, or about one place per 50 boxes; and scores.

    Those that are anywhere spread over as much area per box however many there are.
    """
    generator = torch.Generator().manual_seed(0)
    size = 20 + 100 * torch.rand(count, 2, generator=generator)
    if clustered:
        places = torch.rand(max(count // 50, 1), 2, generator=generator) * extent
        centre = places[torch.randint(0, len(places), (count,), generator=generator)]
        centre = centre + 5 * torch.randn(count, 2, generator=generator)
    else:
        centre = torch.rand(count, 2, generator=generator) * extent * math.sqrt(count / 1000)
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=1)
    return boxes.to(device_name()), torch.rand(count, generator=generator).to(device_name())


def axis_weights_of(maps: Sequence[Tensor], rois: Tensor, bins: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Which cells of a map have a weight in which bins, for RoIAlign with two samples per bin and axis.

    For each image and level of `SCALES`, rows [R, bins, H] and columns [R, bins, W], bool, of its RoIs.
    """
    levels = assign_levels(rois[:, 1:], len(maps), 2, 224, 4)
    for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
        for image in range(len(feature)):
            boxes = rois[(levels == level) & (rois[:, 0] == image), 1:] * scale
            extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
            rows = axis_weights(boxes[:, 1], extent[:, 1], bins, feature.shape[2], 2)
            columns = axis_weights(boxes[:, 0], extent[:, 0], bins, feature.shape[3], 2)
            yield rows > 0, columns > 0


def cells_read(maps: Sequence[Tensor], rois: Tensor, bins: int) -> int:
    """How many cells of `maps` have a weight in some bin."""
    total = 0
    for rows, columns in axis_weights_of(maps, rois, bins):
        total += int((rows.any(dim=1).float().mT @ columns.any(dim=1).float() > 0).sum())
    return total


def cells_of_rois(maps: Sequence[Tensor], rois: Tensor, bins: int) -> int:
    """The same for each RoI by itself, added up."""
    return sum(
        int((rows.any(dim=1).sum(dim=1) * columns.any(dim=1).sum(dim=1)).sum())
        for rows, columns in axis_weights_of(maps, rois, bins)
    )


def bins_of_tiles(maps: Sequence[Tensor], rois: Tensor, bins: int, tile: int) -> int:
    """How many bins the tiles of `tile` x `tile` cells read in a backward pass that gathers, added up."""

    def pairs(weights: Tensor) -> Tensor:
        """Pairs of a bin and a stretch of `tile` cells that has a weight in it, for each RoI."""
        padded = functional.pad(weights, (0, -weights.shape[2] % tile))
        return padded.unflatten(2, (-1, tile)).any(dim=3).sum(dim=(1, 2))

    return sum(int((pairs(rows) * pairs(columns)).sum()) for rows, columns in axis_weights_of(maps, rois, bins))
