"""What a run does to its images at random, put together from its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import Compose

from fastmrcnn.data.copy_paste import CopyPaste
from fastmrcnn.data.transforms import HorizontalFlip, PhotometricDistort, left_right_pairs
from fastmrcnn.data.types import DetectionDataset, Target
from fastmrcnn.data.views import LargeScaleJitter, Resize
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.training.config import AugmentConfig


def transforms(
    config: AugmentConfig, dataset: DetectionDataset
) -> Callable[[Tensor, Target], tuple[Tensor, Target]] | None:
    """What is done to pixels, and with them to targets; None for nothing."""
    steps: list[Any] = []
    if config.copy_paste:
        steps.append(CopyPaste(dataset, config.copy_paste))
    if config.colour:
        steps.append(PhotometricDistort(config.colour))
    if config.flip:
        pairs = left_right_pairs(getattr(dataset, "keypoint_names", [])) if dataset.num_keypoints else None
        steps.append(HorizontalFlip(config.flip, pairs))
    return Compose(steps) if steps else None


def view(config: AugmentConfig, model: GeneralizedRCNN) -> Resize | LargeScaleJitter:
    """How images are resized and cropped: to what `model` does in evaluation, unless `config` says otherwise."""
    if config.jitter is not None:
        return LargeScaleJitter(config.jitter, *config.jitter_range)
    return Resize(config.min_sizes or model.transform.min_size, model.transform.max_size)
