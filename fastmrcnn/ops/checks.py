"""What the public operations refuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """(height, width) of the argument `name`, which may be one int for both; ValueError if they are not positive."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values = (values[0], values[0])
    if len(values) != 2 or any(v < 1 for v in values):
        raise ValueError(f"{name}={value!r}: expected a positive int or two of them (height, width)")
    return values[0], values[1]


def check(
    name: str, tensor: Tensor, *shape: int | None, floating: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Raise unless `tensor` has `shape`, where None stands for any length, and `dtype`, or any `floating` one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(w is None or s == w for s, w in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("*" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if dtype is None and floating and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")


def widen(boxes: Tensor) -> Tensor:
    """`boxes` in float32 if they have 16 bits, too few for pixels."""
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()


def check_pyramid(features: Sequence[Tensor]) -> None:
    """Raise unless `features` are maps [N, C, Hl, Wl] of one floating dtype, with N and C in common.

    Called for every pooling: what is right passes one quick look, and only what is not is named.
    """
    shape, dtype = getattr(features[0], "shape", ())[:2], getattr(features[0], "dtype", None)
    for feature in features:
        like_first = isinstance(feature, Tensor) and feature.shape[:2] == shape and feature.dtype == dtype
        if not like_first or feature.dim() != 4 or not feature.is_floating_point():
            break
    else:
        return
    for i, feature in enumerate(features):
        check(f"features[{i}]", feature, None, None, None, None)
        check(f"features[{i}]", feature, *shape, None, None, dtype=dtype)


def as_rois(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """RoIs [R, 5] (batch index, box) of boxes given as such, or as one [L, 4] per image."""
    if isinstance(boxes, Tensor):
        check("boxes", boxes, None, 5)
        return boxes
    if not len(boxes):
        raise ValueError("boxes: expected a Tensor [R, 5] or one [L, 4] per image, got none")
    for i, image_boxes in enumerate(boxes):
        check(f"boxes[{i}]", image_boxes, None, 4)
    index = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat((torch.cat(index), torch.cat(list(boxes))), dim=1)
