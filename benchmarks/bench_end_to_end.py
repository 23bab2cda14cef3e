"""Detection with Mask R-CNN R50-FPN, from images to masks in the image, with random weights that detect something.

`python -m benchmarks.end_to_end` measures the same in pairs, for machines whose speed drifts, and on photos.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.detectors import agreement
from benchmarks.end_to_end import load_images, models
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
    amp: bool = False

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        return f"{self.name} {'AMP' if self.amp else 'float32'}{layout}"


CONTENDERS = [
    Contender("fastmrcnn", "ours"),
    Contender("fastmrcnn", "ours", amp=True),
    Contender("torchvision", "shipped"),
    Contender("torchvision", "tuned", channels_last=True),
    Contender("torchvision", "tuned", channels_last=True, amp=True),
]


@cache
def both(count: int, size: tuple[int, int]) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """torchvision's model, ours, and images, which enter both at their own size."""
    images = load_images(None, size, count)
    return *models("maskrcnn_resnet50_fpn", images, min_size=size[0], max_size=size[1]), images


def detection(model: nn.Module, images: list[Tensor], *, channels_last: bool, amp: bool) -> Callable[[], Detections]:
    """Function that detects."""
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def run() -> Detections:
        with torch.inference_mode(), torch.autocast(device_name(), enabled=amp, dtype=torch.float16):
            return model(images)

    return run


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize(("count", "size"), CASES)
def test_end_to_end(count: int, size: tuple[int, int], contender: Contender, timed: Callable[..., None]) -> None:
    """In 16 bits detections differ from those in 32, torchvision's own, too: at most twice as many may of ours."""
    leave_out("end to end", size, torch.float16 if contender.amp else torch.float32)
    theirs, ours, images = both(count, size)
    expected = detection(theirs, images, channels_last=False, amp=False)()
    twin = detection(theirs, images, channels_last=False, amp=contender.amp)()

    def check(found: Detections) -> None:
        assert sum(len(x["boxes"]) for x in expected) > 0
        differ = 1 - agreement(expected, found)
        allowed = 2 * (1 - agreement(expected, twin)) + 0.02
        assert differ <= allowed, f"{differ:.1%} of the detections differ, {allowed:.1%} may"

    model = ours if contender.role == "ours" else theirs
    timed(
        detection(model, images, channels_last=contender.channels_last, amp=contender.amp),
        check,
        op="end to end",
        case=f"{count} x {size[0]}x{size[1]}",
        contender=str(contender),
        role=contender.role,
    )
