"""Box coding and the decoding of proposals as PyTorch operators, without gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn_kernels.host import KERNEL_DEVICES

torch.library.define("fastmrcnn::decode_boxes", "(Tensor deltas, Tensor anchors, float[] weights) -> Tensor")
torch.library.define("fastmrcnn::encode_boxes", "(Tensor boxes, Tensor anchors, float[] weights) -> Tensor")
torch.library.define(
    "fastmrcnn::decode_proposals",
    "(Tensor[] deltas, Tensor indices, Tensor? scores, Tensor[] base_anchors, SymInt[] strides, Tensor sizes, "
    "float min_size, float min_score, float[] weights) -> (Tensor, Tensor)",
)


@torch.library.impl("fastmrcnn::decode_boxes", KERNEL_DEVICES)
def _decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    from fastmrcnn_kernels.triton import box_coding

    return box_coding.decode_boxes(deltas, anchors, weights)


@torch.library.impl("fastmrcnn::encode_boxes", KERNEL_DEVICES)
def _encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    from fastmrcnn_kernels.triton import box_coding

    return box_coding.encode_boxes(boxes, anchors, weights)


@torch.library.impl("fastmrcnn::decode_proposals", KERNEL_DEVICES)
def _decode_proposals(
    deltas: Sequence[Tensor],
    indices: Tensor,
    scores: Tensor | None,
    base_anchors: Sequence[Tensor],
    strides: Sequence[int],
    sizes: Tensor,
    min_size: float,
    min_score: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    from fastmrcnn_kernels.triton import box_coding

    by_level = list(zip(strides[::2], strides[1::2], strict=True))
    return box_coding.decode_proposals(
        deltas, indices, scores, base_anchors, by_level, sizes, min_size, min_score, weights
    )


@torch.library.register_fake("fastmrcnn::decode_boxes")
@torch.library.register_fake("fastmrcnn::encode_boxes")
def _coded_shape(coded: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    return coded.new_empty(coded.shape, dtype=torch.float32)


@torch.library.register_fake("fastmrcnn::decode_proposals")
def _proposals_shape(
    deltas: Sequence[Tensor],
    indices: Tensor,
    scores: Tensor | None,
    base_anchors: Sequence[Tensor],
    strides: Sequence[int],
    sizes: Tensor,
    min_size: float,
    min_score: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
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
    strides: Sequence[tuple[int, int]],
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
    flat = list(itertools.chain.from_iterable(strides))
    return torch.ops.fastmrcnn.decode_proposals(
        deltas, indices, scores, base_anchors, flat, sizes, min_size, min_score, weights
    )
