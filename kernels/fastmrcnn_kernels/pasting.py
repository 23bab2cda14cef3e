"""How small masks are pasted into images."""

from __future__ import annotations

from typing import NamedTuple

import torch

REACH = 2.0**27
"""Pixels from the origin to which boxes may reach.  Beyond it, and where they are not finite, a mask is empty."""

WORD = 32
"""Pixels per int32 word of packed masks; the first is the least significant bit."""

HEADER = 8
"""int32 per mask of an encoding: where its text begins, and its length, area, and box as x, y, width, height."""


class Pasting(NamedTuple):
    """Whose semantics, and what counts as inside a mask.

    Attributes:
        detectron2: detectron2's semantics, `grid_sample` with `align_corners=False`; else torchvision's, which pads
            the mask and truncates its box to whole pixels.
        padding: cells of zeros around a mask, of torchvision's semantics.
        threshold: values inside a mask exceed it (torchvision), or are not below it (detectron2).
    """

    detectron2: bool
    padding: int
    threshold: float


def layout(canvas: tuple[int, int], out: str, soft: torch.dtype) -> tuple[tuple[int, int], torch.dtype]:
    """Last two dimensions, and dtype, of masks "soft", "bool" or as "bits" on a canvas."""
    if out == "bits":
        return (canvas[0], -(-canvas[1] // WORD)), torch.int32
    return canvas, torch.bool if out == "bool" else soft
