"""Images, bytes in memory, to the batch that a network sees: resized, normalised, on a canvas of zeros.

Bytes are interpolated along x, then along y, and normalised after that.  torchvision does it the other way round, which
gives the same numbers, as weights add up to 1.  In float32 a product is not rounded before something is added to it, as
compilers arrange it on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmrcnn_kernels.reference.paste import fused
from fastmrcnn_kernels.views import WIDTH


class Taps(NamedTuple):
    """Where the pixels of an axis lie, [P] each: between two of the image, `share` of the way; which are `inside`."""

    low: Tensor
    high: Tensor
    share: Tensor
    inside: Tensor


def axis_taps(axis: Tensor, pixel: Tensor, dtype: torch.dtype) -> Taps:
    """Taps of each `pixel` of the canvas, int64 [P]; `axis` [4] is what a view says of rows, or of columns.

    As PyTorch's `interpolate` in `dtype`, `align_corners=False`; what lies beyond the image is its last pixel.
    """
    length, resized, start, window = axis.unbind()
    inside = (pixel < window) & (length > 0) & (resized > 0)
    length, resized = length.clamp(min=1), resized.clamp(min=1)
    ratio = length.to(dtype) / resized.to(dtype)
    place = fused((start + pixel).to(dtype) + 0.5, ratio, torch.full_like(ratio, -0.5))
    place = place.clamp(min=0).minimum((length - 1).to(dtype))
    low = place.to(torch.int64)
    return Taps(low, (low + 1).minimum(length - 1), place - low, inside)


def mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """What lies between two tensors, `share` of the way."""
    return fused(share, second - first, first)


def interpolate(pixels: Tensor, offset: Tensor, view: Tensor, y: Taps, x: Taps, channel: Tensor) -> Tensor:
    """Bytes of one image between the taps `y` [P] and `x` [Q], not rounded: [P, Q, C], 0 outside the window.

    `offset` and `view` [8] are of this image, `channel` is 0 .. C - 1; the dtype is that of the taps.
    """
    inside = (y.inside[:, None] & x.inside)[..., None]

    def taps_of(row: Tensor, column: Tensor) -> Tensor:
        byte = ((row[:, None] * view[WIDTH] + column)[..., None]) * len(channel) + channel
        return pixels[torch.where(inside, offset + byte, 0)].to(x.share.dtype)

    above, below = (mix(taps_of(row, x.low), taps_of(row, x.high), x.share[:, None]) for row in (y.low, y.high))
    return mix(above, below, y.share[:, None, None])


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """What normalises a byte: it is multiplied by the first and added to the second, for each channel."""
    scale = [1 / (255 * deviation) for deviation in std]
    return scale, [-m / deviation for m, deviation in zip(mean, std, strict=True)]


def resize_images(
    pixels: Tensor,
    offsets: Tensor,
    views: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See `fastmrcnn.ops.resize_images`; float64 is computed as such, all else in float32, and rounded at the end."""
    exact, device = torch.promote_types(dtype, torch.float32), pixels.device
    scale, shift = (torch.tensor(x, dtype=exact, device="cpu").to(device, non_blocking=True) for x in affine(mean, std))
    batch = torch.zeros(len(views), *size, len(mean), dtype=dtype, device=device)
    channel = torch.arange(len(mean), device=device)
    for i in range(len(views) if pixels.numel() else 0):
        y, x = (
            axis_taps(axis, torch.arange(side, device=device), exact)
            for axis, side in zip(views[i].view(4, 2).unbind(1), size, strict=True)
        )
        values = fused(interpolate(pixels, offsets[i], views[i], y, x, channel), scale, shift)
        batch[i] = torch.where((y.inside[:, None] & x.inside)[..., None], values, 0)
    return batch.permute(0, 3, 1, 2)
