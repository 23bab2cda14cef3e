"""Soft non-maximum suppression: the reference against a loop in plain Python, the kernel against the reference."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DEVICE, Segments, examples, segments
from tolerances import assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn_kernels.library import soft_nms as library
from fastmrcnn_kernels.reference import nms as reference_nms
from fastmrcnn_kernels.reference import soft_nms as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of NaN boxes

RUNS = {"reference": reference.padded_soft_nms, "kernel": library.padded_soft_nms}
BAND = 3e-5
"""More than 40 decays, of a few roundings each, amount to; relative to the score."""

Result = tuple[Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """What is asked of soft-NMS."""

    method: str = "linear"
    iou_threshold: float = 0.3
    sigma: float = 0.5
    min_score: float = 0.0
    max_keep: int = 45


METHODS = st.sampled_from(["linear", "gaussian"])
OPTIONS = st.builds(
    Options,
    METHODS,
    iou_threshold=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]),
    sigma=st.sampled_from([0.25, 0.5, 4.0]),
    min_score=st.sampled_from([-math.inf, -0.5, 0.0, 0.0625, 0.25]),
    max_keep=st.sampled_from([0, 1, 5, 40, 45]),
)


@st.composite
def groups(draw: st.DrawFn, case: Segments) -> Tensor | None:
    """None, or a few groups of boxes, negative numbers and ones beyond 32 bits among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    numbers = torch.tensor([-3, 0, 2**40])[torch.randint(3, case.valid.shape, generator=generator)]
    return draw(st.sampled_from([None, numbers]))


def run(name: str, case: Segments, numbers: Tensor | None, options: Options) -> Result:
    """The implementation `name` on the device of these tests."""
    on_device = [None if x is None else x.to(DEVICE) for x in (*case, numbers)]
    return RUNS[name](*on_device, *options)


def overlaps(found: Tensor) -> list[list[float]]:
    """IoU of all pairs, in double precision."""
    x1, y1, x2, y2 = found.double().numpy().T
    with np.errstate(all="ignore"):
        width = np.minimum.outer(x2, x2) - np.maximum.outer(x1, x1)
        height = np.minimum.outer(y2, y2) - np.maximum.outer(y1, y1)
        overlap = np.maximum(width, 0) * np.maximum(height, 0)
        area = (x2 - x1) * (y2 - y1)
        return (overlap / (np.add.outer(area, area) - overlap)).tolist()


class Decisions(NamedTuple):
    """Boxes in the order taken, their scores, and how near, relative to a score, another decision was."""

    indices: list[int]
    scores: list[float]
    margin: float


def gap(score: float, rival: float) -> float:
    """Between a score and what it was compared with; zeros and infinities are no matter of rounding."""
    return math.inf if score == 0 or math.isinf(score) else abs(score - rival) / abs(score)


def by_definition(found: Tensor, values: Tensor, numbers: Tensor | None, options: Options) -> Decisions:
    """Soft-NMS of one segment without padding, in double precision.

    Scores that decayed by the same factors are equal in any precision, so their tie counts as no near decision.
    """
    iou = overlaps(found)
    current = values.double().tolist()
    history = [[x] for x in current]
    left = [i for i in range(len(current)) if not math.isnan(current[i])]
    indices: list[int] = []
    scores: list[float] = []
    margin = math.inf
    while left and len(indices) < options.max_keep:
        best = min(left, key=lambda i: (-current[i], i))
        rivals = [current[i] for i in left if history[i] != history[best]]
        if len(history[best]) > 1:
            rivals.append(options.min_score)
        margin = min([margin, *(gap(current[best], x) for x in rivals)])
        if current[best] < options.min_score:
            break
        indices.append(best)
        scores.append(current[best])
        left.remove(best)
        for i in left:
            factor = 1.0
            if numbers is not None and numbers[i] != numbers[best]:
                continue
            if options.method == "linear" and iou[best][i] > options.iou_threshold:
                factor = 1 - iou[best][i]
            if options.method == "gaussian" and not math.isnan(iou[best][i]):
                factor = math.exp(-(iou[best][i] ** 2) / options.sigma)
            if factor != 1:
                current[i] *= factor
                history[i].append(factor)
                if factor < 1e-30 or 0 < abs(current[i]) < 1e-30:  # may be zero in single precision
                    margin = min(margin, 0.0)
        left = [i for i in left if not math.isnan(current[i])]
    return Decisions(indices, scores, margin)


