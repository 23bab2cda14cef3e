"""From what the head of a region proposal network says of each anchor to proposals, in fixed shapes.

N images, L levels, A anchors per cell, K selected anchors per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.reference.boxes import anchors_at, clip_boxes, decode_deltas, large_enough
from fastmrcnn_kernels.reference.topk import stable_topk


def by_anchor(output: Tensor, values: int = 1) -> Tensor:
    """A head's output [N, A * values, H, W] in the order of anchors: [N, H W A], or [N, H W A, values] for several."""
    flat = output.permute(0, 2, 3, 1).flatten(1)
    return flat if values == 1 else flat.unflatten(1, (-1, values))


def topk_anchors(logits: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """See `fastmrcnn.ops.topk_anchors`."""
    shape = (len(logits[0]), len(logits), k)
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    scores = logits[0].new_full(shape, -torch.inf, dtype=dtype)
    indices = logits[0].new_full(shape, -1, dtype=torch.int64)
    for level, values in enumerate(map(by_anchor, logits)):
        slots = min(k, values.shape[1])
        found, index = stable_topk(values, slots)
        scores[:, level, :slots], indices[:, level, :slots] = found.to(dtype), index
    return scores, indices


def decode_proposals(
    deltas: Sequence[Tensor],
    indices: Tensor,
    base_anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]] | Tensor,
    sizes: Tensor,
    *,
    scores: Tensor | None,
    min_size: float,
    min_score: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """See `fastmrcnn.ops.decode_proposals`."""
    boxes = []
    by_level: Sequence[Any]
    if isinstance(strides, Tensor):
        by_level = [axes[:, None].unbind(-1) for axes in strides.unbind(1)]  # height and width of a cell, [N, 1] each
    else:
        by_level = strides
    for delta, index, base, stride in zip(deltas, indices.clamp(min=0).unbind(1), base_anchors, by_level, strict=True):
        num_anchors, (height, width) = len(base), delta.shape[-2:]
        dtype = torch.promote_types(delta.dtype, torch.float32)
        anchors = anchors_at(index, base.to(dtype), (height, width), stride)
        image = torch.arange(len(index), device=index.device)[:, None]
        cell, a = index // num_anchors, index % num_anchors
        selected = delta.unflatten(1, (num_anchors, 4))[image, a, :, cell // width, cell % width]
        boxes.append(decode_deltas(selected.to(dtype), anchors, weights))
    present = indices >= 0
    clipped = torch.where(present[..., None], clip_boxes(torch.stack(boxes, dim=1), sizes), 0)
    valid = present & large_enough(clipped, min_size)
    return clipped, valid if scores is None else valid & (scores >= min_score)


def merge_levels(
    boxes: Tensor, scores: Tensor, kept: Tensor, counts: Tensor, max_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastmrcnn.ops.merge_levels`."""
    present = torch.arange(kept.shape[2], device=kept.device) < counts[..., None]
    index = kept.clamp(min=0)
    ranked = scores.gather(2, index).masked_fill(~present, -torch.inf).flatten(1)
    candidates = boxes.gather(2, index[..., None].expand(*index.shape, 4)).flatten(1, 2)
    best, order = stable_topk(ranked, max_keep)
    count = counts.sum(dim=1).clamp(max=max_keep)
    valid = torch.arange(max_keep, device=count.device) < count[:, None]
    chosen = candidates.gather(1, order[..., None].expand(*order.shape, 4))
    return torch.where(valid[..., None], chosen, 0), torch.where(valid, best, 0), count
