"""Greedy non-maximum suppression of padded segments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch.nn.functional import pad

from fastmrcnn_kernels.reference.boxes import pairwise_iou


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    iou_threshold: float,
    max_keep: int,
    *,
    groups: Tensor | None = None,
    presorted: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `fastmrcnn.ops.padded_nms`; `valid` is the bool mask [S, K]."""
    slots = torch.arange(boxes.shape[1], device=boxes.device)
    order = slots.expand_as(valid)
    if not presorted:
        order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    # Indices have no gradient, and loops in a graph none to give.
    boxes = boxes.detach().gather(1, order[..., None].expand_as(boxes))
    alive = valid.gather(1, order)
    groups = None if groups is None else groups.gather(1, order)
    limit = torch.full((), iou_threshold, dtype=boxes.dtype, device=boxes.device)  # a loop takes no symbolic float

    def suppress(i: Tensor, alive: Tensor) -> Tensor:
        """Those of `alive` that box `i`, int64 [], leaves."""
        index = i.view(1)
        overlaps = pairwise_iou(boxes.index_select(1, index), boxes).squeeze(1) > limit
        if groups is not None:
            overlaps = overlaps & (groups == groups.index_select(1, index))
        return alive & ~(alive.index_select(1, index) & overlaps & (slots > i))

    if torch.compiler.is_compiling():
        # A loop that stays one: unrolled, a thousand boxes would be a graph that takes hours to compile.
        end = pad(torch.where(alive, slots + 1, 0).flatten(), (0, 1)).max()  # after the last box that is alive
        alive = while_loop(
            lambda i, alive: i < end, lambda i, alive: (i + 1, suppress(i, alive)), (torch.zeros_like(end), alive)
        )[1]
    else:
        for i in slots.unbind():
            alive = suppress(i, alive)
    return compact(order, alive, max_keep)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See `fastmrcnn.ops.nms`."""
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See `fastmrcnn.ops.batched_nms`: one segment, in which only boxes of the same group suppress each other."""
    valid = torch.ones_like(idxs, dtype=torch.bool)[None]
    kept, _ = padded_nms(boxes[None], scores[None], valid, iou_threshold, len(boxes), groups=idxs[None])
    return kept[kept >= 0]


def compact(values: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` of those `values` [S, K] that `keep` [S, K] marks, in order, then -1; and how many, [S]."""
    rank = keep.cumsum(dim=1) - 1
    slot = torch.where(keep & (rank < width), rank, width)  # everything else goes to a slot that is cut off
    out = values.new_full((len(values), width + 1), -1).scatter(1, slot, values)[:, :width]
    return out, keep.sum(dim=1).clamp(max=width)