def decisions(case: Segments, numbers: Tensor | None, options: Options, band: float) -> Result:
    """The definition on padded segments; `assume`s that no other decision was within `band`."""
    indices = torch.full((len(case.boxes), options.max_keep), -1)
    taken = torch.zeros(indices.shape, dtype=torch.float64)
    for s in range(len(case.boxes)):
        used = case.valid[s].nonzero().flatten()
        its_numbers = None if numbers is None else numbers[s, used]
        found = by_definition(case.boxes[s, used], case.scores[s, used], its_numbers, options)
        assume(found.margin > band)
        indices[s, : len(found.indices)] = used[found.indices]
        taken[s, : len(found.scores)] = torch.tensor(found.scores, dtype=torch.float64)
    return indices, taken, (indices >= 0).sum(dim=1)


def assert_equal(found: Result, expected: Result) -> None:
    """The same boxes in the same order, and the same scores to the last bit."""
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@settings(max_examples=200)
@given(data=st.data(), case=segments(), options=OPTIONS)
def test_reference_is_the_definition(data: st.DataObject, case: Segments, options: Options) -> None:
    """Whatever the padding holds.  Linear decay leaves nothing to rounding."""
    numbers = data.draw(groups(case))
    wide = Segments(case.boxes.double(), case.scores.double(), case.valid)
    found = reference.padded_soft_nms(*wide, numbers, *options)
    if options.method == "linear":
        assert_equal(found, decisions(wide, numbers, options, -1.0))
    else:
        indices, taken, count = decisions(wide, numbers, options, 1e-12)
        assert torch.equal(found[0], indices)
        assert torch.equal(found[2], count)
        torch.testing.assert_close(found[1], taken, rtol=1e-12, atol=0)


@examples(200, interpreted=25)
@given(data=st.data(), case=segments(), options=OPTIONS)
def test_linear_kernel_equals_reference(data: st.DataObject, case: Segments, options: Options) -> None:
    numbers = data.draw(groups(case))
    options = options._replace(method="linear")
    assert_equal(run("kernel", case, numbers, options), run("reference", case, numbers, options))


@examples(200, interpreted=25)
@given(data=st.data(), case=segments(), options=OPTIONS)
def test_gaussian_kernel_within_budget(data: st.DataObject, case: Segments, options: Options) -> None:
    """Of single precision: the same boxes, and scores as near to the definition as the reference's."""
    numbers = data.draw(groups(case))
    options = options._replace(method="gaussian")
    indices, exact, count = decisions(case, numbers, options, BAND)
    found, expected = (run(name, case, numbers, options) for name in ("kernel", "reference"))
    for result in (found, expected):
        assert torch.equal(result[0].cpu(), indices)
        assert torch.equal(result[2].cpu(), count)
    infinite = exact.isinf()
    assert torch.equal(found[1].cpu()[infinite], exact[infinite].float())
    assert_within_budget(found[1].cpu()[~infinite], expected[1].cpu()[~infinite], exact[~infinite])


def one(found: Tensor | list[list[float]], values: list[float]) -> Segments:
    """One segment without padding."""
    return Segments(torch.as_tensor(found)[None], torch.tensor([values]), torch.ones(1, len(values), dtype=torch.bool))


def apart(count: int) -> Tensor:
    """Boxes [count, 4] that do not overlap."""
    return torch.arange(float(count))[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])


def crowded(count: int, slots: int) -> Segments:
    """Segments without padding, all boxes of which overlap many others."""
    generator = torch.Generator().manual_seed(slots)
    start = torch.rand(count, slots, 2, generator=generator) * 20
    values = torch.rand(count, slots, generator=generator)
    return Segments(torch.cat((start, start + 10), dim=2), values, torch.ones(count, slots, dtype=torch.bool))


HALVES = [[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 5, 5], [50, 50, 60, 60]]
"""IoU 1/2 and 1/4 of the first with the next two, 1/2 of those with each other, and a box far away."""


