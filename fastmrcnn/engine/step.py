"""A detection in fixed shapes, from bytes in one buffer to detections in the pixels of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch, ImageBatch
from fastmrcnn.engine.buckets import Bucket, Size, canvas_of
from fastmrcnn.engine.layers import Canvases
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import BytesPreprocess, resized_size, scaled
from fastmrcnn_kernels.views import COLUMNS, WINDOW_HEIGHT, whole

NUMBERS = COLUMNS + 4
"""int64 of each image: its view, its canvas, and the size in which its detections are wanted."""


@dataclass
class Found:
    """What a step gives.

    Args:
        detections: of each image of the batch, in its own pixels.
        encoding: of their masks, for `ops.begin_encoding`, or None.
    """

    detections: DetectionBatch
    encoding: Tensor | None


class Step:
    """Detection in a batch of `batch` images that `bucket` holds.  Whatever they are, it does the same operations.

    What it reads is `buffer`: numbers of all images, then their bytes, each image's [H, W, C] in a part of its own.

    Args:
        model: a prepared detector.
        canvases: what its layers know them by.
        bucket: sizes.
        batch: number of images; of fewer, the last find nothing in no pixels.
        dtype: of maps.
        threshold: of masks that are encoded, None if they are not.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        canvases: Canvases,
        bucket: Bucket,
        batch: int,
        dtype: torch.dtype,
        threshold: float | None,
    ) -> None:
        self.model, self.canvases, self.bucket, self.batch = model, canvases, bucket, batch
        self.dtype, self.threshold = dtype, threshold
        device = next(model.parameters()).device
        self.channels = len(model.transform.image_mean)
        height, width = bucket.canvas if isinstance(model.transform, BytesPreprocess) else bucket.image
        self.room = -(-height * width * self.channels // 8) * 8
        self.header = 8 * NUMBERS * batch
        self.buffer = torch.zeros(self.header + self.room * batch, dtype=torch.uint8, device=device)
        self.offsets = torch.arange(batch, device=device) * self.room

    def fill(self, buffer: Tensor, images: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Write what is to be read of `images` to a `buffer` in CPU memory like the step's.

        `sizes` are those of the images before they were resized as bytes, if that is how the model has them resized.

        Returns:
            Where in it the pixels of each image belong, uint8 [C, H, W]; those are left to the caller.
        """
        transform = self.model.transform
        numbers = torch.zeros(self.batch * NUMBERS, dtype=torch.int64)
        views, canvases, originals = numbers.split((self.batch * COLUMNS, self.batch * 2, self.batch * 2))
        for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
            view = whole(image.shape[-2], image.shape[-1], *resized_size(transform, size))
            views[i * COLUMNS : (i + 1) * COLUMNS] = torch.tensor(view)
            canvases[2 * i : 2 * i + 2] = torch.tensor(canvas_of(transform, size))
            originals[2 * i : 2 * i + 2] = torch.tensor(size)
        buffer[: self.header] = numbers.view(torch.uint8)
        return self.places(buffer, [(image.shape[-2], image.shape[-1]) for image in images])

    def places(self, buffer: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """Where in a buffer the pixels of images of `sizes` belong, uint8 [C, H, W] each."""
        starts = range(self.header, len(buffer), self.room)
        return [
            buffer[start : start + height * width * self.channels].view(height, width, -1).permute(2, 0, 1)
            for start, (height, width) in zip(starts, sizes, strict=False)
        ]

    @torch.inference_mode()
    def __call__(self) -> Found:
        """Detections in what `buffer` holds now."""
        transform = self.model.transform
        numbers = self.buffer[: self.header].view(torch.int64)
        views, canvases, originals = numbers.split((self.batch * COLUMNS, self.batch * 2, self.batch * 2))
        views, canvases, originals = (x.view(self.batch, -1) for x in (views, canvases, originals))
        pixels, mean, std = self.buffer[self.header :], transform.image_mean, transform.image_std
        tensors = ops.resize_images(pixels, self.offsets, views, self.bucket.canvas, mean, std, self.dtype)
        sizes = views[:, WINDOW_HEIGHT:]
        found = self.detect(ImageBatch(tensors, sizes, canvases))
        found = scaled(found, originals.float() / sizes.clamp(min=1).float())
        encoding = None
        if self.threshold is not None and found.masks is not None:
            encoding = ops.launch_encoding(
                found.masks,
                found.boxes,
                originals,
                self.bucket.image,
                count=found.count,
                threshold=self.threshold,
                semantics=transform.semantics,
            )
        return Found(found, encoding)

    def detect(self, images: ImageBatch) -> DetectionBatch:
        """`GeneralizedRCNN.detect` of images with canvases of their own."""
        model = self.model
        self.canvases.images = images
        features = model.features(images)
        logits, deltas = model.rpn.head(list(features.values()))
        proposals = model.rpn.propose(images, logits, deltas)
        return model.roi_heads.detect(features, proposals, images)
