"""Masks pasted and keypoints found: references against torchvision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes
from torch import Tensor
from torchvision.models.detection import roi_heads as torchvision_heads

from fastmrcnn import ops


@given(found=boxes(6, extent=40.0), cells=st.sampled_from([1, 2, 7, 28]), padding=st.integers(0, 2))
def test_paste_equals_torchvision(found: Tensor, cells: int, padding: int) -> None:
    """For boxes that touch the image; torchvision fails on the others."""
    size = (33, 47)
    touching = (found[:, 2:] > 1).all(dim=1) & (found[:, 0] < 45) & (found[:, 1] < 31) & (found.abs() < 1e4).all(dim=1)
    found = found[touching & (found[:, 2:] >= found[:, :2]).all(dim=1)].double()
    masks = torch.rand(len(found), 1, cells, cells, generator=torch.Generator().manual_seed(cells)).double()
    expected = torchvision_heads.paste_masks_in_image(masks, found, size, padding)
    pasted = ops.paste_masks_in_image(masks, found, size, padding)
    assert pasted.shape == expected.shape
    torch.testing.assert_close(pasted, expected, rtol=0, atol=1e-6)  # torchvision's scale is float32
    single = ops.paste_masks_in_image(masks.float(), found.float(), size, padding, impl="torchvision")
    same_box = (found.float().double() - found).abs().amax(dim=1) == 0
    torch.testing.assert_close(single[same_box].double(), expected[same_box], rtol=0, atol=1e-5)


def test_boxes_beside_the_image_and_not_finite_paste_nothing() -> None:
    nan, inf = torch.nan, torch.inf
    found = torch.tensor(
        [[-50.0, 2, -20, 9], [2, 60, 9, 90], [nan, 1, 5, 5], [1, 1, inf, 5], [30, 2, 3, 9], [1e9, 1e9, 2e9, 2e9]]
    )
    pasted = ops.paste_masks(torch.ones(6, 14, 14), found, (20, 30))
    assert pasted.shape == (6, 20, 30)
    assert (pasted[[0, 1, 2, 3, 5]] == 0).all()
    assert torch.isfinite(pasted).all()


def test_a_box_larger_than_the_image_covers_it() -> None:
    pasted = ops.paste_masks(torch.ones(1, 14, 14), torch.tensor([[-100.0, -100, 200, 200]]), (20, 30))
    assert (pasted == 1).all()


def test_bool_is_soft_above_the_threshold() -> None:
    masks = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    found = torch.tensor([[1.0, 2, 20, 15], [5, 5, 6, 6], [0, 0, 30, 20]])
    soft = ops.paste_masks(masks, found, (20, 30))
    assert torch.equal(ops.paste_masks(masks, found, (20, 30), out="bool", threshold=0.3), soft > 0.3)
    with pytest.raises(ValueError, match="out='bits'"):
        ops.paste_masks(masks, found, (20, 30), out="bits")  # type: ignore[arg-type]


@given(found=boxes(5, extent=60.0), seed=st.integers(0, 1000))
def test_keypoints_equal_torchvision(found: Tensor, seed: int) -> None:
    """Scores always; places where the peak stands out (equal peaks may be anywhere)."""
    found = found.clamp(0, 70).double()
    found = torch.cat((found[:, :2], torch.maximum(found[:, :2], found[:, 2:])), dim=1)
    heatmaps = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(seed)).double()
    expected, scores = torchvision_heads.heatmaps_to_keypoints(heatmaps, found)
    places, found_scores = ops.heatmaps_to_keypoints(heatmaps, found, (72, 80), impl="reference")
    torch.testing.assert_close(found_scores.float(), scores, rtol=1e-4, atol=1e-4)
    differs = (places.float() - expected).abs().amax(dim=2) > 1e-3
    assert differs.float().mean() <= 0.1


def test_peak_of_a_keypoint() -> None:
    heatmaps = torch.zeros(1, 1, 14, 14)
    heatmaps[0, 0, 3, 10] = 5.0
    box = torch.tensor([[10.0, 20.0, 38.0, 48.0]])
    for impl in ("reference", "torchvision"):
        places, _ = ops.heatmaps_to_keypoints(heatmaps, box, (64, 64), impl=impl)  # type: ignore[arg-type]
        x, y, visible = places[0, 0].tolist()
        assert abs(x - (10 + 10.5 * 2)) <= 1
        assert abs(y - (20 + 3.5 * 2)) <= 1
        assert visible == 1
