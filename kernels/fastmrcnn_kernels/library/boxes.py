"""Box coding and the decoding of proposals as PyTorch operators, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define("fastmrcnn::decode_boxes", "(Tensor deltas, Tensor anchors, float[] weights) -> Tensor")
torch.library.define("fastmrcnn::encode_boxes", "(Tensor boxes, Tensor anchors, float[] weights) -> Tensor")
torch.library.define(
    "fastmrcnn::decode_proposals",
    "(Tensor[] deltas, Tensor indices, Tensor? scores, Tensor[] base_anchors, SymInt[] cell_heights, "
    "SymInt[] cell_widths, Tensor? strides, Tensor sizes, float min_size, float min_score, float[] weights) "
    "-> (Tensor, Tensor)",
)


implement("decode_boxes", "box_coding", "decode_boxes")
implement("encode_boxes", "box_coding", "encode_boxes")
implement("decode_proposals", "box_coding", "decode_proposals")


@torch.library.register_fake("fastmrcnn::decode_boxes")
@torch.library.register_fake("fastmrcnn::encode_boxes")
def _coded_shape(coded: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    return coded.new_empty(coded.shape, dtype=torch.float32)


@torch.library.register_fake("fastmrcnn::decode_proposals")
def _proposals_shape(deltas: Sequence[Tensor], indices: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    boxes = indices.new_empty(*indices.shape, 4, dtype=torch.float32)
    return boxes, indices.new_empty(indices.shape, dtype=torch.bool)


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    """NotImplementedError if a gradient of one of `tensors` is wanted."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(f"{op}: the kernel has no gradient: use impl='reference', or detach what it is given")


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes [..., 4], float32, of `deltas` [..., 4], which are divided by `weights` as float32.

    `anchors` have the shape of `deltas`; or one less dimension where deltas are [..., C, 4]: one anchor for C boxes.
    NotImplementedError if a gradient is wanted.
    """
    _refuse_gradients("decode_boxes", deltas, anchors)
    return torch.ops.fastmrcnn.decode_boxes(deltas, anchors, weights)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [..., 4], float32, that move `anchors` onto `boxes` [..., 4], to whose shape anchors are broadcast.

    NotImplementedError if a gradient is wanted.
    """
    _refuse_gradients("encode_boxes", boxes, anchors)
    return torch.ops.fastmrcnn.encode_boxes(boxes, anchors, weights)


def decode_proposals(
    deltas: Sequence[Tensor],
    indices: Tensor,
    base_anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]] | Tensor,
    sizes: Tensor,
    *,
    scores: Tensor | None = None,
    min_size: float,
    min_score: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Boxes [N, L, K, 4], float32, of the anchors `indices`, int64 [N, L, K], and whether each is usable, bool.

    -1, and whatever else is no anchor of its level, is padding: box 0, not usable.  `scores` None: none is too low.
    NotImplementedError if a gradient is wanted.
    """
    _refuse_gradients("decode_proposals", *deltas, *base_anchors)
    of_each = strides if isinstance(strides, Tensor) else None
    of_all = [(0, 0)] * len(deltas) if isinstance(strides, Tensor) else strides
    heights, widths = ([stride[axis] for stride in of_all] for axis in (0, 1))
    return torch.ops.fastmrcnn.decode_proposals(
        deltas, indices, scores, base_anchors, heights, widths, of_each, sizes, min_size, min_score, weights
    )
