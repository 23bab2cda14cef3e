"""A step of training of Mask R-CNN R50-FPN on a batch that is on the device: losses, gradients, update.

The images have eight objects each and enter the network at their own size.  The weights are random, but spread like
trained ones; the first two stages of the backbone and its norms are frozen, as in torchvision's recipes.  A contender
has a time only if it learns from a batch what torchvision does: where all anchors and proposals are sampled, its losses
and the norm of its gradients are within 1 % of those in float32, in 16 bits within that and twice autocast's error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from torch import Tensor, nn

from benchmarks.inputs import PHOTO, leave_out
from benchmarks.training_steps import (
    CONTENDERS,
    Contender,
    Expected,
    assert_learns_the_same,
    dataset,
    detector,
    expected,
    run_of,
)
from fastmrcnn.data import Shapes
from fastmrcnn.training.config import Precision
from fastmrcnn.training.step import DTYPES

SMALL = (240, 320)
CASES = [(1, PHOTO), (2, PHOTO), (8, PHOTO), (1, SMALL), (2, SMALL)]


@cache
def inputs(count: int, size: tuple[int, int]) -> tuple[nn.Module, Shapes]:
    """torchvision's model, and images."""
    data = dataset(count, size)
    return detector([data[i][0] for i in range(count)]), data


@cache
def wanted(count: int, size: tuple[int, int], precision: Precision) -> Expected:
    """What it learns from them."""
    return expected(*inputs(count, size), precision)


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize(("count", "size"), CASES)
def test_training_step(count: int, size: tuple[int, int], contender: Contender, timed: Callable[..., None]) -> None:
    leave_out("training step", size, DTYPES[contender.precision])
    run = run_of(contender, *inputs(count, size))
    batch = run.load()

    def check(losses: dict[str, Tensor]) -> None:
        assert all(loss.isfinite() for loss in losses.values())
        assert_learns_the_same(run, wanted(count, size, contender.precision))

    timed(
        lambda: run.step(batch),
        check,
        op="training step",
        case=f"{count} x {size[0]}x{size[1]}",
        contender=str(contender),
        role=contender.role,
    )
