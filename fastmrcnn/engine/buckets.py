"""Sizes of images that an engine is made for, and what it says of images that it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmrcnn.models.preprocess import resized_size

Size = tuple[int, int]


class Bucket(NamedTuple):
    """Images of up to `image` pixels, (height, width), whose canvas, resized and padded, is within `canvas`."""

    image: Size
    canvas: Size

    def holds(self, image: Size, canvas: Size) -> bool:
        """Whether an image with this canvas fits."""
        return fits(image, self.image) and fits(canvas, self.canvas)


def fits(size: Size, limit: Size) -> bool:
    """Whether `size` exceeds `limit` nowhere."""
    return size[0] <= limit[0] and size[1] <= limit[1]


def canvas_of(transform: Any, size: Size) -> Size:
    """What an image of `size` is padded to on its own, once it is resized: (height, width)."""
    multiple = transform.size_divisible
    height, width = (math.ceil(side / multiple) * multiple for side in resized_size(transform, size))
    return height, width


def as_buckets(transform: nn.Module, image_sizes: Any) -> list[Bucket]:
    """Buckets for images of `image_sizes`, one (height, width) or several, those of fewest pixels first."""
    sizes = [image_sizes] if is_size(image_sizes) else image_sizes
    if not isinstance(sizes, Sequence) or not len(sizes) or not all(map(is_size, sizes)):
        raise ValueError(f"image_sizes={image_sizes!r}: expected (height, width) in pixels, or several of them")
    pairs = sorted({(int(height), int(width)) for height, width in sizes}, key=lambda size: (math.prod(size), size))
    return sorted((Bucket(size, canvas_of(transform, size)) for size in pairs), key=lambda b: math.prod(b.canvas))


def as_batch_sizes(batch_sizes: Any) -> list[int]:
    """`batch_sizes`, one or several, in ascending order."""
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else batch_sizes
    if not isinstance(sizes, Sequence) or not len(sizes) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"batch_sizes={batch_sizes!r}: expected a positive number of images, or several of them")
    return sorted(set(sizes))


def is_size(value: Any) -> bool:
    """Whether `value` is a height and a width."""
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(x, int) and x > 0 for x in value)


def choose(buckets: Sequence[Bucket], transform: nn.Module, size: Size, name: str) -> Bucket:
    """The smallest of `buckets` that holds an image of `size`."""
    canvas = canvas_of(transform, size)
    for bucket in buckets:
        if bucket.holds(size, canvas):
            return bucket
    made_for = ", ".join(f"{' x '.join(map(str, b.image))} (resized {' x '.join(map(str, b.canvas))})" for b in buckets)
    raise ValueError(
        f"{name}: an image of {size[0]} x {size[1]} pixels (height x width; resized {canvas[0]} x {canvas[1]}) fits "
        f"none of the sizes that the engine was compiled for: {made_for}. Add it to image_sizes, or resize the image"
    )


def check_bytes(images: Any, channels: int) -> list[Tensor]:
    """The images of a call, uint8 [C, H, W] each.

    Raises:
        TypeError, ValueError: they are something else; nothing has been done with any of them.
    """
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images: expected a list of [C, H, W] tensors or one [N, C, H, W], got {list(images.shape)}")
    if not isinstance(images, Tensor | Sequence):
        raise TypeError(f"images: expected a list of uint8 tensors [C, H, W], got {type(images).__name__}")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            hint = "; torch.from_numpy(array).permute(2, 0, 1) is one" if hasattr(image, "__array__") else ""
            raise TypeError(f"images[{i}]: expected a uint8 tensor [C, H, W], got {type(image).__name__}{hint}")
        if image.dtype != torch.uint8:
            raise TypeError(f"images[{i}]: expected bytes, torch.uint8 in 0 .. 255, got {image.dtype}")
        if image.dim() != 3 or image.shape[0] != channels or 0 in image.shape:
            shape = list(image.shape)
            raise ValueError(f"images[{i}]: expected [{channels}, H, W] with H and W of 1 or more, got {shape}")
    return list(images)
