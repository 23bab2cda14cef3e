"""A small data set of images of several sizes, for tests of what loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from fastmrcnn.data import CopyPaste, HorizontalFlip, LargeScaleJitter, PhotometricDistort, Shapes, TrainingItems


class Mixed:
    """Shapes of three sizes, and with keypoints if wanted."""

    def __init__(self, num_keypoints: int = 0, length: int = 12) -> None:
        sizes = (48, 64), (64, 40), (40, 40)
        self.parts = [Shapes(length, image_size=size, seed=i, min_objects=0) for i, size in enumerate(sizes)]
        self.image_ids = list(range(1, length + 1))
        self.num_classes, self.num_keypoints = 4, num_keypoints
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_size(self, i: int) -> tuple[int, int]:
        return self.parts[i % 3].size

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        self.reads.append(i)
        image, target = self.parts[i % 3][i]
        if self.num_keypoints:
            target["keypoints"] = target["boxes"][:, None, [0, 1, 0]].repeat(1, self.num_keypoints, 1)
            target["keypoints"][..., 2] = 2
        return image, target


def training_items(dataset: Any, view: Callable[[int, int], Any] | None = None, seed: int = 3) -> TrainingItems:
    """Its samples with everything done to them that is random."""
    steps: list[Any] = [HorizontalFlip(0.5, ()), PhotometricDistort(0.5)]
    if not dataset.num_keypoints:
        steps.insert(0, CopyPaste(dataset, 0.5))
    return TrainingItems(dataset, seed, v2.Compose(steps), view or LargeScaleJitter(100, 0.1, 1.0))


def assert_same(first: Any, second: Any) -> None:
    """Two samples, or batches, are equal to the bit."""
    assert type(first) is type(second)
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype
            assert torch.equal(value, other), name
        else:
            assert value == other, name
