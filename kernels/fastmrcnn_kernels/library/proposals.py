"""The selection of anchors and the merging of levels as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define("fastmrcnn::topk_anchors", "(Tensor[] logits, SymInt k) -> (Tensor, Tensor)")
torch.library.define(
    "fastmrcnn::merge_levels",
    "(Tensor boxes, Tensor scores, Tensor kept, Tensor counts, SymInt max_keep) -> (Tensor, Tensor, Tensor)",
)


implement("topk_anchors", "topk", "topk_anchors")
implement("merge_levels", "merge", "merge_levels")


@torch.library.register_fake("fastmrcnn::topk_anchors")
def _selected_shape(logits: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    scores = logits[0].new_empty(logits[0].shape[0], len(logits), k, dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


@torch.library.register_fake("fastmrcnn::merge_levels")
def _merged_shape(
    boxes: Tensor, scores: Tensor, kept: Tensor, counts: Tensor, max_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    images = scores.shape[0]
    return boxes.new_empty(images, max_keep, 4), scores.new_empty(images, max_keep), counts.new_empty(images)


def topk_anchors(logits: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """See `fastmrcnn.ops.topk_anchors`."""
    return torch.ops.fastmrcnn.topk_anchors(logits, k)


def merge_levels(
    boxes: Tensor, scores: Tensor, kept: Tensor, counts: Tensor, max_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastmrcnn.ops.merge_levels`."""
    return torch.ops.fastmrcnn.merge_levels(boxes, scores, kept, counts, max_keep)
