"""Small masks pasted into full-size images, as two matrix products per mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def paste_box(boxes: Tensor, mask_size: int, padding: int) -> Tensor:
    """Integer pixel boxes [D, 4], ends inclusive, that masks padded by `padding` cover.

    A mask of `mask_size` cells fills its box; with its border it fills one that is larger about the same centre.  The
    corners are then truncated to integers (torchvision's `paste_masks_in_image`, after Detectron's).
    """
    scale = float(mask_size + 2 * padding) / mask_size
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    return torch.cat((centre - half, centre + half), dim=1).to(torch.int64)


def axis_weights(first: Tensor, last: Tensor, cells: int, pixels: int, dtype: torch.dtype) -> Tensor:
    """Weight of each of `cells` mask cells in each of `pixels` pixels of an axis: [D, pixels, cells].

    Pixels `first` .. `last` [D] interpolate linearly between cell centres (`align_corners=False`, ends repeated); the
    others have no weight.
    """
    pixel = torch.arange(pixels, device=first.device)[:, None]
    first, last = first[:, None, None], last[:, None, None]
    count = (last - first + 1).clamp(min=1).to(dtype)
    position = (pixel - first + 0.5).to(dtype) * (cells / count) - 0.5
    cell = torch.arange(cells, device=first.device, dtype=dtype)
    weight = (1 - (position.clamp(0, cells - 1) - cell).abs()).clamp(min=0)
    return weight * ((pixel >= first) & (pixel <= last))


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """Soft masks [D, H, W] of `masks` [D, M, M] in `boxes` [D, 4]; see `fastmrcnn.ops.paste_masks`."""
    usable = boxes.isfinite().all(dim=1)
    corners = paste_box(torch.where(usable[:, None], boxes, 0), masks.shape[-1], padding)
    padded = functional.pad(masks, (padding,) * 4) * usable[:, None, None]
    wx = axis_weights(corners[:, 0], corners[:, 2], padded.shape[-1], size[1], masks.dtype)
    wy = axis_weights(corners[:, 1], corners[:, 3], padded.shape[-1], size[0], masks.dtype)
    return wy @ padded @ wx.mT
