"""Non-maximum suppression of a flat list of boxes, of one class and of 80, each library called as its users call it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.inputs import scored_boxes
from benchmarks.measure import device_name
from fastmrcnn import ops
from fastmrcnn_kernels.reference.boxes import pairwise_iou

COUNTS = [100, 300, 1000, 3000, 10_000, 100_000]
MOST_ON_A_CPU = 10_000
THRESHOLD = 0.5
CLASSES = 80
CONTENDERS = [("fastmrcnn", "ours"), ("torchvision", "shipped")]


EPS = torch.finfo(torch.float32).eps
ROUNDING = 10 * EPS
"""Of overlaps computed in float32."""


def rounding_when_moved(boxes: Tensor, groups: int) -> float:
    """Of overlaps in float32 when each of so many groups is moved beyond the ones before it.

    There a corner is rounded by up to eps / 2 of the largest coordinate, a side of length s by twice that, and areas,
    intersections and unions by 2 eps / s of it.  Four of them make an overlap.
    """
    largest = groups * (boxes.amax() - boxes.amin().clamp(max=0) + 1)
    return ROUNDING + float(8 * EPS * largest / (boxes[:, 2:] - boxes[:, :2]).amin())


def assert_is_nms(kept: Tensor, boxes: Tensor, scores: Tensor, groups: Tensor, band: float = ROUNDING) -> None:
    """No kept box overlaps another one of its group, and every other box overlaps a kept one of higher score.

    Overlaps are computed in float64; those within `band` of the threshold may count or not.
    """
    assert (scores[kept].diff() <= 0).all()
    above, below = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    for some in kept.split(1000):
        iou = pairwise_iou(boxes[some].double(), boxes.double())
        comes_first = (groups[some, None] == groups) & (scores[some, None] > scores)
        above |= ((iou > THRESHOLD + band) & comes_first).any(dim=0)
        below |= ((iou > THRESHOLD - band) & comes_first).any(dim=0)
    is_kept = torch.zeros_like(above).index_fill(0, kept, True)
    assert not (is_kept & above).any(), "a kept box overlaps another one"
    assert (is_kept | below).all(), "a box was dropped that overlaps none"


@pytest.mark.parametrize(("name", "role"), CONTENDERS)
@pytest.mark.parametrize("clustered", [False, True], ids=["sparse", "clustered"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batched", [False, True], ids=["nms", "batched_nms"])
def test_nms(batched: bool, count: int, clustered: bool, name: str, role: str, timed: Callable[..., None]) -> None:
    if not torch.cuda.is_available() and count > MOST_ON_A_CPU:
        pytest.skip(f"left out, for want of a GPU: nms of {count} boxes")
    boxes, scores = scored_boxes(count, clustered=clustered)
    groups = torch.zeros(count, dtype=torch.int64, device=device_name())
    if batched:
        generator = torch.Generator().manual_seed(1)
        groups = torch.randint(0, CLASSES, (count,), generator=generator).to(device_name())
    library = ops if role == "ours" else torchvision.ops

    def suppress() -> Tensor:
        if batched:
            return library.batched_nms(boxes, scores, groups, THRESHOLD)
        return library.nms(boxes, scores, THRESHOLD)

    moves = batched and role != "ours"
    band = rounding_when_moved(boxes, CLASSES) if moves else ROUNDING

    def check(kept: Tensor) -> None:
        assert_is_nms(kept, boxes, scores, groups, band)

    timed(
        suppress,
        check,
        op="batched_nms" if batched else "nms",
        case=f"{count:,} boxes, {'clustered' if clustered else 'sparse'}",
        contender=f"{name} float32",
        role=role,
        least_bytes=boxes.nbytes + scores.nbytes + (groups.nbytes if batched else 0) + 8 * len(suppress()),
    )
