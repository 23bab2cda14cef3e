"""What a user can get wrong in images and targets, found before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads


def check_images(images: Sequence[Tensor], channels: int = 3) -> None:
    """Raise unless `images` are floating-point tensors [C, H, W] of `channels` channels, or of one that stands for all.

    The latter is what torchvision makes of it: normalisation by the numbers of each channel gives as many.
    """
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images: expected a list of [C, H, W] tensors, got one tensor of shape {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("images: the list is empty")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{i}]: expected a Tensor, got {type(image).__name__}")
        if image.dim() != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}]: expected shape [C, H, W], got {list(image.shape)}")
        if len(image) not in (1, channels):
            raise ValueError(f"images[{i}]: expected {channels} channels, as the model has it, got {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"images[{i}]: expected floating point in 0 .. 1, got {image.dtype}; divide bytes by 255")


def check_targets(targets: Sequence[dict[str, Any]], images: Sequence[Tensor], heads: RoIHeads) -> None:
    """Raise unless `targets` hold what the branches of `heads` learn from; reads the device once."""
    if len(targets) != len(images):
        raise ValueError(f"targets: {len(targets)} given for {len(images)} images")
    for i, target in enumerate(targets):
        count = _check_boxes_and_labels(f"targets[{i}]", target)
        if heads.has_mask():
            _check_masks(f"targets[{i}]", target, count, tuple(images[i].shape[-2:]))
        if heads.has_keypoint():
            _check_keypoints(f"targets[{i}]", target, count)

    boxes = torch.cat([target["boxes"] for target in targets])
    degenerate = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if degenerate.any():
        row = int(degenerate.nonzero()[0])
        owner = [i for i, target in enumerate(targets) for _ in range(len(target["boxes"]))][row]
        raise ValueError(
            f"targets[{owner}]['boxes']: All bounding boxes should have positive height and width. "
            f"Found invalid box {boxes[row].tolist()} for target at index {owner}."
        )


def _check_boxes_and_labels(name: str, target: dict[str, Any]) -> int:
    boxes, labels = _get(name, target, "boxes"), _get(name, target, "labels")
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"{name}['boxes']: expected shape [G, 4], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"{name}['boxes']: expected floating point, got {boxes.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}['labels']: expected int64, got {labels.dtype}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"{name}['labels']: expected shape [{len(boxes)}], got {list(labels.shape)}")
    return len(boxes)


def _check_masks(name: str, target: dict[str, Any], count: int, size: tuple[int, ...]) -> None:
    masks = _get(name, target, "masks")
    if tuple(masks.shape) != (count, *size):
        raise ValueError(f"{name}['masks']: expected shape {[count, *size]}, got {list(masks.shape)}")


def _check_keypoints(name: str, target: dict[str, Any], count: int) -> None:
    keypoints = _get(name, target, "keypoints")
    if keypoints.dtype != torch.float32:
        raise TypeError(f"{name}['keypoints']: expected float32, got {keypoints.dtype}")
    if keypoints.dim() != 3 or len(keypoints) != count or keypoints.shape[-1] != 3:
        raise ValueError(f"{name}['keypoints']: expected shape [{count}, K, 3], got {list(keypoints.shape)}")


def _get(name: str, target: dict[str, Any], key: str) -> Tensor:
    if key not in target:
        raise ValueError(f"{name}: Every element of targets should have a {key} key; it has {sorted(target)}")
    if not isinstance(target[key], Tensor):
        raise TypeError(f"{name}[{key!r}]: expected a Tensor, got {type(target[key]).__name__}")
    return target[key]
