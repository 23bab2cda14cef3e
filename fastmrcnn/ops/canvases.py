"""Batches of images of several sizes, each as if it were alone: what the padding of a map holds, set in place.

Image i of a batch fills the first `canvases[i]` pixels, (height, width), of the images that entered the network, and in
a map of `stride` pixels to a cell the first ceil(canvas / stride) rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check
from fastmrcnn.ops.implementations import Impl, choose_kernel


def clear_beyond_(maps: Tensor, canvases: Tensor, stride: int, value: float = 0.0, *, impl: Impl = "auto") -> Tensor:
    """Set what lies beyond each image's canvas to `value`, so that a convolution sees its own zeros there.

    Args:
        maps: [N, C, H, W], in any memory format; changed, and without a gradient.
        canvases: (height, width) in pixels, int64 [N, 2].
        stride: pixels to a cell.
        value: 0 before convolutions, -inf before a maximum.

    Returns:
        `maps`.
    """
    check("maps", maps, None, None, None, None)
    check("canvases", canvases, len(maps), 2, dtype=torch.int64)
    if stride < 1:
        raise ValueError(f"stride={stride}: expected 1 or more pixels")
    choose_kernel("clear_beyond_", impl, maps, "reference", "maps")[1](maps, canvases, stride, value)
    return maps
