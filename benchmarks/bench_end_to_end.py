"""Detection with Mask R-CNN R50-FPN, from images to masks in the image, with random weights that detect something.

In float32 alone: with random weights none of torchvision's own detections under AMP has a twin among those in float32,
so no comparison could void a number.  `python -m benchmarks.end_to_end` measures the same in pairs, for machines whose
speed drifts, and on photos.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.detection_steps import detectors, photos
from benchmarks.detectors import agreement
from benchmarks.inputs import PHOTO, leave_out
from benchmarks.measure import device_name

SMALL = (240, 320)
CASES = [(1, PHOTO), (2, PHOTO), (8, PHOTO), (1, SMALL)]
Detections = list[dict[str, Tensor]]


class Contender(NamedTuple):
    """Whose model, and how it is run."""

    name: str
    role: str
    channels_last: bool = False

    def __str__(self) -> str:
        return f"{self.name} float32{' channels_last' if self.channels_last else ''}"


CONTENDERS = [
    Contender("fastmrcnn", "ours"),
    Contender("torchvision", "shipped"),
    Contender("torchvision", "tuned", channels_last=True),
]


@cache
def both(count: int, size: tuple[int, int]) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """torchvision's model, ours, and images, which enter both at their own size."""
    images = photos(None, [size] * count)
    theirs, ours = detectors("maskrcnn_resnet50_fpn", None, images, min_size=size[0], max_size=size[1])
    return theirs, ours, [image.to(device_name()).float() / 255 for image in images]


def detection(model: nn.Module, images: list[Tensor], *, channels_last: bool) -> Callable[[], Detections]:
    """Function that detects."""
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def run() -> Detections:
        with torch.inference_mode():
            return model(images)

    return run


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize(("count", "size"), CASES)
def test_end_to_end(count: int, size: tuple[int, int], contender: Contender, timed: Callable[..., None]) -> None:
    leave_out("end to end", size)
    theirs, ours, images = both(count, size)
    expected = detection(theirs, images, channels_last=False)()

    def check(found: Detections) -> None:
        assert sum(len(x["boxes"]) for x in expected) > 0
        agreed = agreement(expected, found)
        assert agreed >= 0.98, f"only {agreed:.1%} of the detections agree"

    model = ours if contender.role == "ours" else theirs
    timed(
        detection(model, images, channels_last=contender.channels_last),
        check,
        op="end to end",
        case=f"{count} x {size[0]}x{size[1]}",
        contender=str(contender),
        role=contender.role,
    )
