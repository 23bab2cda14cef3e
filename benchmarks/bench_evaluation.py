"""Evaluation of the detections of some images, from small masks to COCO's numbers: see `benchmarks/evaluation.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks.evaluation import DETECTIONS, SIZE, Numbers, contenders, difference

CASES = [(100, 1), (100, 8), (10, 1)]


@cache
def calls(count: int, batch_size: int) -> tuple[dict[str, Callable[[], Numbers]], Numbers]:
    """Contenders, and the numbers that they should find."""
    found = contenders(count, batch_size)
    return found, found["torchvision"]()


@pytest.mark.parametrize(("name", "role"), [("fastmrcnn", "ours"), ("torchvision", "shipped")])
@pytest.mark.parametrize(("count", "batch_size"), CASES)
def test_evaluation(count: int, batch_size: int, name: str, role: str, timed: Callable[..., None]) -> None:
    if count == 100 and not torch.cuda.is_available():
        pytest.skip("left out, for want of a GPU: evaluation of 100 images")
    found, expected = calls(count, batch_size)

    def check(numbers: Numbers) -> None:
        assert expected["segm"][0] > 0.1
        assert difference(numbers, expected) <= 1e-9

    case = f"{count} images {SIZE[0]}x{SIZE[1]}, {DETECTIONS} detections, batch {batch_size}"
    timed(found[name], check, op="evaluation", case=case, contender=name, role=role)