@pytest.mark.parametrize("name", RUNS)
def test_linear_by_hand(name: str) -> None:
    """0.8 decays to a half, 0.75 to three quarters; when that is taken, 0.4 decays to a half."""
    case = one(HALVES, [0.875, 0.8, 0.75, 0.3])
    indices, taken, count = run(name, case, None, Options(iou_threshold=0.2, max_keep=6))
    assert indices.tolist() == [[0, 2, 3, 1, -1, -1]]
    assert taken.tolist() == [pytest.approx([0.875, 0.5625, 0.3, 0.2, 0, 0])]
    assert count.tolist() == [4]
    assert [x.dtype for x in (indices, taken, count)] == [torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize("name", RUNS)
def test_gaussian_by_hand(name: str) -> None:
    """The threshold is none of its business."""
    options = Options("gaussian", iou_threshold=0.7, max_keep=4)
    indices, taken, _ = run(name, one(HALVES, [0.9, 0.8, 0.7, 0.3]), None, options)
    assert indices.tolist() == [[0, 2, 3, 1]]
    assert taken.tolist() == [pytest.approx([0.9, 0.7 * math.exp(-0.125), 0.3, 0.8 * math.exp(-0.5) ** 2])]


@pytest.mark.parametrize("name", RUNS)
def test_overlap_at_the_threshold(name: str) -> None:
    """Above the threshold decays, at the threshold does not."""
    case = one(HALVES[:2], [0.9, 0.8])
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    assert run(name, case, None, Options(iou_threshold=0.5))[1][0, 1] == case.scores[0, 1]
    assert run(name, case, None, Options(iou_threshold=below))[1][0, 1] == case.scores[0, 1] / 2


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_groups_leave_each_other_alone(name: str, method: str) -> None:
    """Numbers that differ only beyond 32 bits are different groups."""
    numbers = torch.tensor([[7, 7 + 2**32, 7, 7]])
    case = one(HALVES, [0.875, 0.8, 0.75, 0.3])
    indices, taken, _ = run(name, case, numbers, Options(method, 0.2, max_keep=4))
    factor = 0.75 if method == "linear" else math.exp(-0.125)
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert taken.tolist() == [pytest.approx([0.875, 0.8, 0.75 * factor, 0.3])]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("slots", [1, 31, 33, 65])
def test_limits(name: str, slots: int) -> None:
    """Without decay, boxes come sorted; with a decay to nothing, those are left that greedy suppression keeps."""
    case = crowded(2, slots)
    order = case.scores.sort(dim=1, descending=True, stable=True)
    for options in (Options("gaussian", sigma=1e30, max_keep=slots), Options(iou_threshold=1.0, max_keep=slots)):
        indices, taken, count = run(name, case, None, options)
        assert torch.equal(indices.cpu(), order.indices)
        assert torch.equal(taken.cpu(), order.values)
        assert count.tolist() == [slots] * 2
    least = case.scores.min().item()
    indices, _, count = run(name, case, None, Options("gaussian", sigma=1e-30, min_score=least, max_keep=slots))
    expected = reference_nms.padded_nms(*case, 0.0, slots)
    assert torch.equal(indices.cpu(), expected[0])
    assert torch.equal(count.cpu(), expected[1])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_kernel_on_more_boxes_than_a_block(method: str, grouped: bool) -> None:
    """The highest scores and the lowest, ties of them, and duplicates are in different blocks."""
    case = crowded(2, 1300)
    case.scores[:, [1299, 3, 1100]] = 2.0
    case.boxes[:, 1100] = case.boxes[:, 3]
    numbers = torch.arange(2600).view(2, 1300) % 3 if grouped else None
    found, expected = (run(x, case, numbers, Options(method, max_keep=12)) for x in ("kernel", "reference"))
    assert found[0][:, 0].tolist() == [3, 3]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=0 if method == "linear" else BAND, atol=0)


@pytest.mark.parametrize("name", RUNS)
def test_ties_go_to_the_lower_index(name: str) -> None:
    """Among scores as they are given, both zeros being one, and as they are after decay."""
    indices, _, count = run(name, one(apart(5), [-0.0, 0.0, 0.5, -0.0, 0.5]), None, Options(max_keep=5))
    assert indices.tolist() == [[2, 4, 0, 1, 3]]
    assert count.tolist() == [5]
    duplicates = torch.tensor(HALVES[0]).expand(33, 4)
    indices, taken, _ = run(name, one(duplicates, [0.25, *[0.5] * 32]), None, Options(max_keep=33))
    assert indices.tolist() == [[1, 0, *range(2, 33)]]
    assert taken.tolist() == [[0.5] + [0.0] * 32]
    indices, taken, _ = run(name, one(duplicates, [0.5] * 33), None, Options("gaussian", max_keep=33, sigma=4.0))
    assert indices.tolist() == [list(range(33))]
    assert taken.tolist() == [pytest.approx([0.5 * math.exp(-i / 4) for i in range(33)], rel=BAND)]


