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


def assert_is_nms(kept: Tensor, boxes: Tensor, scores: Tensor, groups: Tensor) -> None:
    """No kept box overlaps another one of its group, and every other box overlaps a kept one of higher score.

    Overlaps are computed in float64; those within ten roundings of float32 of the threshold may count or not.
    """
    band = 10 * torch.finfo(torch.float32).eps
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

    def check(kept: Tensor) -> None:
        if role == "ours" or not batched:  # torchvision moves each class elsewhere, which rounds its boxes
            assert_is_nms(kept, boxes, scores, groups)

    timed(
        suppress,
        check,
        op="batched_nms" if batched else "nms",
        case=f"{count:,} boxes, {'clustered' if clustered else 'sparse'}",
        contender=f"{name} float32",
        role=role,
        least_bytes=boxes.nbytes + scores.nbytes + (groups.nbytes if batched else 0) + 8 * len(suppress()),
    )
