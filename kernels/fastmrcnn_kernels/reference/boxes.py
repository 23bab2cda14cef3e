"""Boxes `x1,y1,x2,y2`: IoU, delta coding, clipping, and anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""Largest dw, dh that is decoded: a box grows at most 62.5-fold (torchvision, detectron2)."""


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` [..., I, 4] with every box of `b` [..., J, 4]: [..., I, J].

    Two boxes without area give NaN, which compares false with any threshold.
    """
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (a, b))
    return overlap / (area_a[..., :, None] + area_b[..., None, :] - overlap)


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh) [..., 4] that move `anchors` [..., 4] onto `boxes` [..., 4], times `weights`."""
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    anchor_centre = anchors[..., :2] + 0.5 * anchor_size
    box_centre = boxes[..., :2] + 0.5 * box_size
    wx, wy, ww, wh = weights
    offset, growth = box_centre - anchor_centre, torch.log(box_size / anchor_size)
    dx, dy = wx * offset[..., 0] / anchor_size[..., 0], wy * offset[..., 1] / anchor_size[..., 1]
    return torch.stack((dx, dy, ww * growth[..., 0], wh * growth[..., 1]), dim=-1)


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes [..., 4] reached from `anchors` [..., 4] by `deltas` [..., 4]; the inverse of `encode_deltas`.

    dw and dh are limited to log(1000/16) after division by their weights, as in torchvision's `BoxCoder`.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size
    wx, wy, ww, wh = weights
    offset = torch.stack((deltas[..., 0] / wx, deltas[..., 1] / wy), dim=-1)
    growth = torch.stack((deltas[..., 2] / ww, deltas[..., 3] / wh), dim=-1).clamp(max=MAX_LOG_SCALE)
    new_centre = offset * size + centre
    half_size = 0.5 * (torch.exp(growth) * size)
    return torch.cat((new_centre - half_size, new_centre + half_size), dim=-1)


def decode_class_deltas(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """`decode_deltas` in float32 at least, where deltas [..., C, 4] may share anchors [..., 4]."""
    if anchors.dim() < deltas.dim():
        anchors = anchors[..., None, :]
    dtype = torch.promote_types(deltas.dtype, anchors.dtype)
    return decode_deltas(deltas.to(dtype), anchors.to(dtype), weights)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """`boxes` [N, ..., 4] limited to their images, whose (height, width) are `sizes` [N, 2].  NaN stays NaN."""
    height, width = sizes.to(boxes.dtype).view(-1, *(1,) * (boxes.dim() - 2), 2).unbind(-1)
    limit = torch.stack((width, height, width, height), dim=-1)
    return torch.minimum(boxes.clamp(min=0), limit)


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Whether both sides of `boxes` [..., 4] are at least `min_size` pixels: bool [...].  NaN is not."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(dim=-1)


def anchors_at(
    index: Tensor, base_anchors: Tensor, grid: tuple[int, int], stride: tuple[int | Tensor, int | Tensor]
) -> Tensor:
    """Anchors [..., 4] number `index` [...] of one level: an anchor is a function of its index, never stored.

    `index = (y * grid_width + x) * A + a`: base anchor `a` of `base_anchors` [A, 4], moved by (x, y) strides.
    `grid` and `stride` are (height, width); strides may be tensors like `index`.
    """
    cell, a = index // len(base_anchors), index % len(base_anchors)
    x, y = cell % grid[1] * stride[1], cell // grid[1] * stride[0]
    return torch.stack((x, y, x, y), dim=-1) + base_anchors[a]
