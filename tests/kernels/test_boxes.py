"""Box coding, clipping, proposals and top-k against torchvision and a stable sort."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fastmrcnn import ops
from fastmrcnn_kernels.reference.boxes import clip_boxes, decode_deltas, encode_deltas, large_enough, pairwise_iou
from fastmrcnn_kernels.reference.topk import stable_topk

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


def proper(found: Tensor) -> Tensor:
    """`found` with sides of at least one pixel."""
    return torch.cat((found[:, :2], torch.maximum(found[:, :2] + 1, found[:, 2:])), dim=1)


@pytest.mark.parametrize("weights", WEIGHTS)
@given(a=boxes(9), b=boxes(9), seed=st.integers(0, 1000))
def test_coding_equals_torchvision(weights: tuple[float, ...], a: Tensor, b: Tensor, seed: int) -> None:
    a, b = proper(a), proper(b)
    coder = BoxCoder(weights)
    assert torch.equal(encode_deltas(a, b, weights), coder.encode_single(a, b))
    deltas = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)) * 8
    assert torch.equal(decode_deltas(deltas, b, weights), coder.decode_single(deltas, b))


@given(a=boxes(9, extent=200.0), b=boxes(9, extent=200.0))
def test_decoding_inverts_encoding(a: Tensor, b: Tensor) -> None:
    a, b = proper(a).double().clamp(-500, 500), proper(b).double().clamp(-500, 500)
    a, b = proper(a), proper(b)
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
    maps = [torch.zeros(3, 1, 12, 16), torch.zeros(3, 1, 6, 8)]
    counts = generator.num_anchors_per_location()
    deltas = [
        (torch.randn(3, 4 * a, *m.shape[-2:]) * 0.5).to(memory_format=memory_format)
        for a, m in zip(counts, maps, strict=True)
    ]
    anchors = generator(images, maps)[0].split([a * m[0].numel() for a, m in zip(counts, maps, strict=True)])
    indices = [torch.stack([torch.randperm(len(level))[:9] for _ in range(3)]) for level in anchors]
    size = torch.tensor(images.image_sizes)
    strides = [(8, 8), (16, 16)]
    found, usable = ops.decode_proposals(deltas, indices, generator.cell_anchors, strides, size, min_size=6.0)

    for i, image_size in enumerate(images.image_sizes):
        expected = []
        for level, a, index, all_anchors in zip(deltas, counts, indices, anchors, strict=True):
            flat = level[i].view(a, 4, *level.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            expected.append(BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(flat, all_anchors)[index[i]])
        clipped = torchvision.ops.clip_boxes_to_image(torch.cat(expected), image_size)
        assert torch.equal(found[i], clipped)
        kept = torchvision.ops.remove_small_boxes(clipped, 6.0)
        assert usable[i].nonzero().flatten().tolist() == kept.tolist()
        assert 0 < len(kept) < len(clipped)


@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=True),
            st.sampled_from([0.0, -0.0, 1.0, 1.0, torch.inf, -torch.inf, torch.nan]),
        ),
        min_size=1,
        max_size=60,
    ),
    k=st.integers(0, 60),
)
def test_topk_is_a_stable_sort(values: list[float], k: int) -> None:
    scores = torch.tensor([values, values[::-1]])
    k = min(k, len(values))
    found, indices = stable_topk(scores, k)
    expected = torch.where(scores.isnan(), -torch.inf, scores).sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(indices, expected)
    torch.testing.assert_close(found, scores.gather(1, expected), rtol=0, atol=0, equal_nan=True)


def test_topk_of_many_ties() -> None:
    scores = torch.randint(0, 3, (2, 100_000), generator=torch.Generator().manual_seed(0)).float()
    _, indices = stable_topk(scores, 50_000)
    assert torch.equal(indices, scores.sort(dim=1, descending=True, stable=True).indices[:, :50_000])
