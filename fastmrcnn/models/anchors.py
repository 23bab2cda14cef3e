"""Anchors at multiples of fixed strides, as all libraries but torchvision have them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator


class FixedStrideAnchors(AnchorGenerator):
    """Anchors whose centres are multiples of a stride per level, and whose sides are not rounded.

    torchvision's have the padded size // the size of the map for a stride, 61 pixels for 13 cells of 800 pixels, round
    their corners to whole pixels, and run through the sizes within a ratio.  These run through the ratios within a
    size.

    Args:
        sizes: square roots of the areas, in pixels, per level.
        aspect_ratios: height / width, per level.
        strides: pixels per cell of each level.
        nearer: pixels by which the far corners are nearer.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        nearer: float = 0.0,
    ) -> None:
        self.nearer = nearer
        super().__init__(tuple(map(tuple, sizes)), tuple(map(tuple, aspect_ratios)))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors [sizes * ratios, 4] of the cell at the origin."""
        corners = []
        for size in scales:
            for ratio in aspect_ratios:
                width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                corners.append((-width / 2, -height / 2, width / 2 - self.nearer, height / 2 - self.nearer))
        return torch.tensor(corners, dtype=dtype, device=device)
