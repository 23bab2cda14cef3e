"""Boxes as deltas from anchors, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmrcnn.ops.checks import widen
from fastmrcnn.ops.implementations import Impl, choose_kernel


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), *, impl: Impl = "auto"
) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `anchors` onto `boxes`, times `weights`; as torchvision's `BoxCoder.encode`.

    `boxes` are [..., 4] and anchors broadcast to their shape; the result is [..., 4], float32 (float64 for float64).
    """
    boxes, anchors = widen(boxes), widen(anchors)
    _check_coding("boxes", boxes, anchors, weights)
    shapes = zip(reversed(anchors.shape), reversed(boxes.shape), strict=False)
    if anchors.dim() > boxes.dim() or any(a not in (1, b) for a, b in shapes):
        raise ValueError(
            f"anchors: {list(anchors.shape)} does not broadcast to the shape of boxes, {list(boxes.shape)}"
        )
    return _coding("encode_boxes", impl, boxes, anchors)(boxes, anchors, weights)


def decode_boxes(
    deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), *, impl: Impl = "auto"
) -> Tensor:
    """Boxes that `deltas` lead to from `anchors`: the inverse of `encode_boxes`; as torchvision's `BoxCoder.decode`.

    `deltas` are [..., 4], and `anchors` too; or deltas [..., C, 4], where the C classes share an anchor.  dw and dh are
    limited to log(1000/16) after division by their weights.  The result is float32 (float64 for float64), as `deltas`.
    """
    anchors = widen(anchors)
    _check_coding("deltas", deltas, anchors, weights)
    if anchors.shape not in (deltas.shape, (*deltas.shape[:-2], 4)):
        raise ValueError(
            f"anchors: expected the shape of deltas, {list(deltas.shape)}, or that without the classes, "
            f"got {list(anchors.shape)}"
        )
    return _coding("decode_boxes", impl, deltas, anchors)(deltas, anchors, weights)


def _check_coding(name: str, values: Tensor, anchors: Tensor, weights: Sequence[float]) -> None:
    for argument, tensor in ((name, values), ("anchors", anchors)):
        if not tensor.shape or tensor.shape[-1] != 4 or not tensor.is_floating_point():
            raise ValueError(f"{argument}: expected floating point [..., 4], got {tensor.dtype} {list(tensor.shape)}")
    if len(weights) != 4 or not all(weights):
        raise ValueError(f"weights={weights!r}: expected four numbers other than 0, of dx, dy, dw, dh")


def _coding(op: str, impl: Impl, values: Tensor, anchors: Tensor) -> Callable[..., Tensor]:
    """The implementation.  The kernels have no gradient: where one is wanted, the automatic choice is the reference."""
    wanted = torch.is_grad_enabled() and (values.requires_grad or anchors.requires_grad)
    if impl == "auto" and (wanted or anchors.dtype == torch.float64):
        impl = "reference"
    return choose_kernel(op, impl, values, "reference", "boxes" if op == "encode_boxes" else "deltas")[1]