@pytest.mark.parametrize("name", RUNS)
def test_lowest_score(name: str) -> None:
    """The one asked for is enough; NaN never is; and once no score is, none decays any more."""
    values = [0.25, math.nan, 0.5, -math.inf, 0.2, math.inf]
    expected = {0.25: [5, 2, 0], 0.0: [5, 2, 0, 4], -math.inf: [5, 2, 0, 4, 3], math.inf: [5], math.nan: []}
    for least, indices in expected.items():
        found = run(name, one(apart(6), values), None, Options(min_score=least, max_keep=6))
        assert found[0].tolist() == [indices + [-1] * (6 - len(indices))]
        assert found[2].tolist() == [len(indices)]
    below = one(HALVES[:2], [-0.6, -0.7])
    assert run(name, below, None, Options(min_score=-0.5))[2].tolist() == [0]
    indices, taken, _ = run(name, one(HALVES[:2], [0.9, -0.6]), None, Options(min_score=-0.5, max_keep=2))
    assert indices.tolist() == [[0, 1]]
    assert taken.tolist() == [pytest.approx([0.9, -0.3])]


@pytest.mark.parametrize("name", RUNS)
def test_segments_without_boxes(name: str) -> None:
    nothing = Segments(torch.full((3, 5, 4), torch.nan), torch.rand(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    indices, taken, count = run(name, nothing, None, Options(max_keep=4))
    assert (indices == -1).all()
    assert (taken == 0).all()
    assert (count == 0).all()
    for segment_count, slots, most in [(2, 0, 3), (0, 5, 3), (0, 0, 0), (2, 5, 0), (2, 0, 0)]:
        case = crowded(segment_count, slots)
        for numbers in (None, torch.zeros(segment_count, slots, dtype=torch.int64)):
            indices, taken, count = run(name, case, numbers, Options(max_keep=most))
            assert indices.shape == taken.shape == (segment_count, most)
            assert (indices == -1).all()
            assert (taken == 0).all()
            assert count.tolist() == [0] * segment_count


@pytest.mark.parametrize("name", RUNS)
@examples(200, interpreted=25)
@given(case=segments(), method=METHODS)
def test_padding_changes_nothing(name: str, case: Segments, method: str) -> None:
    """Nor do boxes in the padding that would win: they overlap everything, with the highest of scores."""
    wins = torch.tensor([0.0, 0, 24, 24]).expand_as(case.boxes)
    tempting = Segments(
        torch.where(case.valid[..., None], case.boxes, wins),
        case.scores.masked_fill(~case.valid, torch.inf),
        case.valid,
    )
    options = Options(method, max_keep=5)
    assert_equal(run(name, tempting, None, options), run(name, case, None, options))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float32, torch.float16)])
def test_kernel_on_16_bit_and_strided_inputs(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = crowded(3, 20)
    numbers = (torch.arange(60).view(20, 3) % 2).T
    strided = Segments(
        case.boxes.to(dtypes[0]).permute(2, 1, 0).contiguous().permute(2, 1, 0),
        case.scores.to(dtypes[1]).T.contiguous().T,
        case.valid.T.contiguous().T,
    )
    found, expected = (run(x, strided, numbers, Options(max_keep=6)) for x in ("kernel", "reference"))
    assert_equal(found, expected)
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(grouped: bool) -> None:
    case = [x.to(DEVICE) for x in crowded(2, 5)]
    numbers = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE) if grouped else None
    torch.library.opcheck(torch.ops.fastmrcnn.soft_nms.default, (*case, numbers, True, 0.3, 0.5, 0.05, 3))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_fake_tensors(name: str, method: str) -> None:
    """No value is read: shapes depend on shapes alone."""
    with FakeTensorMode(), torch.device("cuda"):
        boxes, scores, valid = torch.empty(2, 7, 4), torch.empty(2, 7), torch.ones(2, 7, dtype=torch.bool)
        found = RUNS[name](boxes, scores, valid, valid.long(), method, 0.3, 0.5, 0.0, 3)
    assert [x.shape for x in found] == [(2, 3), (2, 3), (2,)]
    assert [x.dtype for x in found] == [torch.int64, torch.float32, torch.int64]
    assert all(x.device.type == "cuda" for x in found)
