"""Resizing and cropping that never touches a pixel: it is decided here, and done where images and masks are read.

What is decided for an image is a view, a row of eight integers that `fastmrcnn_kernels.views` describes. Its window,
resized pixels that the network sees, is what the boxes and keypoints of a target are brought to.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastmrcnn.data.types import Target
from fastmrcnn_kernels.views import whole

View: TypeAlias = tuple[int, ...]

# What a target has one of for each object.
PER_OBJECT = ("boxes", "labels", "masks", "keypoints", "area", "iscrowd")


class Resize:
    """Views of whole images, resized as torchvision's detectors do: `GeneralizedRCNNTransform`.

    The shorter side becomes one of `min_sizes`, at random, unless the longer one would exceed `max_size`, which it
    then becomes. Sides are rounded down, as `interpolate` does it, to 1 pixel at least.

    Args:
        min_sizes: in pixels.
        max_size: in pixels.

    Raises:
        ValueError: there is no size, or one is not positive.
    """

    canvas: tuple[int, int] | None = None
    """The size of all batches, (height, width), multiples of 32; None if it is that of their largest window."""

    def __init__(self, min_sizes: Sequence[int], max_size: int) -> None:
        if not min_sizes or min(*min_sizes, max_size) < 1:
            raise ValueError(f"min_sizes and max_size must be positive, got {list(min_sizes)} and {max_size}")
        self.min_sizes = list(min_sizes)
        self.max_size = max_size

    def __call__(self, height: int, width: int) -> View:
        """The view of an image of height x width pixels."""
        min_size = self.min_sizes[int(torch.randint(len(self.min_sizes), ()))]
        scale = min(min_size / min(height, width), self.max_size / max(height, width))
        return whole(height, width, *_scaled(height, width, scale))


class LargeScaleJitter:
    """Views of resized and cropped images: large-scale jitter (Ghiasi et al., 2021).

    An image is scaled to the largest size that fits into the square canvas, times a factor drawn from `low` to `high`.
    Of what exceeds the canvas, a window is drawn that fits; what is smaller leaves the canvas empty at the bottom and
    at the right. torchvision's references do so with `ScaleJitter` and `FixedSizeCrop`, but for crops along the
    diagonal only, and never the last.

    Args:
        size: side of the canvas, in pixels.
        low: least factor.
        high: greatest factor.

    Raises:
        ValueError: `size` is not positive, or the factors are not 0 < low <= high.
    """

    def __init__(self, size: int, low: float = 0.1, high: float = 2.0) -> None:
        if size < 1 or not 0 < low <= high < float("inf"):
            raise ValueError(f"size >= 1 and 0 < low <= high are needed, got {size}, {low} and {high}")
        self.size = size
        self.low = low
        self.high = high
        self.canvas = (round_up(size), round_up(size))

    def __call__(self, height: int, width: int) -> View:
        """The view of an image of height x width pixels."""
        factor = self.low + (self.high - self.low) * torch.rand((), dtype=torch.float64).item()
        resized = _scaled(height, width, min(self.size / height, self.size / width) * factor)
        window = [min(side, self.size) for side in resized]
        start = [int(torch.randint(side - seen + 1, ())) for side, seen in zip(resized, window, strict=True)]
        return (height, width, *resized, *start, *window)


def round_up(side: int, multiple: int = 32) -> int:
    """The least multiple of `multiple` that `side` fits into; of 32, since the network halves images five times."""
    return -(-side // multiple) * multiple


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, int(height * scale)), max(1, int(width * scale))


def look_through(target: Target, view: View, *, min_side: float = 1.0) -> Target:
    """The target of an image in the pixels of a view's window.

    Boxes and keypoints are multiplied by the ratio of sizes, a float32, as torchvision's `resize_boxes` and
    `resize_keypoints` do, and moved by the window's corner. Boxes are clipped to the window. Keypoints outside of it
    become (0, 0, 0), not visible, and so are those that were not to begin with. Masks remain in the image's own pixels,
    and area in its square pixels.

    An object is removed, with all that the target says of it, if its box in the window is less than `min_side` pixels
    wide or high: of large ones slivers, of small ones nothing that a network could find. If the window is a part of
    the image, so is an object with no pixel of its mask in that part.

    Args:
        target: of the image, see `DetectionDataset`; it is not modified.
        view: of the image.
        min_side: in pixels of the window.
    """
    height, width, resized_height, resized_width, top, left, window_height, window_width = view
    ratio = torch.tensor([resized_width, resized_height], dtype=torch.float32) / torch.tensor([width, height])
    corner = torch.tensor([left, top])
    window = torch.tensor([window_width, window_height])

    points = (target["boxes"].reshape(-1, 2, 2) * ratio - corner).clamp(min=0).minimum(window)
    seen = dict(target, boxes=points.reshape(-1, 4))
    kept = (points[:, 1] - points[:, 0] >= min_side).all(dim=1)
    if "masks" in target and (window_height, window_width) != (resized_height, resized_width):
        rows = slice(top * height // resized_height, -(-(top + window_height) * height // resized_height))
        columns = slice(left * width // resized_width, -(-(left + window_width) * width // resized_width))
        kept &= target["masks"][:, rows, columns].flatten(1).any(dim=1).bool()
    if "keypoints" in target:
        seen["keypoints"] = _points_in(target["keypoints"], ratio, corner, window)
    if kept.all():
        return seen
    return seen | {name: seen[name][kept] for name in PER_OBJECT if name in seen}


def _points_in(keypoints: Tensor, ratio: Tensor, corner: Tensor, window: Tensor) -> Tensor:
    """Keypoints [G, K, 3] in a window; its border belongs to it."""
    places, visibility = keypoints[..., :2] * ratio - corner, keypoints[..., 2:]
    inside = ((places >= 0) & (places <= window)).all(dim=-1, keepdim=True) & (visibility > 0)
    return torch.where(inside, torch.cat((places, visibility), dim=-1), 0.0)
