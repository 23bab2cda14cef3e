"""An engine on a CPU: image by image, each on its own canvas, since nothing is gained by a batch or by padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn.batches import ImageBatch
from fastmrcnn.engine.buckets import Bucket, canvas_of
from fastmrcnn.inference import Inference, MaskFormat, Result
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import resized_bytes, resized_size
from fastmrcnn_kernels.views import WINDOW_HEIGHT, whole


class HostRunner:
    """Runs a prepared detector in CPU memory."""

    def __init__(
        self, model: GeneralizedRCNN, dtype: torch.dtype, masks: MaskFormat | None, mask_threshold: float
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.depends_on_padding: list[str] = []  # there is none
        self.inference = Inference(model, masks, mask_threshold)

    def begin(self, images: list[Tensor], bucket: Bucket) -> Callable[[], list[Result]]:
        """See `Runner`."""
        begun = [self._begin(image.cpu()) for image in images]
        return lambda: [result for finish in begun for result in finish()]

    @torch.inference_mode()
    def _begin(self, image: Tensor) -> Callable[[], list[Result]]:
        transform, size = self.model.transform, (image.shape[-2], image.shape[-1])
        resized = resized_size(transform, size)
        image = resized_bytes(transform, image)
        pixels, offsets = ops.pack_images([image])
        views = torch.tensor([whole(image.shape[-2], image.shape[-1], *resized)])
        mean, std = transform.image_mean, transform.image_std
        tensors = ops.resize_images(pixels, offsets, views, canvas_of(transform, size), mean, std, self.dtype)
        found = self.model.detect(ImageBatch(tensors, views[:, WINDOW_HEIGHT:]))
        found = transform.in_original_pixels(found, [resized], [size])
        return self.inference.collect(found, [size])
