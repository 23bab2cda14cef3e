"""Padded batches: what flows between the stages of the network.

N images, K proposals, D detections, G ground-truth objects per image.  The first `count[i]` slots of image i are real,
the others are padding: what they hold never reaches a result.  `count` stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmrcnn_kernels.host import on_host


@dataclass
class ImageBatch:
    """Normalised images in one tensor, each in the top left corner of its canvas.

    Args:
        tensors: [N, 3, Hp, Wp], zero beyond each image; Hp and Wp are what the batch is padded to.
        sizes: (height, width) of each image without the padding, int64 [N, 2].
        canvases: (height, width), int64 [N, 2], of what each image would be padded to on its own, where the network
            keeps them apart, as those of `fastmrcnn.compile` do; None if it sees all of `tensors`.
    """

    tensors: Tensor
    sizes: Tensor
    canvases: Tensor | None = None

    def stride(self, maps: Tensor) -> int:
        """Pixels to a cell of `maps` [N, C, H, W], which have been halved some times, rounded up.

        That shows in the last cell, which may be a part of one, and least on the longer side.
        """
        sides = zip(self.tensors.shape[-2:], maps.shape[-2:], strict=True)
        return 2 ** round(math.log2(max(pixels / cells for pixels, cells in sides)))


@dataclass
class LoadedBatch:
    """Images and targets of a batch as a loader makes them, as few bytes as there are: nothing is resized yet.

    Args:
        image_ids: of the images.
        size: (height, width) of the canvas, in pixels.
        pixels: uint8 [bytes], image after image, each [H, W, C].
        pixel_offsets: where each image begins in `pixels`, int64 [N].
        views: how each image is resized and cropped, int64 [N, 8]: see `fastmrcnn_kernels.views`.
        boxes: [N, G, 4] float32, pixels of the canvas; G slots, at least one.
        labels: [N, G] int64, 1 .. classes - 1.
        count: number of objects of each image, int64 [N].
        words: masks, see `PackedMasks`, or None.
        word_offsets: where those of each image begin in `words`, int64 [N], or None.
        keypoints: [N, G, keypoints, 3] float32 (x, y, visibility), or None.
    """

    image_ids: list[int]
    size: tuple[int, int]
    pixels: Tensor
    pixel_offsets: Tensor
    views: Tensor
    boxes: Tensor
    labels: Tensor
    count: Tensor
    words: Tensor | None = None
    word_offsets: Tensor | None = None
    keypoints: Tensor | None = None

    def pin_memory(self) -> LoadedBatch:
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> LoadedBatch:
        """The same on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def copied(self) -> LoadedBatch:
        """The same in other memory."""
        return self._with(Tensor.clone)

    def _with(self, change: Callable[[Tensor], Tensor]) -> LoadedBatch:
        changed: dict[str, Any] = {}
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                changed[field.name] = change(value)
        return replace(self, **changed)


@dataclass
class PackedMasks:
    """Masks of a batch of images as one bit per pixel, in the images' own size, whatever the network sees of them.

    Args:
        words: int32 [words], object after object of image after image, each [H, ceil(W / 32)] as by `ops.pack_bits`.
        offsets: where those of each image begin in `words`, int64 [N].
        views: how each image, and so its masks, is resized and cropped, int64 [N, 8]: see `fastmrcnn_kernels.views`.
    """

    words: Tensor
    offsets: Tensor
    views: Tensor


@dataclass
class TargetBatch:
    """Ground truth of a batch of images, G slots each (at least one).

    Args:
        boxes: [N, G, 4] float32, pixels of the padded images.
        labels: [N, G] int64, 1 .. classes - 1.
        count: number of objects of each image, int64 [N].
        masks: of the objects, or None.
        keypoints: [N, G, keypoints, 3] float32 (x, y, visibility), or None.
    """

    boxes: Tensor
    labels: Tensor
    count: Tensor
    masks: PackedMasks | None = None
    keypoints: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Which slots hold an object, bool [N, G]."""
        return first(self.count, self.boxes.shape[1])


@dataclass
class ProposalBatch:
    """Class-agnostic boxes from the region proposal network, by descending score.

    Args:
        boxes: [N, K, 4] float32, pixels of the padded images.
        scores: [N, K] objectness in 0 .. 1.
        count: number of proposals of each image, int64 [N].
    """

    boxes: Tensor
    scores: Tensor
    count: Tensor

    @property
    def valid(self) -> Tensor:
        """Which slots hold a proposal, bool [N, K]."""
        return first(self.count, self.boxes.shape[1])


@dataclass
class DetectionBatch:
    """Detections by descending score.

    Args:
        boxes: [N, D, 4] float32, pixels of the padded images.
        scores: [N, D] float32.
        labels: [N, D] int64, 1 .. classes - 1.
        count: number of detections of each image, int64 [N].
        masks: probabilities of the detected class inside the box, [N, D, M, M], or None.
        keypoints: [N, D, keypoints, 4] float32 (x, y, 1, score), or None.
        mask_scores: of the masks, [N, D] float32, of a model that learns them (Mask Scoring R-CNN), or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    mask_scores: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Which slots hold a detection, bool [N, D]."""
        return first(self.count, self.boxes.shape[1])


# What `detect` takes and returns, so that programs of `torch.export` may, too.
for _batch in (ImageBatch, DetectionBatch):
    torch.export.register_dataclass(_batch, serialized_type_name=f"fastmrcnn.{_batch.__name__}")

AnyBatch = TypeVar("AnyBatch", ProposalBatch, DetectionBatch)


def widen(values: Tensor) -> Tensor:
    """`values` in float32 if they have fewer bits (autocast leaves 16): losses, scores and boxes need it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def first(count: Tensor, slots: int) -> Tensor:
    """Whether each of `slots` slots is among the first `count` [N]: bool [N, slots]."""
    return torch.arange(slots, device=count.device) < count[:, None]


def trim(batch: AnyBatch) -> AnyBatch:
    """`batch` without the slots that no image uses, where reading the counts costs nothing; else `batch` itself.

    Saves a CPU the arithmetic on padding.  On a GPU the read would wait for all queued work.
    """
    if not on_host(batch.count):
        return batch
    used = max(batch.count.tolist(), default=0)
    slots = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "count"}
    return replace(batch, **{name: value[:, :used] for name, value in slots.items() if value is not None})
