"""Matching of boxes to objects: the reference against torchvision's `Matcher`, the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, boxes, examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from fastmrcnn import ops
from fastmrcnn_kernels.reference import matching as reference
from fastmrcnn_kernels.reference.boxes import pairwise_iou
from fastmrcnn_kernels.triton import matching as kernels

EVERYWHERE: list[ops.Impl] = ["reference", "triton"]
THRESHOLDS = [(0.5, 0.5), (0.7, 0.3), (0.25, 0.2), (0.0, 0.0), (1.0, 0.0)]

Thresholds = tuple[float, float]


class Case(NamedTuple):
    """Boxes of each image, or of all; padded objects and how many there are; thresholds, high and low."""

    boxes: Tensor
    truth: Tensor
    count: Tensor
    thresholds: Thresholds
    low_quality: bool


@st.composite
def cases(draw: st.DrawFn, most: int = 40) -> Case:
    """Boxes as hostile as they come, one image without objects now and then, and thresholds that overlaps reach."""
    images, slots, number = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, most))
    not_finite = draw(st.booleans())
    shared = draw(st.booleans())
    found = draw(boxes((1 if shared else images) * number, extent=24.0, not_finite=not_finite)).view(-1, number, 4)
    truth = draw(boxes(images * slots, extent=24.0, not_finite=not_finite)).view(images, slots, 4)
    if draw(st.booleans()):
        truth[:, 0] = found[:, number // 2]
    count = torch.tensor(draw(st.lists(st.integers(0, slots), min_size=images, max_size=images)))
    overlaps = pairwise_iou(truth, found).flatten()
    reached = overlaps[overlaps > 0].tolist() or [0.5]
    one, other = draw(st.sampled_from(reached)), draw(st.sampled_from(reached))
    thresholds = draw(st.sampled_from([*THRESHOLDS, (max(one, other), min(one, other)), (one, one)]))
    garbage = draw(st.sampled_from([torch.nan, torch.inf, 1e9]))
    truth = torch.where((torch.arange(slots) < count[:, None])[..., None], truth, garbage)
    return Case(found, truth, count, thresholds, draw(st.booleans()))


def match(impl: ops.Impl, case: Case) -> Tensor:
    device = DEVICE if impl == "triton" else "cpu"
    found, truth, count = (x.to(device) for x in case[:3])
    (high, low), keep = case.thresholds, case.low_quality
    result = ops.match_boxes(found, truth, count, high=high, low=low, allow_low_quality=keep, impl=impl)
    assert result.dtype == torch.int64
    assert result.shape == (len(truth), found.shape[1])
    return result.cpu()


def by_torchvision(case: Case) -> Tensor:
    """-1 for images without objects, with which torchvision's `Matcher` has nothing to do."""
    matcher = Matcher(*case.thresholds, allow_low_quality_matches=case.low_quality)
    results = []
    for i, count in enumerate(case.count.tolist()):
        found = case.boxes[i % len(case.boxes)]
        nothing = torch.full((len(found),), Matcher.BELOW_LOW_THRESHOLD)
        results.append(matcher(box_iou(case.truth[i, :count], found)) if count else nothing)
    return torch.stack(results)


def many(images: int, number: int, slots: int, *, low_quality: bool = True) -> Case:
    """Boxes and objects of 1 to 64 pixels, on whole pixels, all slots in use."""
    generator = torch.Generator().manual_seed(number)

    def some(*shape: int) -> Tensor:
        start = torch.randint(0, 80, (*shape, 2), generator=generator)
        return torch.cat((start, start + torch.randint(1, 65, (*shape, 2), generator=generator)), dim=-1).float()

    return Case(some(images, number), some(images, slots), torch.full((images,), slots), (0.7, 0.3), low_quality)


@contextmanager
def blocks_of(number: int) -> Iterator[None]:
    """Programs that own so many boxes, and compare the best of 4 objects at a time."""
    with patch.object(kernels, "BLOCK", number), patch.object(kernels, "CHUNK", 4):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(case=cases())
