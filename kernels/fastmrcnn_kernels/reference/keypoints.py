"""Keypoint coordinates from heatmaps: the peak of each heatmap, enlarged to the size of its box."""

from __future__ import annotations

import torch
from torch import Tensor


def bicubic_weights(length: Tensor, cells: int, pixels: int) -> Tensor:
    """Weights [D, pixels, cells] of `torch.nn.functional.interpolate(mode="bicubic")` from `cells` to `length` [D].

    Keys' kernel with a = -0.75, taps beyond the ends repeat the end cell.  Rows from `length` on are meaningless.
    """
    a = -0.75
    pixel = torch.arange(pixels, device=length.device, dtype=length.dtype)
    position = (pixel + 0.5) * (cells / length)[:, None] - 0.5
    base = position.floor()
    weights = position.new_zeros(len(length), pixels, cells)
    for tap in (-1, 0, 1, 2):
        x = (position - (base + tap)).abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        cell = (base + tap).clamp(0, cells - 1).to(torch.int64)
        weights = weights.scatter_add(2, cell[..., None], torch.where(x <= 1, near, far)[..., None])
    return weights


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor, max_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Keypoints [D, K, 3] (x, y, 1) in pixels and their scores [D, K] of `heatmaps` [D, K, S, S] in `boxes` [D, 4].

    The semantics are those of torchvision's function of this name, which enlarges each heatmap to the size of its box
    in whole pixels (a shape that depends on data).  Here it is enlarged within a canvas of `max_size` (height, width),
    which no box may exceed, and the rest of the canvas is left out of the maximum.
    """
    extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = extent.ceil()
    wx = bicubic_weights(pixels[:, 0], heatmaps.shape[-1], max_size[1])
    wy = bicubic_weights(pixels[:, 1], heatmaps.shape[-2], max_size[0])
    x_out = torch.arange(max_size[1], device=boxes.device) >= pixels[:, :1]
    y_out = torch.arange(max_size[0], device=boxes.device) >= pixels[:, 1:]

    peaks, scores = [], []
    for i in range(len(boxes)):  # one canvas of K x H x W at a time
        canvas = wy[i] @ heatmaps[i] @ wx[i].T
        canvas = canvas.masked_fill(y_out[i, :, None] | x_out[i], -torch.inf).flatten(1)
        score, peak = canvas.max(dim=1)
        scores.append(score)
        peaks.append(peak)
    if not peaks:
        return heatmaps.new_zeros(0, heatmaps.shape[1], 3), heatmaps.new_zeros(0, heatmaps.shape[1])

    peak = torch.stack(peaks)
    cell = torch.stack((peak % max_size[1], peak // max_size[1]), dim=-1) + 0.5
    xy = cell * (extent / pixels)[:, None] + boxes[:, None, :2]
    return torch.cat((xy, torch.ones_like(xy[..., :1])), dim=-1), torch.stack(scores)
