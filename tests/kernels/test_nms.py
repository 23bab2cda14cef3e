"""Non-maximum suppression: every implementation against a greedy loop in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, Segments, boxes, examples, scores, segments
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels.reference.boxes import pairwise_iou
from fastmrcnn_kernels.triton import nms as triton_nms
from fastmrcnn_kernels.triton import nms_matrix

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, in the interpreter, of NaN boxes
]

IMPLEMENTATIONS: list[ops.Impl] = ["reference", "torchvision"]
KERNELS = ["matrix", "panels", "stream"]
PANELS = {"panels": 64, "large panels": 1024}
ALL = [*IMPLEMENTATIONS, *KERNELS]
THRESHOLDS = [0.0, 0.35, 0.5, 0.7, 1.0]
"""Of which none is rounded up in float32: see `test_threshold_is_rounded_as_the_boxes_are`."""


def greedy(found: Tensor, values: Tensor, threshold: float, groups: Tensor | None = None) -> list[int]:
    """The definition: by descending score (NaN first, ties by index), drop what overlaps a kept one of its group."""
    numbers = [math.inf if math.isnan(v) else v for v in values.tolist()]
    order = sorted(range(len(numbers)), key=lambda i: (not values[i].isnan(), -numbers[i], i))
    above = pairwise_iou(found, found) > threshold
    above = (above if groups is None else above & (groups[:, None] == groups)).tolist()
    kept: list[int] = []
    for i in order:
        if not any(above[j][i] for j in kept):
            kept.append(i)
    return kept


@contextmanager
def implementation(name: str) -> Iterator[tuple[ops.Impl, str]]:
    """Value of `impl`, and the device it runs on; each of the kernels is made the one of choice."""
    constants = triton_nms.STREAM_FROM, triton_nms.STREAM_AT_MOST, nms_matrix.PANEL
    kernel = name in (*KERNELS, *PANELS)
    if kernel:
        triton_nms.STREAM_FROM = 1 if name == "stream" else 1 << 30
        triton_nms.STREAM_AT_MOST = 1 << 30
        nms_matrix.PANEL = PANELS.get(name, 4096)
    try:
        yield ("triton", DEVICE) if kernel else (name, "cpu")
    finally:
        triton_nms.STREAM_FROM, triton_nms.STREAM_AT_MOST, nms_matrix.PANEL = constants


def run_padded(
    name: str, case: Segments, threshold: float, max_keep: int, groups: Tensor | None = None, *, presorted: bool = False
) -> tuple[Tensor, Tensor]:
    with implementation(name) as (impl, device):
        found, values, valid = (x.to(device) for x in case)
        groups = None if groups is None else groups.to(device)
        indices, count = ops.padded_nms(
            found, values, valid, threshold, max_keep, groups=groups, presorted=presorted, impl=impl
        )
    return indices.cpu(), count.cpu()


def run_nms(name: str, found: Tensor, values: Tensor, threshold: float) -> Tensor:
    with implementation(name) as (impl, device):
        return ops.nms(found.to(device), values.to(device), threshold, impl=impl).cpu()


def run_batched(name: str, found: Tensor, values: Tensor, groups: Tensor, threshold: float) -> Tensor:
    with implementation(name) as (impl, device):
        return ops.batched_nms(found.to(device), values.to(device), groups.to(device), threshold, impl=impl).cpu()


def check_padded(name: str, case: Segments, threshold: float, max_keep: int, groups: Tensor | None = None) -> None:
    indices, count = run_padded(name, case, threshold, max_keep, groups)
    assert indices.shape == (len(case.boxes), max_keep)
    for s in range(len(case.boxes)):
        used = case.valid[s].nonzero().flatten()
        its_groups = None if groups is None else groups[s, used]
        expected = used[greedy(case.boxes[s, used], case.scores[s, used], threshold, its_groups)].tolist()[:max_keep]
        assert count[s] == len(expected)
        assert indices[s].tolist() == expected + [-1] * (max_keep - len(expected))


def numbered(shape: tuple[int, ...], seed: int) -> Tensor:
    """Groups -2 .. 2, one of them beyond 32 bits."""
    groups = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(groups == 2, (1 << 32) - 2, groups)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(
    case=segments(),
    threshold=st.sampled_from(THRESHOLDS),
    max_keep=st.integers(0, 45),
    seed=st.none() | st.integers(0, 1000),
)
def test_padded_nms_is_greedy(name: str, case: Segments, threshold: float, max_keep: int, seed: int | None) -> None:
    """Whatever the padding holds; with groups and without."""
    check_padded(name, case, threshold, max_keep, None if seed is None else numbered(tuple(case.valid.shape), seed))


@pytest.mark.parametrize("name", KERNELS)
@examples(200, interpreted=12)
@given(
    case=segments(150),
    threshold=st.sampled_from(THRESHOLDS),
    max_keep=st.integers(0, 160),
    seed=st.none() | st.integers(0, 1000),
)
def test_kernels_are_greedy(name: str, case: Segments, threshold: float, max_keep: int, seed: int | None) -> None:
    check_padded(name, case, threshold, max_keep, None if seed is None else numbered(tuple(case.valid.shape), seed))


def crowd(segments: int, slots: int, extent: float = 20.0) -> Segments:
    """Segments of overlapping boxes 10 pixels wide, all valid."""
    generator = torch.Generator().manual_seed(slots)
    start = torch.rand(segments, slots, 2, generator=generator) * extent
    found = torch.cat((start, start + 10), dim=2)
    values = torch.rand(segments, slots, generator=generator)
    return Segments(found, values, torch.ones(segments, slots, dtype=torch.bool))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("slots", [1, 31, 32, 33, 63, 64, 65])
def test_sizes_around_words(name: str, slots: int) -> None:
    check_padded(name, crowd(2, slots), 0.5, slots)


@pytest.mark.parametrize("name", ["torchvision", "large panels", "stream"])
def test_one_box_beyond_whole_panels(name: str) -> None:
    """4,097 boxes in a crowd."""
    check_padded(name, crowd(1, 4097, extent=150.0), 0.3, 4097)


@pytest.mark.parametrize("name", ALL)
def test_chain(name: str) -> None:
    """Each box would suppress the next, so every other one stays; across blocks and panels."""
    x = torch.arange(140.0) * 4
    found = torch.stack((x, torch.zeros(140), x + 10, torch.full((140,), 10.0)), dim=1)
    assert run_nms(name, found, torch.linspace(1, 0.1, 140), 0.4).tolist() == list(range(0, 140, 2))


@pytest.mark.parametrize("name", ALL)
def test_identical_boxes_and_scores(name: str) -> None:
    found = torch.tensor([[1.0, 1, 5, 5]]).expand(70, 4)
    assert run_nms(name, found, torch.ones(70), 0.5).tolist() == [0]
    assert run_nms(name, found, torch.ones(70), 1.0).tolist() == list(range(70))


@pytest.mark.parametrize("name", ALL)
def test_overlap_at_the_threshold(name: str) -> None:
    """Above the threshold suppresses, at the threshold does not."""
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    scores = torch.tensor([0.9, 0.8])
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert run_nms(name, found, scores, 0.5).tolist() == [0, 1]
    assert run_nms(name, found, scores, below).tolist() == [0]
    assert run_nms(name, found, scores, above).tolist() == [0, 1]
    found[1, 3] = torch.nextafter(found[1, 3], torch.tensor(torch.inf))  # an IoU one unit above 0.5
    assert run_nms(name, found, scores, 0.5).tolist() == [0]
    found[1, 3] = torch.nextafter(torch.tensor(5.0), torch.tensor(0.0))
    assert run_nms(name, found, scores, 0.5).tolist() == [0, 1]


def test_threshold_is_rounded_as_the_boxes_are() -> None:
    """An IoU of 2/5 is not above 0.4: both are the same number in float32, in the reference as on a GPU.

    torchvision's CPU kernel compares with the unrounded threshold, so there 0.4 in float32 is above 0.4.
    """
    found, values = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4]]), torch.tensor([0.9, 0.8])
    assert ops.nms(found, values, 0.4, impl="reference").tolist() == [0, 1]
    assert ops.nms(found, values, 0.4, impl="torchvision").tolist() == [0]
    for name in KERNELS:
        assert run_nms(name, found, values, 0.4).tolist() == [0, 1]
    for impl in IMPLEMENTATIONS:
        assert ops.nms(found.double(), values.double(), 0.4, impl=impl).tolist() == [0, 1]


@pytest.mark.parametrize("name", ALL)
def test_segments_without_boxes(name: str) -> None:
    nothing = Segments(torch.full((3, 5, 4), torch.nan), torch.rand(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    indices, count = run_padded(name, nothing, 0.5, 4)
    assert (indices == -1).all()
    assert (count == 0).all()
    empty = Segments(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert run_padded(name, empty, 0.5, 0)[0].shape == (2, 0)
    indices, count = run_padded(name, empty, 0.5, 3)
    assert indices.tolist() == [[-1, -1, -1]] * 2
    assert count.tolist() == [0, 0]
    none = Segments(torch.zeros(0, 5, 4), torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool))
    assert run_padded(name, none, 0.5, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(case=segments())
def test_counts_are_a_mask(name: str, case: Segments) -> None:
    counts = case.valid.sum(dim=1)
    mask = torch.arange(case.valid.shape[1]) < counts[:, None]
    clean = torch.where(mask[..., None], case.boxes.nan_to_num(0, 0, 0), 0)
    by_count = run_padded(name, Segments(clean, case.scores, counts), 0.5, 9)
    by_mask = run_padded(name, Segments(clean, case.scores, mask), 0.5, 9)
    assert all(torch.equal(a, b) for a, b in zip(by_count, by_mask, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_presorted_boxes_keep_their_order(name: str) -> None:
    """What the scores say is not looked at, padding may lie between the boxes, and arguments are not written to."""
    case = crowd(2, 70)
    order = case.scores.sort(dim=1, descending=True).indices
    found = case.boxes.gather(1, order[..., None].expand_as(case.boxes))
    valid = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) < 0.8
    expected = run_padded("reference", Segments(found, case.scores.gather(1, order), valid), 0.3, 20)
    unread = Segments(torch.where(valid[..., None], found, torch.nan), torch.full((2, 70), torch.nan), valid)
    before = valid.clone()
    result = run_padded(name, unread, 0.3, 20, presorted=True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert torch.equal(valid, before)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_of_16_bits_are_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    """In float16 the area of 300 x 300 pixels is infinite."""
    case = crowd(1, 40)
    found, values = (case.boxes[0] * 30).to(dtype), case.scores[0].to(dtype)
    assert run_nms(name, found, values, 0.5).tolist() == greedy(found.float(), values.float(), 0.5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32])
def test_groups_are_told_apart_in_any_dtype(name: str, dtype: torch.dtype) -> None:
    """Those of floating point have the same whole part."""
    case = crowd(1, 150)
    groups = (torch.arange(150) % 2 / 2).to(dtype) if dtype.is_floating_point else (torch.arange(150) % 2).to(dtype)
    expected = greedy(case.boxes[0], case.scores[0], 0.3, groups)
    assert expected != greedy(case.boxes[0], case.scores[0], 0.3)
    assert run_batched(name, case.boxes[0], case.scores[0], groups, 0.3).tolist() == expected


def test_strided_inputs() -> None:
    """Boxes by coordinate, scores and groups as views."""
    case, groups = crowd(2, 40), numbered((40, 2), 3).mT
    by_coordinate = case.boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = Segments(by_coordinate, case.scores.mT.contiguous().mT, case.valid)
    for name in KERNELS:
        found = run_padded(name, strided, 0.4, 30, groups)
        expected = run_padded("reference", case, 0.4, 30, groups)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: programs that race")
@pytest.mark.parametrize("name", KERNELS)
def test_deterministic(name: str) -> None:
    case = crowd(8, 3000, extent=200.0)
    expected = run_padded(name, case, 0.4, 200)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run_padded(name, case, 0.4, 200), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(found=boxes(20, extent=30.0, not_finite=True), values=scores(20))
def test_nms_equals_torchvision(dtype: torch.dtype, found: Tensor, values: Tensor) -> None:
    found, values = found.to(dtype), values.to(dtype)
    expected = torchvision.ops.nms(found, values, 0.35)
    assert expected.tolist() == greedy(found, values, 0.35)
    for name in IMPLEMENTATIONS:
        assert torch.equal(run_nms(name, found, values, 0.35), expected)


@given(found=boxes(24, extent=30.0, not_finite=True), values=scores(24), seed=st.integers(0, 1000))
def test_batched_nms_is_nms_of_each_group(found: Tensor, values: Tensor, seed: int) -> None:
    groups = torch.randint(-2, 3, (24,), generator=torch.Generator().manual_seed(seed))
    kept = torch.tensor([i for g in groups.unique() for i in _members(found, values, groups == g)]).sort().values
    expected = kept[values[kept].sort(descending=True, stable=True).indices].tolist()
    for name in IMPLEMENTATIONS:
        assert run_batched(name, found, values, groups, 0.35).tolist() == expected


@given(seed=st.integers(0, 2**31))
def test_batched_nms_equals_torchvision(seed: int) -> None:
    """On whole pixels, which torchvision's offsets do not round."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (30, 2), generator=generator)
    found = torch.cat((start, start + torch.randint(1, 20, (30, 2), generator=generator)), dim=1).float()
    values, groups = torch.rand(30, generator=generator), torch.randint(0, 4, (30,), generator=generator)
    expected = torchvision.ops.batched_nms(found, values, groups, 0.35)
    for name in IMPLEMENTATIONS:
        assert torch.equal(run_batched(name, found, values, groups, 0.35), expected)