def test_reference_equals_torchvision(dtype: torch.dtype, case: Case) -> None:
    case = case._replace(boxes=case.boxes.to(dtype), truth=case.truth.to(dtype))
    assert torch.equal(match("reference", case), by_torchvision(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(case=cases())
def test_overlaps_are_those_of_all_operations(dtype: torch.dtype, case: Case) -> None:
    """To the bit: thresholds and ties decide as in suppression."""
    found, truth = case.boxes.to(dtype), case.truth.to(dtype)
    expected = pairwise_iou(truth, found)
    torch.testing.assert_close(reference._overlaps(truth, found), expected, rtol=0, atol=0, equal_nan=True)


@examples(200, interpreted=40)
@given(case=cases())
def test_kernel_equals_reference(case: Case) -> None:
    with blocks_of(16):
        assert torch.equal(match("triton", case), match("reference", case))


@pytest.mark.parametrize("low_quality", [False, True])
def test_more_boxes_than_a_program_owns(low_quality: bool) -> None:
    case = many(2, 600, 6, low_quality=low_quality)._replace(thresholds=(0.5, 0.3))
    expected = by_torchvision(case)
    assert {-2, -1, 0, 5} <= set(expected.flatten().tolist())
    for impl in EVERYWHERE:
        assert torch.equal(match(impl, case), expected)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_every_block_holds_the_best_box_of_one_object(impl: ops.Impl) -> None:
    """Its fourth box, a fifth of which the object covers.  The reference takes the boxes in two parts."""
    x = torch.arange(9 * 16) * 10.0
    found = torch.stack((x, torch.zeros_like(x), x + 10, torch.full_like(x, 10)), dim=1)
    truth = found[3::16] - torch.tensor([0, 0, 8, 0])
    case = Case(found[None], truth[None], torch.tensor([9]), (0.7, 0.3), True)
    expected = torch.full((9, 16), -1)
    expected[:, 3] = torch.arange(9)
    with blocks_of(16), patch.object(reference, "PAIRS_AT_A_TIME", 9 * 80):
        assert torch.equal(match(impl, case), expected.view(1, -1))


def test_a_thousand_objects() -> None:
    case = many(1, 40, 1000)
    expected = by_torchvision(case)
    assert expected.max() > 900
    assert torch.equal(match("reference", case), expected)
    with patch.object(kernels, "OBJECTS", 64 if DEVICE == "cpu" else 4):  # the interpreter takes longer steps
        assert torch.equal(match("triton", case), expected)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_by_hand(impl: ops.Impl) -> None:
    """Columns of a strip 1 pixel high: the objects are its left half, twice, and its last tenth."""
    columns = [[0, 10], [0, 8], [0, 4], [0, 2], [4, 10], [9, 10], [8, 10]]
    found = torch.tensor([[[a, 0, b, 1] for a, b in columns]], dtype=torch.float32)
    truth = torch.tensor([[[0, 0, 5, 1], [0, 0, 5, 1], [9, 0, 10, 1]]], dtype=torch.float32)
    case = Case(found, truth, torch.tensor([3]), (0.75, 0.45), False)
    # Their highest overlaps are 1/2, 5/8, 4/5, 2/5, 1/6 with the third object, 1 and 1/2 with it.
    assert match(impl, case).tolist() == [[-2, -2, 0, -1, -1, 2, -2]]
    # Those that are best are objects already.  Without them others are, and all that tie.
    kept = case._replace(low_quality=True)
    assert match(impl, kept).tolist() == [[-2, -2, 0, -1, -1, 2, -2]]
    assert match(impl, kept._replace(boxes=found[:, :1])).tolist() == [[0]]
    assert match(impl, kept._replace(boxes=found[:, 3:5])).tolist() == [[0, 2]]
    assert match(impl, kept._replace(boxes=found[:, [3, 3, 4, 4]])).tolist() == [[0, 0, 2, 2]]


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_best_for_one_object_but_closer_to_another(impl: ops.Impl) -> None:
    """A box belongs to the object with which its overlap is highest, whichever it is kept for."""
    found = torch.tensor([[[0.0, 0, 10, 10], [40, 40, 50, 50]]])
    truth = torch.tensor([[[0.0, 0, 10, 8], [8, 0, 18, 10]]])
    case = Case(found, truth, torch.tensor([2]), (0.9, 0.9), True)
    assert match(impl, case).tolist() == [[0, -1]]
    case = case._replace(truth=truth[:, [1, 0]])
    assert match(impl, case).tolist() == [[1, -1]]


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_an_object_far_from_all_boxes_keeps_those_that_it_does_not_overlap(impl: ops.Impl) -> None:
    """All tie at 0.  So it is in torchvision; the third box, which overlaps that object as little, too."""
    found = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 2, 10], [60, 60, 70, 70]]])
    truth = torch.tensor([[[0.0, 0, 10, 10], [200, 200, 210, 210]]])
    case = Case(found, truth, torch.tensor([2]), (0.5, 0.5), True)
    assert match(impl, case).tolist() == by_torchvision(case).tolist() == [[0, 0, 0]]
    assert match(impl, case._replace(count=torch.tensor([1]))).tolist() == [[0, -1, -1]]


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_overlap_at_a_threshold(impl: ops.Impl) -> None:
    """At `high` is an object, at `low` is between; thresholds are rounded as overlaps are, 7/10 to the same number."""
    found, truth = torch.tensor([[[0.0, 0, 10, 7]]]), torch.tensor([[[0.0, 0, 10, 10]]])
    overlap = torch.tensor(0.7)
    above = torch.nextafter(overlap, torch.tensor(1.0)).item()
    for thresholds, expected in [
        ((0.7, 0.3), 0),
        ((overlap.item(), overlap.item()), 0),
        ((above, 0.7), -2),
        ((above, above), -1),
    ]:
        case = Case(found, truth, torch.tensor([1]), thresholds, False)
        assert match(impl, case).tolist() == by_torchvision(case).tolist() == [[expected]]


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_what_is_no_box(impl: ops.Impl) -> None:
    """It overlaps nothing; unless that is 0 / 0 or NaN, which is above every threshold, and best for no object."""
    nan, inf = torch.nan, torch.inf
    odd = {
        "without area": ([5.0, 5, 5, 9], -1),
        "inverted": ([9.0, 2, 4, 9], -1),
        "inverted twice": ([9.0, 9, 4, 2], -1),
        "NaN": ([nan, 0, 5, 5], 0),
        "a quadrant": ([0.0, 0, inf, inf], -1),
        "of infinite height and no width": ([5.0, 0, 5, inf], 0),
    }
    found = torch.tensor([[[0.0, 0, 10, 10], *(box for box, _ in odd.values())]])
    usual, point = [0.0, 0, 10, 8], [30.0, 30, 30, 30]
    case = Case(found, torch.tensor([[usual, point]]), torch.tensor([1]), (0.9, 0.9), True)
    expected = [result for _, result in odd.values()]
    # With a NaN among its overlaps, the object does not keep the first box, which is best for it.
    assert match(impl, case).tolist() == by_torchvision(case).tolist() == [[-1, *expected]]
    usable = case._replace(boxes=found[:, [0, 1, 2, 3, 5]])
    assert match(impl, usable).tolist() == by_torchvision(usable).tolist() == [[0, -1, -1, -1, -1]]
    # A box without area and a point are 0 / 0.
    both = usable._replace(count=torch.tensor([2]))
    assert match(impl, both).tolist() == by_torchvision(both).tolist() == [[0, 1, -1, -1, -1]]
    # A quadrant overlaps itself by infinity / NaN, whose sign bit some processors set.
    endless = case._replace(boxes=found[:, [0, 5]], truth=torch.tensor([[usual, odd["a quadrant"][0]]]))
    for count, expected in ((1, [0, -1]), (2, [0, 1])):
        endless = endless._replace(count=torch.tensor([count]))
        assert match(impl, endless).tolist() == by_torchvision(endless).tolist() == [expected]


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_nothing_to_match(impl: ops.Impl) -> None:
    for keep in (False, True):
        case = many(2, 5, 3, low_quality=keep)
        none = case._replace(count=torch.zeros(2, dtype=torch.int64), truth=torch.full((2, 3, 4), torch.nan))
        assert (match(impl, none) == -1).all()
        assert (match(impl, none._replace(thresholds=(0.0, 0.0))) == -1).all()
        assert (match(impl, none._replace(truth=torch.zeros(2, 0, 4))) == -1).all()
        assert match(impl, case._replace(boxes=torch.zeros(1, 0, 4))).shape == (2, 0)
        nobody = Case(case.boxes[:1], case.truth[:0], case.count[:0], case.thresholds, keep)
        assert match(impl, nobody).shape == (0, 5)
        assert match(impl, nobody._replace(boxes=case.boxes[:0])).shape == (0, 5)


