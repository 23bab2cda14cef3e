"""Box coding, clipping and proposals against torchvision."""

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
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fastmrcnn import ops
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        (((32,), (64,)), ((0.5, 1.0, 2.0),) * 2),
        (((16, 24, 40), (50, 60, 70)), ((0.3, 1.0), (0.7, 1.9))),
        (((8,), (200,)), ((1.0,),) * 2),
    ],
)
def test_decoding_the_selected_equals_selecting_the_decoded(
    sizes: tuple[tuple[int, ...], ...], ratios: tuple[tuple[float, ...], ...], memory_format: torch.memory_format
) -> None:
    """All anchors generated, decoded and clipped by torchvision, against ours from indices."""
    torch.manual_seed(0)
    generator = AnchorGenerator(sizes, ratios)
    images = ImageList(torch.zeros(3, 3, 96, 128), [(96, 128), (80, 101), (33, 128)])
    maps = [torch.zeros(3, 1, 12, 8), torch.zeros(3, 1, 6, 8)]
    counts = generator.num_anchors_per_location()
    deltas = [
        (torch.randn(3, 4 * a, *m.shape[-2:]) * 0.5).to(memory_format=memory_format)
        for a, m in zip(counts, maps, strict=True)
    ]
    anchors = generator(images, maps)[0].split([a * m[0].numel() for a, m in zip(counts, maps, strict=True)])
    indices = torch.stack([torch.stack([torch.randperm(len(x))[:9] for x in anchors]) for _ in range(3)])
    size = torch.tensor(images.image_sizes)
    strides = [(8, 16), (16, 16)]
    found, usable = ops.decode_proposals(deltas, indices, generator.cell_anchors, strides, size, min_size=6.0)

    for i, image_size in enumerate(images.image_sizes):
        expected = []
        for level, a, index, all_anchors in zip(deltas, counts, indices[i], anchors, strict=True):
            flat = level[i].view(a, 4, *level.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            expected.append(BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(flat, all_anchors)[index])
        clipped = torchvision.ops.clip_boxes_to_image(torch.cat(expected), image_size)
        assert torch.equal(found[i].flatten(0, 1), clipped)
        kept = torchvision.ops.remove_small_boxes(clipped, 6.0)
        assert usable[i].flatten().nonzero().flatten().tolist() == kept.tolist()
        assert 0 < len(kept) < len(clipped)


@given(a=boxes(9, extent=90.0), b=boxes(9, extent=90.0), threshold=st.sampled_from([0.3, 0.5, 0.7]))
def test_overlap_decisions_in_float32(a: Tensor, b: Tensor, threshold: float) -> None:
    """The same as in float64, but where the IoU is within eight roundings (sides, areas, union) of the threshold."""
    a, b = ordered(a, 1.0), ordered(b, 1.0)
    exact = pairwise_iou(a.double(), b.double())
    found = pairwise_iou(a, b)
    band = 8 * torch.finfo(torch.float32).eps
    assert_same_decisions(found > threshold, exact > threshold, (exact - threshold).abs(), band)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_proposals_are_float32_at_least(dtype: torch.dtype) -> None:
    """Deltas of 16 bits are decoded in float32, as if they had been given so."""
    deltas = torch.randn(1, 8, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    base = torch.tensor([[-8.0, -8, 8, 8], [-16, -4, 16, 4]])
    indices, size = torch.arange(24)[None, None], torch.tensor([[40, 50]])
    found, _ = ops.decode_proposals([deltas], indices, [base], [(16, 16)], size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected, _ = ops.decode_proposals([deltas.to(wide)], indices, [base], [(16, 16)], size)
    assert found.dtype == wide
    assert torch.equal(found, expected)


def test_proposals_of_hostile_deltas() -> None:
    """NaN is unusable; infinite growth is limited to 62.5-fold, then clipped to the image."""
    deltas = torch.zeros(1, 4, 1, 3)
    deltas[0, 0, 0, 1] = torch.nan
    deltas[0, 2:, 0, 2] = torch.inf
    indices = torch.tensor([[[2, 1, 0, -1]]])
    found, usable = ops.decode_proposals(
        [deltas], indices, [torch.tensor([[-4.0, -4, 4, 4]])], [(8, 8)], torch.tensor([[30, 40]])
    )
    assert usable.tolist() == [[[True, False, True, False]]]
    assert found[0, 0, 0].tolist() == [0, 0, 40, 30]
    assert found[0, 0, 2].tolist() == [0, 0, 4, 4]
    assert found[0, 0, 3].tolist() == [0, 0, 0, 0]


def test_proposals_of_low_scores_are_not_usable() -> None:
    """Nor are those whose score is NaN; one that is just high enough is."""
    arguments = ([torch.zeros(1, 4, 1, 4)], torch.arange(4)[None, None], [torch.tensor([[-4.0, -4, 4, 4]])], [(8, 8)])
    scores = torch.tensor([[[0.5, 0.25, torch.nan, 0.2]]])
    _, usable = ops.decode_proposals(*arguments, torch.tensor([[30, 40]]), scores=scores, min_score=0.25)
    assert usable.tolist() == [[[True, True, False, False]]]


def test_no_proposals() -> None:
    none = torch.zeros(2, 1, 0, dtype=torch.int64)
    size = torch.tensor([[30, 40], [30, 40]])
    found, usable = ops.decode_proposals([torch.rand(2, 4, 3, 3)], none, [torch.rand(1, 4)], [(8, 8)], size)
    assert found.shape == (2, 1, 0, 4)
    assert usable.shape == (2, 1, 0)
