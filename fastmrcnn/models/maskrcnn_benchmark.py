"""How maskrcnn-benchmark, and Mask Scoring R-CNN, which is built on it, see boxes.

There a box holds both its corner pixels: its width is x2 - x1 + 1.  Here its far corner is one pixel farther inside the
network, so that widths, centres, deltas, areas and overlaps are those of everything else; RoIs are sampled, and results
returned, with the corner as it is there.

Source of the semantics: `modeling/box_coder.py`, `modeling/poolers.py`, `modeling/rpn` and `structures` of
facebookresearch/maskrcnn-benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch, ImageBatch
from fastmrcnn.models.anchors import FixedStrideAnchors
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import BytesPreprocess, options_of, send
from fastmrcnn.models.resizing import resize_like_pillow
from fastmrcnn.models.roi_heads import Features

MEAN = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)
RATIOS = (0.5, 1.0, 2.0)


class CornerAnchors(FixedStrideAnchors):
    """Anchors in the middle of their cells, their ratios rounded in a square of one stride and then enlarged."""

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        super().__init__(sizes, [RATIOS] * len(sizes), strides)
        self.cell_anchors = [self.of_cell(*level) for level in zip(self.sizes, strides, strict=True)]

    def of_cell(self, sizes: Sequence[float], stride: int) -> Tensor:
        """Anchors [ratios * sizes, 4] of the cell at the origin."""
        corners = []
        for ratio in RATIOS:
            width = round((stride * stride / ratio) ** 0.5)
            height = round(width * ratio)
            for size in sizes:
                x, y = width * size / stride / 2, height * size / stride / 2
                corners.append((stride / 2 - x, stride / 2 - y, stride / 2 + x, stride / 2 + y))
        return torch.tensor(corners)


class CornerRoIAlign(ops.MultiScaleRoIAlign):
    """RoIAlign of boxes without the pixel that their far corners are farther; levels are by area with it."""

    def pool(self, features: Features, rois: Tensor, images: ImageBatch) -> Tensor:
        """RoI features [R, C, P, P] of `rois` [R, 5]."""
        maps = [feature for name, feature in features.items() if name in self.featmap_names]
        levels = ops.levels_by("maskrcnn_benchmark", rois[:, 1:], len(maps), 2, 224, 4)
        sampled = torch.cat((rois[:, :3], rois[:, 3:] - 1), dim=1)
        scales = [0.25 / 2**level for level in range(len(maps))]
        return ops.multilevel_roi_align(maps, sampled, self.output_size, scales, self.sampling_ratio, levels=levels)


class CornerPreprocess(BytesPreprocess):
    """Images resized by Pillow, their sides cut off to whole pixels; far corners of results inside of boxes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(resize_like_pillow, **options)

    def size_of(self, size: tuple[int, int], shorter: float | None = None) -> tuple[int, int]:
        """What an image of `size` is resized to, both (height, width)."""
        side = int(self.min_size[-1] if shorter is None else shorter)
        least, most = float(min(size)), float(max(size))
        if most / least * side > self.max_size:
            side = round(self.max_size * least / most)
        height, width = size
        return (int(side * height / width), side) if width < height else (side, int(side * width / height))

    def in_original_pixels(
        self, detections: DetectionBatch, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> DetectionBatch:
        """Boxes in pixels of images of `original_sizes`, both corners inside.  Never waits."""
        nearer = send([0, 0, 1, 1], detections.boxes.dtype, detections.boxes.device)
        return super().in_original_pixels(replace(detections, boxes=detections.boxes - nearer), sizes, original_sizes)


def apply(model: GeneralizedRCNN) -> None:
    """Make a detector of a pyramid, as `architectures.build` makes it, one with these conventions."""
    model.transform = CornerPreprocess(**options_of(model.transform), size_divisible=32)
