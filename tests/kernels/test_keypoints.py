"""Keypoints found in heatmaps: the reference against torchvision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes, ordered
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection import roi_heads as torchvision_heads

from fastmrcnn import ops
from fastmrcnn_kernels.reference.keypoints import bicubic_weights

EPS = torch.finfo(torch.float32).eps  # torchvision returns float32, whatever it is given


def peak_stands_out(heatmap: Tensor, box: Tensor) -> Tensor:
    """Whether the highest pixel of each enlarged `heatmap` [K, S, S] is higher than any other: bool [K]."""
    width, height = (box[2:] - box[:2]).clamp(min=1).ceil().int().tolist()
    pixels = functional.interpolate(heatmap[None], size=(height, width), mode="bicubic").flatten(2)[0]
    if pixels.shape[1] == 1:
        return torch.ones(len(pixels), dtype=torch.bool)
    highest = pixels.topk(2, dim=1).values
    return highest[:, 0] - highest[:, 1] > 1e-9


@given(found=boxes(3, extent=60.0), cells=st.sampled_from([1, 5, 14]), seed=st.integers(0, 1000))
def test_equals_torchvision(found: Tensor, cells: int, seed: int) -> None:
    """Scores always; places where the peak stands out (equal peaks may be anywhere)."""
    found = ordered(found.clamp(0, 70)).double()
    found[0] = torch.tensor([2.5, 1.5, 2.5 + 80, 1.5 + 72])  # exactly as large as allowed
    heatmaps = torch.randn(3, 3, cells, cells, generator=torch.Generator().manual_seed(seed)).double()
    expected, expected_scores = torchvision_heads.heatmaps_to_keypoints(heatmaps, found)
    places, scores = ops.heatmaps_to_keypoints(heatmaps, found, (72, 80), impl="reference")
    torch.testing.assert_close(scores.float(), expected_scores, rtol=2 * EPS, atol=1e-12)
    unique = torch.stack([peak_stands_out(h, b) for h, b in zip(heatmaps, found, strict=True)])
    assert unique[0].all() or cells == 1
    torch.testing.assert_close(places.float()[unique], expected[unique], rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 23])
def test_weights_are_those_of_interpolate(length: int) -> None:
    cells = torch.eye(7, dtype=torch.float64)[None]
    expected = functional.interpolate(cells[:, :, None], size=(1, length), mode="bicubic")[0, :, 0].T
    found = bicubic_weights(torch.tensor([length], dtype=torch.float64), 7, 30)[0, :length]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_flat_heatmaps() -> None:
    """Every pixel ties: any place within the box will do."""
    found = torch.tensor([[3.0, 4.0, 20.5, 9.0]])
    places, scores = ops.heatmaps_to_keypoints(torch.full((1, 2, 6, 6), 0.25), found, (30, 30), impl="reference")
    torch.testing.assert_close(scores, torch.full((1, 2), 0.25))
    assert ((places[..., :2] > found[0, :2]) & (places[..., :2] < found[0, 2:])).all()


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
def test_no_heatmaps(impl: ops.Impl) -> None:
    places, scores = ops.heatmaps_to_keypoints(torch.rand(0, 4, 7, 7), torch.rand(0, 4), (20, 30), impl=impl)
    assert places.shape == (0, 4, 3)
    assert scores.shape == (0, 4)


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
def test_peak_of_a_keypoint(impl: ops.Impl) -> None:
    heatmaps = torch.zeros(1, 1, 14, 14)
    heatmaps[0, 0, 3, 10] = 5.0
    box = torch.tensor([[10.0, 20.0, 38.0, 48.0]])
    places, _ = ops.heatmaps_to_keypoints(heatmaps, box, (64, 64), impl=impl)
    x, y, visible = places[0, 0].tolist()
    assert abs(x - (10 + 10.5 * 2)) <= 1
    assert abs(y - (20 + 3.5 * 2)) <= 1
    assert visible == 1