@pytest.mark.parametrize("impl", EVERYWHERE)
@examples(100, interpreted=12)
@given(case=cases())
def test_padding_changes_nothing(impl: ops.Impl, case: Case) -> None:
    """Nor do objects in the padding that fit the boxes of the image, nor more of it."""
    slots = case.truth.shape[1]
    tempting = case.boxes[:, :1].expand(len(case.truth), slots, 4)
    truth = torch.where((torch.arange(slots) < case.count[:, None])[..., None], case.truth, tempting)
    expected = match(impl, case)
    assert torch.equal(match(impl, case._replace(truth=truth)), expected)
    assert torch.equal(match(impl, case._replace(truth=torch.cat((truth, tempting), dim=1))), expected)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_count_beyond_the_slots(impl: ops.Impl) -> None:
    case = many(2, 20, 3)
    assert torch.equal(match(impl, case._replace(count=torch.tensor([9, 1 << 40]))), match(impl, case))


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_shared_and_strided_boxes(impl: ops.Impl) -> None:
    case = many(3, 30, 5)
    case = case._replace(boxes=case.boxes[:1])
    expected = by_torchvision(case)
    by_coordinate = case.boxes.mT.contiguous().mT
    wide = torch.full((3, 10, 4), torch.nan)
    wide[:, ::2] = case.truth
    counts = torch.stack((case.count, torch.zeros_like(case.count)), dim=1)[:, 0]
    for found in (case.boxes, by_coordinate, case.boxes.expand(3, -1, -1), case.boxes.repeat(3, 1, 1)):
        assert torch.equal(match(impl, Case(found, wide[:, ::2], counts, *case[3:])), expected)


