"""Maps of a batch of which each image fills a part, its canvas: what lies beyond must not be seen by what is within."""

from __future__ import annotations

import torch
from torch import Tensor


def cells(canvases: Tensor, stride: int) -> Tensor:
    """Rows and columns of a map that canvases [N, 2] fill, `stride` pixels to a cell: int64 [N, 2]."""
    return (canvases + (stride - 1)) // stride


def clear_beyond_(maps: Tensor, canvases: Tensor, stride: int, value: float) -> None:
    """See `fastmrcnn.ops.clear_beyond_`."""
    y, x = (torch.arange(side, device=maps.device) for side in maps.shape[2:])
    rows, columns = cells(canvases, stride).view(-1, 2, 1, 1, 1).unbind(1)
    maps.masked_fill_((y[:, None] >= rows) | (x >= columns), value)
