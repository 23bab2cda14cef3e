"""Images and targets as users give them, to padded batches; detections back to what users get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch, ImageBatch, LoadedBatch, PackedMasks, TargetBatch
from fastmrcnn_kernels.views import WINDOW_HEIGHT, whole


class Preprocess(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and padding, with padded batches as the result."""

    semantics: ops.Semantics = "torchvision"
    """Of masks that are pasted into images."""

    def batch(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None
    ) -> tuple[ImageBatch, TargetBatch | None, list[tuple[int, int]]]:
        """Batch `images` [C, H, W] in 0 .. 1 and their `targets`; also returns the sizes of the resized images.

        The images are laid out channels_last, and with them every feature map: convolutions then copy less, on a CPU
        about a quarter of their time.
        """
        without_masks = targets and [{k: v for k, v in target.items() if k != "masks"} for target in targets]
        image_list, resized = self(images, without_masks)
        sizes = image_list.image_sizes
        tensors = image_list.tensors.contiguous(memory_format=torch.channels_last)
        batch = ImageBatch(tensors, send(sizes, torch.int64, tensors.device))
        if targets is None or resized is None:
            return batch, None, sizes
        padded = pad_targets(resized, batch)
        if all("masks" in target for target in targets):
            words, offsets = ops.pack_masks([target["masks"].to(tensors.device) for target in targets])
            views = [whole(*image.shape[-2:], *size) for image, size in zip(images, sizes, strict=True)]
            padded.masks = PackedMasks(words, offsets, send(views, torch.int64, tensors.device))
        return batch, padded, sizes

    def load(self, batch: LoadedBatch, dtype: torch.dtype = torch.float32) -> tuple[ImageBatch, TargetBatch]:
        """A batch as a training loader makes it, on the device: images in `dtype`, resized, normalised and padded."""
        mean, std = self.image_mean, self.image_std
        tensors = ops.resize_images(batch.pixels, batch.pixel_offsets, batch.views, batch.size, mean, std, dtype)
        masks = None
        if batch.words is not None and batch.word_offsets is not None:
            masks = PackedMasks(batch.words, batch.word_offsets, batch.views)
        images = ImageBatch(tensors, batch.views[:, WINDOW_HEIGHT:])
        return images, TargetBatch(batch.boxes, batch.labels, batch.count, masks, batch.keypoints)

    def normalize(self, image: Tensor) -> Tensor:
        """torchvision's, but for its copies of mean and deviation to the device, which wait for all queued work."""
        if not image.is_floating_point():
            return super().normalize(image)  # raises
        mean, std = (send(values, image.dtype, image.device) for values in (self.image_mean, self.image_std))
        return (image - mean[:, None, None]) / std[:, None, None]

    def in_original_pixels(
        self, detections: DetectionBatch, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> DetectionBatch:
        """Boxes and keypoints of resized images of `sizes`, scaled to those of `original_sizes`.

        To the bit as torchvision's `resize_boxes` and `resize_keypoints`, for the whole batch.  Never waits.
        """
        new, old = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (original_sizes, sizes))
        return scaled(detections, (new / old).to(detections.boxes.device, detections.boxes.dtype, non_blocking=True))

    def results(
        self,
        detections: DetectionBatch,
        sizes: list[tuple[int, int]],
        original_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections of each image in its original pixels, masks pasted: the one place that waits for the device."""
        detections = self.in_original_pixels(detections, sizes, original_sizes)
        results = []
        for i, count in enumerate(detections.count.tolist()):
            boxes, labels, scores = (x[i, :count] for x in (detections.boxes, detections.labels, detections.scores))
            result = {"boxes": boxes, "labels": labels, "scores": scores}
            if detections.masks is not None:
                masks = detections.masks[i, :count]
                result["masks"] = ops.paste_masks(masks, boxes, original_sizes[i], semantics=self.semantics)[:, None]
            if detections.mask_scores is not None:
                result["mask_scores"] = detections.mask_scores[i, :count]
            if detections.keypoints is not None:
                keypoints, keypoint_scores = detections.keypoints[i, :count].split((3, 1), dim=-1)
                result["keypoints"] = keypoints
                result["keypoints_scores"] = keypoint_scores.squeeze(-1)
            results.append(result)
        return results


def scaled(detections: DetectionBatch, ratios: Tensor) -> DetectionBatch:
    """Boxes and keypoints in images that are `ratios` [N, 2] times as high and as wide."""
    boxes, keypoints = detections.boxes, detections.keypoints
    xy = ratios.flip(1)[:, None]
    if keypoints is not None:
        moved = keypoints[..., :2] * xy[:, :, None].to(keypoints.dtype)  # float32 also where boxes are float64
        keypoints = torch.cat((moved, keypoints[..., 2:]), dim=-1)
    return replace(detections, boxes=boxes * xy.repeat(1, 1, 2), keypoints=keypoints)


class BytesPreprocess(Preprocess):
    """Images resized as bytes, to sides rounded to the nearest, and normalised then: detectron2's order and sizes.

    Bytes are what these libraries read and resize; images that hold others are rounded to them.

    Args:
        resize_bytes: uint8 [C, H, W] and (height, width) to uint8 [C, height, width].
        **options: of torchvision's `GeneralizedRCNNTransform`.
    """

    def __init__(self, resize_bytes: Callable[[Tensor, tuple[int, int]], Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.resize_bytes = resize_bytes

    def normalize(self, image: Tensor) -> Tensor:
        """Nothing yet; an image of integers is an error."""
        return image if image.is_floating_point() else super().normalize(image)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """An image resized, and normalised; boxes and keypoints of its target scaled."""
        before = (image.shape[-2], image.shape[-1])
        shorter = float(self.torch_choice(self.min_size) if self.training else self.min_size[-1])
        after = self.size_of(before, shorter)
        pixels = (image * 255).round().clamp(0, 255).to(torch.uint8)
        resized = super().normalize(self.resize_bytes(pixels, after).to(image.dtype) / 255)
        if target is None:
            return resized, None
        target = dict(target, boxes=resize_boxes(target["boxes"], before, after))
        if "keypoints" in target:
            target["keypoints"] = resize_keypoints(target["keypoints"], before, after)
        return resized, target

    def size_of(self, size: tuple[int, int], shorter: float | None = None) -> tuple[int, int]:
        """What an image of `size` is resized to, both (height, width): detectron2's `ResizeShortestEdge`."""
        shorter = float(self.min_size[-1]) if shorter is None else shorter
        scale = shorter / min(size)
        height, width = (shorter if side == min(size) else scale * side for side in size)
        if max(height, width) > self.max_size:
            scale = self.max_size / max(height, width)
            height, width = height * scale, width * scale
        return int(height + 0.5), int(width + 0.5)


def options_of(transform: GeneralizedRCNNTransform) -> dict[str, Any]:
    """What a transform of the same sizes and normalisation is made with."""
    return {name: getattr(transform, name) for name in ("min_size", "max_size", "image_mean", "image_std")}


def resized_size(transform: GeneralizedRCNNTransform, size: tuple[int, int]) -> tuple[int, int]:
    """What `transform`, ours or torchvision's, resizes an image of `size` to in evaluation: both (height, width)."""
    if isinstance(transform, BytesPreprocess):
        return transform.size_of(size)
    if transform.fixed_size is not None:
        return transform.fixed_size[1], transform.fixed_size[0]
    height, width = size
    scale = min(transform.min_size[-1] / min(size), transform.max_size / max(size))
    return max(1, int(height * scale)), max(1, int(width * scale))


def resized_bytes(transform: GeneralizedRCNNTransform, image: Tensor) -> Tensor:
    """An image, uint8 [C, H, W], resized, if `transform` resizes bytes; else itself."""
    if not isinstance(transform, BytesPreprocess):
        return image
    return transform.resize_bytes(image, transform.size_of((image.shape[-2], image.shape[-1])))


def send(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers as a tensor on `device`, without waiting for what is queued there, as `torch.tensor` does."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def pad_targets(targets: list[dict[str, Any]], images: ImageBatch) -> TargetBatch:
    """Boxes, labels and keypoints of resized images, padded to the largest number of objects (at least 1)."""
    device = images.tensors.device
    wide = torch.promote_types(images.tensors.dtype, torch.float32)
    counts = [len(t["boxes"]) for t in targets]
    slots = max(1, *counts)

    def pad(name: str, dtype: torch.dtype) -> Tensor | None:
        if any(name not in t for t in targets):
            return None
        rows = [t[name].to(device, dtype) for t in targets]
        tail = max((row.shape[1:] for row in rows), key=len)
        padded = torch.zeros(len(rows), slots, *tail, device=device, dtype=dtype)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded

    boxes, labels = pad("boxes", wide), pad("labels", torch.int64)
    if boxes is None or labels is None:
        raise ValueError("targets: every target needs 'boxes' and 'labels'")
    count = send(counts, torch.int64, device)
    return TargetBatch(boxes, labels, count, keypoints=pad("keypoints", wide))