@pytest.mark.parametrize("pairs", [1, 50, 10_000])
@pytest.mark.parametrize("host", [False, True])
@given(case=cases())
def test_a_part_of_the_boxes_at_a_time(pairs: int, host: bool, case: Case) -> None:
    """And whether or not the host may look which parts hold an object's best box."""
    with patch.object(reference, "PAIRS_AT_A_TIME", pairs), patch.object(reference, "on_host", lambda _: host):
        assert torch.equal(match("reference", case), by_torchvision(case))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes, or that it is a view of."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("launch", [reference.match_boxes, kernels.match_boxes])
def test_overlaps_are_not_all_kept(launch: Callable[..., Tensor]) -> None:
    """Nothing is larger than the boxes, or than what a part of the overlaps takes, of which there are 20 parts."""
    case = many(1, 1500, 40)
    arguments = (x.to(DEVICE if launch is kernels.match_boxes else "cpu") for x in case[:3])
    with patch.object(reference, "PAIRS_AT_A_TIME", 3000), Largest() as largest:
        launch(*arguments, *case.thresholds, True)
    assert largest.bytes <= max(case.boxes.nbytes, 2 * 4 * 3000) < 4 * 1500 * 40


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("keep", [False, True])
def test_nothing_is_read_back(impl: ops.Impl, keep: bool) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        found, truth, count = torch.empty(1, 70_000, 4), torch.empty(2, 5, 4), torch.ones(2, dtype=torch.int64)
        result = ops.match_boxes(found, truth, count, high=0.7, low=0.3, allow_low_quality=keep, impl=impl)
    assert (result.shape, result.dtype, result.device.type) == ((2, 70_000), torch.int64, "cuda")


