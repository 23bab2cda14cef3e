"""Anchors and proposals matched to ground truth, as training does for every batch.

torchvision's way is a matrix of overlaps per image, and its `Matcher` over that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from benchmarks.inputs import HEAD_STRIDES, PHOTO, SMALL, Pooling, leave_out, random_rois
from benchmarks.measure import device_name
from fastmrcnn import ops

PROPOSALS = 2000


class Case(NamedTuple):
    """A batch of images with so many objects each, to which all anchors are matched, or 2,000 proposals per image."""

    images: int
    objects: int
    anchors: bool
    size: tuple[int, int] = PHOTO

    def __str__(self) -> str:
        boxes = "anchors" if self.anchors else f"{PROPOSALS:,} proposals"
        return f"{self.images} x {self.objects} objects, {boxes}, {self.size[0]}x{self.size[1]}"


CASES = [Case(n, objects, anchors) for anchors in (True, False) for n in (1, 2, 8) for objects in (7, 20, 100)]
CASES += [Case(2, objects, anchors, SMALL) for anchors in (True, False) for objects in (7, 20)]
CONTENDERS = [("fastmrcnn", "ours"), ("torchvision", "shipped"), ("reference", "reference")]


def all_anchors(size: tuple[int, int]) -> Tensor:
    """The anchors of a pyramid, [1, B, 4]: 3 per cell of five levels, 268,569 of them for a photo."""
    generator = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    height, width = (math.ceil(side / 32) * 32 for side in size)
    maps = [torch.empty(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in HEAD_STRIDES]
    return generator(ImageList(torch.empty(1, 3, height, width), [(height, width)]), maps)[0][None].to(device_name())


def random_boxes(case: Case, number: int) -> Tensor:
    """Boxes [N, number, 4] inside the images, their sides from 16 to 640 pixels."""
    return random_rois(Pooling(case.images, number, 7, case.size))[:, 1:].unflatten(0, (case.images, number))


@pytest.mark.parametrize(("name", "role"), CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_match_boxes(case: Case, name: str, role: str, timed: Callable[..., None]) -> None:
    leave_out("match_boxes", case.size)
    boxes = all_anchors(case.size) if case.anchors else random_boxes(case, PROPOSALS)
    truth = random_boxes(case, case.objects)
    count = torch.full((case.images,), case.objects, device=device_name())
    high, low = (0.7, 0.3) if case.anchors else (0.5, 0.5)
    matcher = Matcher(high, low, allow_low_quality_matches=case.anchors)

    def by_torchvision(boxes: Tensor, truth: Tensor) -> Tensor:
        of_images = zip(truth, boxes.expand(case.images, -1, -1), strict=True)
        return torch.stack([matcher(box_iou(objects, its)) for objects, its in of_images])

    expected = by_torchvision(boxes.cpu(), truth.cpu())
    impl: ops.Impl = "reference" if role == "reference" else "auto"

    def by_us() -> Tensor:
        return ops.match_boxes(boxes, truth, count, high=high, low=low, allow_low_quality=case.anchors, impl=impl)

    def check(found: Tensor) -> None:
        assert torch.equal(found.cpu(), expected)

    timed(
        (lambda: by_torchvision(boxes, truth)) if role == "shipped" else by_us,
        check,
        op="match_boxes",
        case=str(case),
        contender=f"{name} float32",
        role=role,
        least_bytes=boxes.nbytes + truth.nbytes + 8 * expected.numel(),
    )