@pytest.mark.parametrize("name", ALL)
def test_at_most_so_many(name: str) -> None:
    """None, one, and as many as there are: always those of highest score."""
    found = torch.arange(6.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    values = torch.tensor([[0.1, 0.9, 0.9, 0.3, 0.8, 0.2]])
    for most in (0, 1, 3, 6):
        indices, count = run_padded(name, Segments(found[None], values, torch.tensor([6])), 0.5, most)
        assert indices.dtype == count.dtype == torch.int64
        assert indices.tolist() == [[1, 2, 4, 3, 5, 0][:most]]
        assert count.tolist() == [most]


@pytest.mark.parametrize("name", ALL)
@examples(200, interpreted=12)
@given(case=segments())
def test_padding_changes_nothing(name: str, case: Segments) -> None:
    """Nor do boxes in the padding that would win: they overlap everything, with the highest of scores."""
    wins = torch.tensor([0.0, 0, 24, 24]).expand_as(case.boxes)
    tempting = Segments(
        torch.where(case.valid[..., None], case.boxes, wins),
        case.scores.masked_fill(~case.valid, torch.inf),
        case.valid,
    )
    expected = run_padded(name, case, 0.1, 9)
    assert all(torch.equal(a, b) for a, b in zip(run_padded(name, tempting, 0.1, 9), expected, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_no_boxes(name: str) -> None:
    none = torch.zeros(0, 4)
    assert run_nms(name, none, none[:, 0], 0.5).tolist() == []
    assert run_batched(name, none, none[:, 0], none[:, 0].long(), 0.5).tolist() == []


def _members(found: Tensor, scores: Tensor, mask: Tensor) -> list[int]:
    index = mask.nonzero().flatten()
    return index[greedy(found[index], scores[index], 0.35)].tolist()


def test_far_away_boxes_keep_their_overlap() -> None:
    """At coordinates of a million, torchvision's offset of each group rounds the boxes; comparing numbers does not."""
    a = torch.tensor([[1e6, 1e6, 1e6 + 2.0, 1e6 + 2.0], [1e6 + 0.6, 1e6, 1e6 + 2.6, 1e6 + 2.0]])
    found, scores = a.repeat(40, 1), torch.linspace(1, 0.5, 80)
    groups = torch.arange(40).repeat_interleave(2)
    expected = [i for g in range(40) for i in _members(found, scores, groups == g)]
    for name in ALL:
        assert run_batched(name, found, scores, groups, 0.35).tolist() == sorted(expected)
    assert torchvision.ops.batched_nms(found, scores, groups, 0.35).tolist() != sorted(expected)
