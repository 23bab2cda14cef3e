"""Box coding, clipping and overlaps of the reference against torchvision."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes, ordered
from tolerances import assert_same_decisions
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from fastmrcnn_kernels.reference.boxes import clip_boxes, decode_deltas, encode_deltas, large_enough, pairwise_iou

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@given(a=boxes(9), b=boxes(9), seed=st.integers(0, 1000))
def test_coding_equals_torchvision(weights: tuple[float, ...], a: Tensor, b: Tensor, seed: int) -> None:
    a, b = ordered(a, 1.0), ordered(b, 1.0)
    coder = BoxCoder(weights)
    assert torch.equal(encode_deltas(a, b, weights), coder.encode_single(a, b))
    deltas = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)) * 8
    assert torch.equal(decode_deltas(deltas, b, weights), coder.decode_single(deltas, b))


@given(a=boxes(9, not_finite=True), b=boxes(9, not_finite=True))
def test_coding_of_odd_boxes_equals_torchvision(a: Tensor, b: Tensor) -> None:
    """NaN for NaN and infinity for infinity: without area, inverted, not finite."""
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = encode_deltas(a, b, coder.weights)
    torch.testing.assert_close(deltas, coder.encode_single(a, b), rtol=0, atol=0, equal_nan=True)
    decoded = decode_deltas(deltas, b, coder.weights)
    torch.testing.assert_close(decoded, coder.decode_single(deltas, b), rtol=0, atol=0, equal_nan=True)


@given(a=boxes(9, extent=200.0), b=boxes(9, extent=200.0))
def test_decoding_inverts_encoding(a: Tensor, b: Tensor) -> None:
    a, b = ordered(a.double().clamp(-500, 500), 1.0), ordered(b.double().clamp(-500, 500), 1.0)
    near = (encode_deltas(a, b)[:, 2:] < 4).all(dim=1)  # larger growth is cut
    torch.testing.assert_close(decode_deltas(encode_deltas(a, b), b)[near], a[near], rtol=1e-9, atol=1e-9)


@given(found=boxes(extent=90.0, not_finite=True))
def test_clipping_and_size_equal_torchvision(found: Tensor) -> None:
    sizes = torch.tensor([[40, 70], [64, 33]])
    clipped = clip_boxes(found.expand(2, *found.shape), sizes)
    for result, (height, width) in zip(clipped, sizes.tolist(), strict=True):
        expected = torchvision.ops.clip_boxes_to_image(found, (height, width))
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        assert large_enough(result, 1e-3).nonzero().flatten().tolist() == (
            torchvision.ops.remove_small_boxes(expected, 1e-3).tolist()
        )


def test_a_side_of_exactly_the_least_size_is_enough() -> None:
    found = torch.tensor([[1.0, 1, 7, 9], [1, 1, 9, 7], [1, 1, 6.5, 9], [1, 1, 9, 6.5]])
    assert large_enough(found, 6.0).tolist() == [True, True, False, False]
    assert torchvision.ops.remove_small_boxes(found, 6.0).tolist() == [0, 1]


@given(a=boxes(extent=90.0), b=boxes(extent=90.0))
def test_iou_equals_torchvision(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(pairwise_iou(a, b), torchvision.ops.box_iou(a, b), rtol=0, atol=0, equal_nan=True)


@given(a=boxes(9, extent=90.0), b=boxes(9, extent=90.0), threshold=st.sampled_from([0.3, 0.5, 0.7]))
def test_overlap_decisions_in_float32(a: Tensor, b: Tensor, threshold: float) -> None:
    """The same as in float64, but where the IoU is within eight roundings (sides, areas, union) of the threshold."""
    a, b = ordered(a, 1.0), ordered(b, 1.0)
    exact = pairwise_iou(a.double(), b.double())
    found = pairwise_iou(a, b)
    band = 8 * torch.finfo(torch.float32).eps
    assert_same_decisions(found > threshold, exact > threshold, (exact - threshold).abs(), band)
