"""Keypoint coordinates from heatmaps: the peak of each heatmap, enlarged to the size of its box."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop


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

    if not len(boxes):
        return heatmaps.new_zeros(0, heatmaps.shape[1], 3), heatmaps.new_zeros(0, heatmaps.shape[1])

    def highest(i: Tensor) -> tuple[Tensor, Tensor]:
        """Height and number of the highest pixel of each heatmap of box `i`, int64 [1]: one canvas of K x H x W."""
        y, maps, x, below, beside = (v.index_select(0, i)[0] for v in (wy, heatmaps, wx, y_out, x_out))
        canvas = (y @ maps @ x.T).masked_fill(below[:, None] | beside, -torch.inf)
        return canvas.flatten(1).max(dim=1)

    boxes_in_turn = torch.arange(len(boxes), device=boxes.device)
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and heatmaps.requires_grad):
        # A loop that stays one, since it compiles in a tenth of the time.  Its counter is on the CPU, or each turn
        # would wait for the device; and heatmaps are copied, since AOTInductor frees a view in every turn.
        heatmaps = heatmaps.index_select(0, boxes_in_turn)

        def take(turn: Tensor, scores: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            i = turn.view(1).to(boxes.device, non_blocking=True)
            here, (score, peak) = (boxes_in_turn == i)[:, None], highest(i)
            return turn + 1, torch.where(here, score, scores), torch.where(here, peak, peaks)

        none = heatmaps.new_zeros(heatmaps.shape[:2])
        start = (torch.zeros((), dtype=torch.int64, device="cpu"), none, none.to(torch.int64))
        _, scores, peak = while_loop(lambda turn, *_: turn < len(boxes), take, start)
    else:
        scores, peak = map(torch.stack, zip(*map(highest, boxes_in_turn.split(1)), strict=True))
    cell = torch.stack((peak % max_size[1], peak // max_size[1]), dim=-1) + 0.5
    xy = cell * (extent / pixels)[:, None] + boxes[:, None, :2]
    return torch.cat((xy, torch.ones_like(xy[..., :1])), dim=-1), scores