@pytest.mark.parametrize("impl", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_of_16_bits_are_compared_in_float32(impl: ops.Impl, dtype: torch.dtype) -> None:
    """In float16 the area of 300 x 300 pixels is infinite.  Boxes and objects may differ in dtype."""
    case = many(1, 30, 5)
    narrow = case._replace(boxes=(case.boxes * 30).to(dtype), truth=case.truth * 30)
    assert torch.equal(match(impl, narrow), by_torchvision(narrow._replace(boxes=narrow.boxes.float())))


def test_float64_is_for_the_reference() -> None:
    case = many(1, 30, 5)
    for wide in (case._replace(boxes=case.boxes.double()), case._replace(truth=case.truth.double())):
        assert torch.equal(match("auto", wide), match("reference", case))
        with pytest.raises(TypeError, match="impl='triton': expected float32 boxes, got"):
            match("triton", wide)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_no_gradient(impl: ops.Impl) -> None:
    """Nor is anything kept for one."""

    def keep(tensor: Tensor) -> None:
        pytest.fail(f"keeps {list(tensor.shape)}")

    case = many(1, 30, 5)
    found, truth = case.boxes.clone().requires_grad_(), case.truth.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        result = match(impl, case._replace(boxes=found, truth=truth))
    assert not result.requires_grad
    assert torch.equal(result, match(impl, case))


def test_errors() -> None:
    case = many(2, 30, 5)
    for wrong, error, message in [
        ({"boxes": case.boxes[0]}, ValueError, r"boxes: expected shape \[\*, \*, 4\]"),
        ({"boxes": case.boxes.repeat(2, 1, 1)}, ValueError, r"boxes: expected those of 2 images, or of one, got \[4"),
        ({"boxes": case.boxes.long()}, TypeError, "boxes: expected floating point"),
        ({"truth": case.truth[..., :3]}, ValueError, "truth: expected shape"),
        ({"count": case.count[:1]}, ValueError, r"count: expected shape \[2\], got \[1\]"),
        ({"count": case.count.float()}, TypeError, "count: expected torch.int64"),
        ({"thresholds": (0.3, 0.7)}, ValueError, "low=0.7, high=0.3: expected 0 <= low <= high"),
        ({"thresholds": (0.3, -0.1)}, ValueError, "low=-0.1, high=0.3"),
        ({"thresholds": (torch.nan, 0.1)}, ValueError, "low=0.1, high=nan"),
    ]:
        with pytest.raises(error, match=message):
            match("auto", case._replace(**wrong))
    with pytest.raises(NotImplementedError, match="match_boxes has no 'numpy' implementation"):
        match("numpy", case)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: programs that race")
def test_deterministic() -> None:
    case = many(2, 100_000, 50)
    expected = match("reference", case)
    for _ in range(100):
        assert torch.equal(match("triton", case), expected)


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep: bool) -> None:
    case = many(2, 9, 3)
    arguments = (*(x.to(DEVICE) for x in case[:3]), *case.thresholds, keep)
    torch.library.opcheck(torch.ops.fastmrcnn.match_boxes.default, arguments)
