"""Masks pasted: the reference against torchvision."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes
from tolerances import assert_exact_arithmetic, assert_same_decisions, assert_within_budget
from torch import Tensor
from torchvision.models.detection import roi_heads as torchvision_heads

from fastmrcnn import ops
from fastmrcnn_kernels.reference.paste import paste_box

IMPLEMENTATIONS: list[ops.Impl] = ["reference", "torchvision"]


SIZE = (33, 47)


def touching(found: Tensor, cells: int, padding: int) -> Tensor:
    """Those of `found` that torchvision can paste: they touch the image, and their masks fit into memory."""
    corners = paste_box(found, cells, padding)
    inside = (corners[:, 2:] >= 0).all(dim=1) & (corners[:, 0] < SIZE[1]) & (corners[:, 1] < SIZE[0])
    return found[inside & (found[:, 2:] >= found[:, :2]).all(dim=1) & (found.abs() < 1e3).all(dim=1)]


@given(found=boxes(6, extent=40.0), cells=st.sampled_from([1, 2, 7, 28]), padding=st.integers(0, 2))
def test_equals_torchvision(found: Tensor, cells: int, padding: int) -> None:
    found = touching(found.double(), cells, padding)
    masks = torch.rand(len(found), 1, cells, cells, generator=torch.Generator().manual_seed(cells)).double()
    expected = torchvision_heads.paste_masks_in_image(masks, found, SIZE, padding)
    for impl in IMPLEMENTATIONS:
        pasted = ops.paste_masks_in_image(masks, found, SIZE, padding, impl=impl)
        assert pasted.shape == expected.shape
        assert_exact_arithmetic(pasted, expected)


@given(found=boxes(6, extent=40.0), cells=st.sampled_from([2, 14, 28]))
def test_float32_keeps_to_the_budget(found: Tensor, cells: int) -> None:
    """Where rounding moves no corner of a box to another pixel."""
    found = touching(found, cells, 1)
    found = found[(paste_box(found, cells, 1) == paste_box(found.double(), cells, 1)).all(dim=1)]
    masks = torch.rand(len(found), cells, cells, generator=torch.Generator().manual_seed(cells))
    oracle = ops.paste_masks(masks.double(), found.double(), SIZE, impl="torchvision")
    reference, other = (ops.paste_masks(masks, found, SIZE, impl=impl) for impl in IMPLEMENTATIONS)
    assert_within_budget(reference, other, oracle)
    filled = ops.paste_masks(masks, found, SIZE, out="bool")
    band = (cells + 2) * torch.finfo(torch.float32).eps  # one rounding of a position in the mask, whose slope is 1
    assert_same_decisions(filled, oracle > 0.5, (oracle - 0.5).abs(), band)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_pixel(impl: ops.Impl) -> None:
    """A box that lies within a pixel shows the middle of its mask there, and nothing elsewhere."""
    masks = torch.arange(49.0).view(1, 7, 7) / 49
    pasted = ops.paste_masks(masks, torch.tensor([[5.4, 3.4, 5.6, 3.6]]), (8, 9), impl=impl)
    assert pasted[0, 3, 5] == masks[0, 3, 3]
    assert (pasted != 0).sum() == 1


def test_no_masks() -> None:
    for impl in IMPLEMENTATIONS:
        assert ops.paste_masks(torch.zeros(0, 7, 7), torch.zeros(0, 4), (8, 9), impl=impl).shape == (0, 8, 9)


def test_boxes_beside_the_image_and_not_finite_paste_nothing() -> None:
    nan, inf = torch.nan, torch.inf
    found = torch.tensor(
        [[-50.0, 2, -20, 9], [2, 60, 9, 90], [nan, 1, 5, 5], [1, 1, inf, 5], [30, 2, 3, 9], [1e9, 1e9, 2e9, 2e9]]
    )
    pasted = ops.paste_masks(torch.ones(6, 14, 14), found, (20, 30))
    assert pasted.shape == (6, 20, 30)
    assert (pasted == 0).all()


def test_a_box_larger_than_the_image_covers_it() -> None:
    pasted = ops.paste_masks(torch.ones(1, 14, 14), torch.tensor([[-100.0, -100, 200, 200]]), (20, 30))
    assert (pasted == 1).all()


def test_bool_is_soft_above_the_threshold() -> None:
    masks = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    found = torch.tensor([[1.0, 2, 20, 15], [5, 5, 6, 6], [0, 0, 30, 20]])
    soft = ops.paste_masks(masks, found, (20, 30))
    assert torch.equal(ops.paste_masks(masks, found, (20, 30), out="bool", threshold=0.3), soft > 0.3)
    with pytest.raises(ValueError, match="out='bits'"):
        ops.paste_masks(masks, found, (20, 30), out=cast(Any, "bits"))
