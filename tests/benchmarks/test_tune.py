"""The variants that are tuned over compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from strategies import DEVICE
from tolerances import assert_within_budget
from torch import Tensor

from benchmarks import tune_roi_align
from benchmarks.inputs import SCALES, Pooling
from benchmarks.tune_roi_align import BACKWARD, FORWARD, Problem, Variant, launch
from fastmrcnn_kernels import torchvision_ops


@pytest.mark.parametrize("variant", FORWARD + BACKWARD, ids=str)
def test_variants_are_right(variant: Variant) -> None:
    """Before any time of a GPU is spent on them."""
    direction = "forward" if variant in FORWARD else "backward"
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 40, 20 >> i, 30 >> i, generator=generator).to(DEVICE) for i in range(4)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    rois = torch.tensor([[0, 3.0, 9, 70, 60], [0, 30, 10, 119, 79]], device=DEVICE)
    weight = torch.randn(2, 40, 3, 3, generator=generator).to(DEVICE)

    def by_torchvision(dtype: torch.dtype) -> Sequence[Tensor]:
        wide, levels = [x.detach().to(dtype).requires_grad_() for x in maps], torch.tensor([0, 1], device=DEVICE)
        pooled = torchvision_ops.multilevel_roi_align(wide, rois.to(dtype), levels, (3, 3), SCALES, 2, False)
        return [pooled] if direction == "forward" else torch.autograd.grad(pooled, wide, weight.to(dtype))

    defaults = {name: getattr(variant.module, name) for name in variant.constants}
    with pytest.MonkeyPatch.context() as patch, variant.applied():
        patch.setattr(tune_roi_align, "BOUNDS", (60.0, 1e9, 1e9))  # small RoIs of two levels
        found = launch(direction, maps, rois, weight, 3)
    for one, other, oracle in zip(found, by_torchvision(torch.float32), by_torchvision(torch.float64), strict=True):
        assert_within_budget(one, other, oracle)
    assert {name: getattr(variant.module, name) for name in variant.constants} == defaults


def test_the_first_variant_is_the_default() -> None:
    for variants in (FORWARD, BACKWARD):
        module, constants = variants[0]
        assert {name: getattr(module, name) for name in constants} == constants


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_result_is_found(direction: str) -> None:
    problem = Problem(direction, Pooling(1, 2, 2, (64, 64)), torch.bfloat16)
    found = problem.launch()
    problem.assert_equal_to_torchvision(found)
    found[0][0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="exceeds the budget"):
        problem.assert_equal_to_torchvision(found)


def test_bytes() -> None:
    """Of maps of 16 x 16, 8 x 8, 4 x 4 and 2 x 2 cells."""
    case = Pooling(1, 2, 2, (64, 64))
    cell, bins = 256 * 2, 2 * 2 * 2
    moved = Problem("backward", case, torch.bfloat16).bytes_moved(BACKWARD[0])
    assert moved["least"] == (16**2 + 8**2 + 4**2 + 2**2 + bins) * cell
    assert bins * cell <= moved["read"] <= 4 * bins * cell
    moved = Problem("forward", case, torch.bfloat16).bytes_moved(FORWARD[0])
    assert moved["read"] == bins * 16 * cell
    assert bins * cell < moved["least"] <= moved["each cell of a RoI once"] + bins * cell
