"""Non-maximum suppression: reference and torchvision's kernel against a greedy loop in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import Segments, boxes, scores, segments
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels.reference.boxes import pairwise_iou

IMPLEMENTATIONS: list[ops.Impl] = ["reference", "torchvision"]
THRESHOLDS = [0.0, 0.35, 0.5, 0.7, 1.0]
"""Of which none is rounded up in float32: see `test_threshold_is_rounded_as_the_boxes_are`."""


def greedy(found: Tensor, values: Tensor, threshold: float) -> list[int]:
    """The definition: by descending score (NaN first, ties by index), drop what overlaps something kept."""
    numbers = [math.inf if math.isnan(v) else v for v in values.tolist()]
    order = sorted(range(len(numbers)), key=lambda i: (not values[i].isnan(), -numbers[i], i))
    above = (pairwise_iou(found, found) > threshold).tolist()
    kept: list[int] = []
    for i in order:
        if not any(above[j][i] for j in kept):
            kept.append(i)
    return kept


def check_padded(case: Segments, threshold: float, max_keep: int, impl: ops.Impl) -> None:
    indices, count = ops.padded_nms(*case, threshold, max_keep, impl=impl)
    assert indices.shape == (len(case.boxes), max_keep)
    for s in range(len(case.boxes)):
        used = case.valid[s].nonzero().flatten()
        expected = used[greedy(case.boxes[s, used], case.scores[s, used], threshold)].tolist()[:max_keep]
        assert count[s] == len(expected)
        assert indices[s].tolist() == expected + [-1] * (max_keep - len(expected))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(case=segments(), threshold=st.sampled_from(THRESHOLDS), max_keep=st.integers(0, 45))
def test_padded_nms_is_greedy(impl: ops.Impl, case: Segments, threshold: float, max_keep: int) -> None:
    """Whatever the padding holds."""
    check_padded(case, threshold, max_keep, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [1, 31, 32, 33, 63, 64, 65])
def test_sizes_around_words(impl: ops.Impl, slots: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    start = torch.rand(2, slots, 2, generator=generator) * 20
    found = torch.cat((start, start + 10), dim=2)
    check_padded(
        Segments(found, torch.rand(2, slots, generator=generator), torch.ones(2, slots, dtype=torch.bool)),
        0.5,
        slots,
        impl,
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_chain(impl: ops.Impl) -> None:
    """Each box would suppress the next, so every other one stays."""
    x = torch.arange(40.0) * 4
    found = torch.stack((x, torch.zeros(40), x + 10, torch.full((40,), 10.0)), dim=1)
    scores = torch.linspace(1, 0.1, 40)
    assert ops.nms(found, scores, 0.4, impl=impl).tolist() == list(range(0, 40, 2))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_identical_boxes_and_scores(impl: ops.Impl) -> None:
    found = torch.tensor([[1.0, 1, 5, 5]]).expand(33, 4)
    assert ops.nms(found, torch.ones(33), 0.5, impl=impl).tolist() == [0]
    assert ops.nms(found, torch.ones(33), 1.0, impl=impl).tolist() == list(range(33))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_overlap_at_the_threshold(impl: ops.Impl) -> None:
    """Above the threshold suppresses, at the threshold does not."""
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    scores = torch.tensor([0.9, 0.8])
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert ops.nms(found, scores, 0.5, impl=impl).tolist() == [0, 1]
    assert ops.nms(found, scores, below, impl=impl).tolist() == [0]
    assert ops.nms(found, scores, above, impl=impl).tolist() == [0, 1]
    found[1, 3] = torch.nextafter(found[1, 3], torch.tensor(torch.inf))  # an IoU one unit above 0.5
    assert ops.nms(found, scores, 0.5, impl=impl).tolist() == [0]
    found[1, 3] = torch.nextafter(torch.tensor(5.0), torch.tensor(0.0))
    assert ops.nms(found, scores, 0.5, impl=impl).tolist() == [0, 1]


def test_threshold_is_rounded_as_the_boxes_are() -> None:
    """An IoU of 2/5 is not above 0.4: both are the same number in float32, in the reference as on a GPU.

    torchvision's CPU kernel compares with the unrounded threshold, so there 0.4 in float32 is above 0.4.
    """
    found, values = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4]]), torch.tensor([0.9, 0.8])
    assert ops.nms(found, values, 0.4, impl="reference").tolist() == [0, 1]
    assert ops.nms(found, values, 0.4, impl="torchvision").tolist() == [0]
    for impl in IMPLEMENTATIONS:
        assert ops.nms(found.double(), values.double(), 0.4, impl=impl).tolist() == [0, 1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_segments_without_boxes(impl: ops.Impl) -> None:
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    indices, count = ops.padded_nms(torch.full((3, 5, 4), torch.nan), torch.rand(3, 5), nothing, 0.5, 4, impl=impl)
    assert (indices == -1).all()
    assert (count == 0).all()
    empty = torch.zeros(2, 0, dtype=torch.bool)
    indices, count = ops.padded_nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), empty, 0.5, 0, impl=impl)
    assert indices.shape == (2, 0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(case=segments())
def test_counts_are_a_mask(impl: ops.Impl, case: Segments) -> None:
    counts = case.valid.sum(dim=1)
    mask = torch.arange(case.valid.shape[1]) < counts[:, None]
    clean = torch.where(mask[..., None], case.boxes.nan_to_num(0, 0, 0), 0)
    by_count = ops.padded_nms(clean, case.scores, counts, 0.5, 9, impl=impl)
    by_mask = ops.padded_nms(clean, case.scores, mask, 0.5, 9, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(by_count, by_mask, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(found=boxes(20, extent=30.0, not_finite=True), values=scores(20))
def test_nms_equals_torchvision(dtype: torch.dtype, found: Tensor, values: Tensor) -> None:
    found, values = found.to(dtype), values.to(dtype)
    expected = torchvision.ops.nms(found, values, 0.35)
    assert expected.tolist() == greedy(found, values, 0.35)
    for impl in IMPLEMENTATIONS:
        assert torch.equal(ops.nms(found, values, 0.35, impl=impl), expected)


@given(found=boxes(24, extent=30.0, not_finite=True), values=scores(24), seed=st.integers(0, 1000))
def test_batched_nms_is_nms_of_each_group(found: Tensor, values: Tensor, seed: int) -> None:
    groups = torch.randint(-2, 3, (24,), generator=torch.Generator().manual_seed(seed))
    kept = torch.tensor([i for g in groups.unique() for i in _members(found, values, groups == g)]).sort().values
    expected = kept[values[kept].sort(descending=True, stable=True).indices].tolist()
    for impl in IMPLEMENTATIONS:
        assert ops.batched_nms(found, values, groups, 0.35, impl=impl).tolist() == expected


@given(seed=st.integers(0, 2**31))
def test_batched_nms_equals_torchvision(seed: int) -> None:
    """On whole pixels, which torchvision's offsets do not round."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (30, 2), generator=generator)
    found = torch.cat((start, start + torch.randint(1, 20, (30, 2), generator=generator)), dim=1).float()
    values, groups = torch.rand(30, generator=generator), torch.randint(0, 4, (30,), generator=generator)
    expected = torchvision.ops.batched_nms(found, values, groups, 0.35)
    for impl in IMPLEMENTATIONS:
        assert torch.equal(ops.batched_nms(found, values, groups, 0.35, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_at_most_so_many(impl: ops.Impl) -> None:
    """None, one, and as many as there are: always those of highest score."""
    found = torch.arange(6.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    values = torch.tensor([[0.1, 0.9, 0.9, 0.3, 0.8, 0.2]])
    for most in (0, 1, 3, 6):
        indices, count = ops.padded_nms(found[None], values, torch.tensor([6]), 0.5, most, impl=impl)
        assert indices.dtype == count.dtype == torch.int64
        assert indices.tolist() == [[1, 2, 4, 3, 5, 0][:most]]
        assert count.tolist() == [most]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(case=segments())
def test_padding_changes_nothing(impl: ops.Impl, case: Segments) -> None:
    """Nor do boxes in the padding that would win: they overlap everything, with the highest of scores."""
    wins = torch.tensor([0.0, 0, 24, 24]).expand_as(case.boxes)
    tempting = Segments(
        torch.where(case.valid[..., None], case.boxes, wins),
        case.scores.masked_fill(~case.valid, torch.inf),
        case.valid,
    )
    expected = ops.padded_nms(*case, 0.1, 9, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(ops.padded_nms(*tempting, 0.1, 9, impl=impl), expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_boxes(impl: ops.Impl) -> None:
    none = torch.zeros(0, 4)
    assert ops.nms(none, none[:, 0], 0.5, impl=impl).tolist() == []
    assert ops.batched_nms(none, none[:, 0], none[:, 0].long(), 0.5, impl=impl).tolist() == []


def _members(found: Tensor, scores: Tensor, mask: Tensor) -> list[int]:
    index = mask.nonzero().flatten()
    return index[greedy(found[index], scores[index], 0.35)].tolist()


def test_far_away_boxes_keep_their_overlap() -> None:
    """At coordinates of a million, torchvision's offset of each group rounds the boxes; comparing numbers does not."""
    a = torch.tensor([[1e6, 1e6, 1e6 + 2.0, 1e6 + 2.0], [1e6 + 0.6, 1e6, 1e6 + 2.6, 1e6 + 2.0]])
    found, scores = a.repeat(40, 1), torch.linspace(1, 0.5, 80)
    groups = torch.arange(40).repeat_interleave(2)
    expected = [i for g in range(40) for i in _members(found, scores, groups == g)]
    for impl in IMPLEMENTATIONS:
        assert ops.batched_nms(found, scores, groups, 0.35, impl=impl).tolist() == sorted(expected)
    assert torchvision.ops.batched_nms(found, scores, groups, 0.35).tolist() != sorted(expected)
