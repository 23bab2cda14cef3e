"""Targets of the mask head: against torchvision's resizing and RoIAlign, and the implementations against each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks import masks
from strategies import DEVICE, boxes, examples
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.ops import roi_align

from fastmrcnn import ops
from fastmrcnn_kernels import numpy_mask_targets, views
from fastmrcnn_kernels.reference import mask_targets as reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, in the interpreter, of boxes that are not finite
]

IMPLEMENTATIONS: list[ops.Impl] = ["reference", "numpy", "triton"]
ON_HOST: list[ops.Impl] = ["reference", "numpy"]
SIZES = [1, 2, 3, 17, 31, 32, 33, 40, 70]


class Case(NamedTuple):
    """Masks [G, H, W] and the view of each image; boxes [N, S, 4] and what they are matched with, [N, S]."""

    masks: list[Tensor]
    views: Tensor
    boxes: Tensor
    matched: Tensor
    valid: Tensor


def random_view(random: Random, longest: int) -> tuple[int, ...]:
    """Of an image made larger or smaller, or left as it is, and a window anywhere in it, sometimes of one pixel."""
    height, width = (random.choice([side for side in SIZES if side <= longest]) for _ in range(2))
    factors = random.choice([(1, 1), (0.6, 0.4), (1.7, 2.3), (0.3, 3)])
    resized_height, resized_width = (max(1, round(s * f)) for s, f in zip((height, width), factors, strict=True))
    if random.random() < 0.5:
        return views.whole(height, width, resized_height, resized_width)
    top, left = random.randrange(resized_height), random.randrange(resized_width)
    rows, columns = random.randint(1, resized_height - top), random.randint(1, resized_width - left)
    return (height, width, resized_height, resized_width, top, left, rows, columns)


@st.composite
def cases(
    draw: st.DrawFn, slots: int = 5, longest: int = 70, *, limit: float = torch.inf, hostile: bool = False
) -> Case:
    """Two images of objects; an image of none has no valid slots.  The others hold what would be an error to read."""
    seed = draw(st.integers(0, 2**31))
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    shown = torch.tensor([random_view(random, longest) for _ in range(2)])
    # Some are nearly solid, others noise; the words of one object must not be mistaken for another's.
    found = [
        torch.rand(random.choice([0, 1, 2, 3]), height, width, generator=generator) < random.choice([0.5, 0.9])
        for height, width in shown[:, :2].tolist()
    ]
    each = torch.stack([draw(boxes(slots, extent=64.0, not_finite=hostile)) for _ in range(2)])
    each = (each * shown[:, None, [7, 6, 7, 6]] / 64).clamp(-limit, limit)
    each = each.round() if draw(st.booleans()) else each
    count = torch.tensor([[len(mask)] for mask in found])
    matched = torch.randint(2**31, (2, slots), generator=generator) % count.clamp(min=1)
    valid = (torch.rand(2, slots, generator=generator) < random.choice([0.6, 1.0])) & (count > 0)
    each = torch.where(valid[..., None], each, random.choice([torch.nan, 1e9, -torch.inf]))
    return Case(found, shown, each, torch.where(valid, matched, random.choice([-1, 2**62, 12345])), valid)


def targets(case: Case, size: int, impl: ops.Impl, *, wide: bool = False) -> Tensor:
    device = DEVICE if impl == "triton" else "cpu"
    given_boxes = case.boxes.double() if wide else case.boxes
    arguments = (*ops.pack_masks(case.masks), case.views, given_boxes, case.matched, case.valid)
    return ops.mask_targets(*(x.to(device) for x in arguments), size, impl=impl).cpu()


def resized(mask: Tensor, view: list[int]) -> Tensor:
    """What torchvision's transform makes of masks [G, H, W] of an image, of which the window is cut out."""
    whole = functional.interpolate(mask[:, None].float(), size=(view[2], view[3]), mode="nearest")[:, 0].byte()
    return whole[:, view[4] : view[4] + view[6], view[5] : view[5] + view[7]]


def by_torchvision(case: Case, size: int, *, wide: bool) -> Tensor:
    """Image by image, of the valid slots alone; in float64 by RoIAlign, else by the function for mask targets."""
    result = torch.zeros(*case.matched.shape, size, size, dtype=torch.float64 if wide else torch.float32)
    for i, view in enumerate(case.views.tolist()):
        here, mask = case.valid[i], resized(case.masks[i], view)
        if not here.any():
            continue
        found, index = case.boxes[i, here], case.matched[i, here]
        if wide:
            rois = torch.cat((index[:, None], found), dim=1).double()
            result[i, here] = roi_align(mask[:, None].double(), rois, (size, size), 1.0, -1, False)[:, 0]
        else:
            result[i, here] = torchvision_heads.project_masks_on_boxes(mask, found, index, size)
    return result


@pytest.mark.parametrize("impl", ON_HOST)
@given(case=cases(limit=300.0), size=st.sampled_from([1, 2, 7, 28]))
def test_equals_torchvision(impl: ops.Impl, case: Case, size: int) -> None:
    assert_exact_arithmetic(targets(case, size, impl, wide=True), by_torchvision(case, size, wide=True))


@given(case=cases(limit=300.0))
def test_float32_keeps_to_the_budget(case: Case) -> None:
    """Of several sizes together: in one number alone the reference may happen to be exact."""

    def of_all_sizes(run: Callable[[int], Tensor]) -> Tensor:
        return torch.cat([run(size).flatten() for size in (1, 5, 28)])

    exact = of_all_sizes(lambda size: by_torchvision(case, size, wide=True))
    expected = of_all_sizes(lambda size: targets(case, size, "reference"))
    assert_within_budget(of_all_sizes(lambda size: targets(case, size, "numpy")), expected, exact)
    assert_within_budget(of_all_sizes(lambda size: by_torchvision(case, size, wide=False)), expected, exact)


@examples(150, interpreted=15)
@given(case=cases(3, 33, hostile=True), size=st.sampled_from([2, 3, 5]))
def test_kernel_keeps_to_the_budget(case: Case, size: int) -> None:
    exact, expected = targets(case, size, "reference", wide=True), targets(case, size, "reference")
    assert_within_budget(targets(case, size, "triton"), expected, exact)
    assert_within_budget(targets(case, size, "numpy"), expected, exact)


def ellipses(height: int, width: int, view: tuple[int, ...] | None = None, **changes: Any) -> Case:
    """Two objects in one image, seen through `view`, and a box about each, unless `changes` say otherwise."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    objects = [((y / height - c) ** 2 + (x / width - c) ** 2) < 0.1 for c in (0.4, 0.6)]
    shown = torch.tensor([view or views.whole(height, width, height, width)])
    rows, columns = shown[0, 6:].tolist()
    found = torch.tensor([[[0.1 * columns, 0.1 * rows, 0.7 * columns, 0.7 * rows], [1.5, 2.5, columns, rows]]])
    case = Case([torch.stack(objects)], shown, found, torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    return case._replace(**changes)


@pytest.mark.parametrize(("height", "width", "size"), [(75, 39, 2), (39, 45, 1), (6, 7, 33)])
def test_bins_and_boxes_that_take_the_kernel_several_turns(height: int, width: int, size: int) -> None:
    """More rows than it has weights for, more columns than lanes, more bins than a program owns."""
    case = ellipses(height, width)
    case = case._replace(boxes=case.boxes[:, 1:], matched=case.matched[:, 1:], valid=case.valid[:, 1:])
    exact, expected = targets(case, size, "reference", wide=True), targets(case, size, "reference")
    assert 0 < exact.mean() < 1
    assert_within_budget(targets(case, size, "triton"), expected, exact)


@pytest.mark.parametrize("impl", ON_HOST)
def test_memory_is_bounded_by_taking_turns(impl: ops.Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of single boxes, and strips of a row of an object."""
    case = ellipses(40, 70, (40, 70, 93, 51, 3, 5, 60, 40))
    expected = targets(case, 7, impl, wide=True)
    monkeypatch.setattr(reference, "ELEMENTS_AT_A_TIME", 1)
    monkeypatch.setattr(numpy_mask_targets, "BOXES_AT_A_TIME", 1)
    monkeypatch.setattr(numpy_mask_targets, "PIXELS_AT_A_TIME", 1)
    assert_exact_arithmetic(targets(case, 7, impl, wide=True), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_window_is_a_map_of_its_own(impl: ops.Impl) -> None:
    """A full mask: 1 within the window and less than a pixel around it, 0 beyond, though the image goes on there."""
    full = [torch.ones(1, 20, 40, dtype=torch.bool)]
    found = torch.tensor([[[0.0, 0, 8, 8], [-0.5, -0.5, 0.5, 0.5], [10, 2, 14, 6], [-4, 0, 4, 8], [11.5, 2, 15.5, 6]]])
    found = torch.cat((found, torch.tensor([[[-1.5, -1.5, 2.5, 2.5]]])), dim=1)
    case = Case(
        full, torch.tensor([[20, 40, 20, 40, 4, 9, 10, 12]]), found, torch.zeros(1, 6).long(), found[..., 0] < 99
    )
    pooled = targets(case, 4, impl)[0]
    ones = torch.ones(4, 4)
    torch.testing.assert_close(pooled[0], ones)
    torch.testing.assert_close(pooled[1], ones)
    torch.testing.assert_close(pooled[2], ones * torch.tensor([1.0, 1, 0, 0]))
    torch.testing.assert_close(pooled[3], ones * torch.tensor([0.0, 0.5, 1, 1]))
    torch.testing.assert_close(pooled[4], ones * torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(pooled[5], ones)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("size", "larger", "at"), [(3, 75, 25), (6, 74, 37), (21, 69, 46), (26, 22, 11), (3, 75, 50)])
@pytest.mark.parametrize("before", [0, 1])
def test_pixels_are_chosen_in_float32(impl: ops.Impl, before: int, size: int, larger: int, at: int) -> None:
    """Where float32 rounds the place of a pixel to an integer, or down from one, and so does PyTorch.

    That of a window's pixel is computed at once, not from that of the first: the window begins so many `before`.
    """
    numbers = torch.arange(size).float().view(1, 1, size, 1)
    seen = functional.interpolate(numbers, size=(larger, 1), mode="nearest")[0, 0, at, 0] == torch.arange(size)
    assert seen.nonzero().item() in (at * size // larger, at * size // larger - 1)
    one = torch.ones(1, 1, dtype=torch.int64)
    case = Case(
        [(seen[:, None] & seen)[None]],
        torch.tensor([[size, size, larger, larger, at - before, at - before, before + 1, before + 1]]),
        torch.tensor([[[before - 0.5, before - 0.5, before + 0.5, before + 0.5]]]),
        one - 1,
        one > 0,
    )
    assert targets(case, 1, impl).item() == 1


HOSTILE = [
    [-20_000.0, -20_000, 20_000, 20_000],
    [0, 0, 40_000, 40_000],
    [39_990, 39_990, 40_000, 40_000],
    [-1e30, -1e30, 1e30, 1e30],
    [1e30, 1e30, 1e31, 1e31],
    [-1.6e38, -1.6e38, 1.6e38, 1.6e38],
    [6.5, 4.5, 6.5, 4.5],
    [9, 9, 4, 2],
]
NOTHING = [
    [torch.nan] * 4,
    [1, 1, torch.nan, 5],
    [torch.inf, 1, 5, 5],
    [1, -torch.inf, 5, 5],
    [1, 1, torch.inf, torch.inf],
    [1, 1, -torch.inf, 5],
    [1, 1, 5, -torch.inf],
    [-3e38, 1, 3e38, 5],
    [1, -3e38, 5, 3e38],
    [1e6, 1e6, 1e6 + 7, 1e6 + 9],
]


@pytest.mark.parametrize("impl", ["numpy", "triton"])
@pytest.mark.parametrize("size", [1, 2])
def test_boxes_as_hostile_as_they_come(impl: ops.Impl, size: int) -> None:
    found = torch.tensor([HOSTILE])
    matched = torch.arange(len(HOSTILE))[None] % 2
    case = ellipses(9, 37, boxes=found, matched=matched, valid=matched >= 0)
    case.masks[0][0] = True  # so that every sample shows
    exact, expected = targets(case, size, "reference", wide=True), targets(case, size, "reference")
    assert expected[0, 0].amax() > 0
    assert_within_budget(targets(case, size, impl), expected, exact)
    if impl == "numpy":
        assert_exact_arithmetic(targets(case, size, impl, wide=True), exact)


def test_hostile_boxes_are_no_reason_for_warnings() -> None:
    found = torch.tensor([HOSTILE + NOTHING])
    matched = torch.zeros(found.shape[:2], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets(ellipses(9, 37, boxes=found, matched=matched, valid=matched == 0), 5, "numpy")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_boxes_that_are_not_finite_or_show_nothing_give_zeros(impl: ops.Impl) -> None:
    matched = torch.zeros(1, len(NOTHING), dtype=torch.int64)
    full = [torch.ones(1, 9, 37, dtype=torch.bool)]
    case = ellipses(9, 37, masks=full, boxes=torch.tensor([NOTHING]), matched=matched, valid=matched == 0)
    assert (targets(case, 3, impl) == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_objects_of_which_there_are_no_words_are_empty(impl: ops.Impl) -> None:
    """Whatever matched is, only `words` are read; where it is an object, the result is that of the object."""
    case = ellipses(9, 37, boxes=torch.tensor([[[1.0, 1, 30, 8]] * 6]))
    matched = torch.tensor([[1, 2, -1, 2**62, -(2**62), 2**40]])
    pooled = targets(case._replace(matched=matched, valid=matched > -(2**63)), 3, impl)
    assert pooled[0, 0].amax() > 0
    assert (pooled[0, 1:] == 0).all()
    words, offsets = ops.pack_masks(case.masks)
    arguments = (offsets, case.views, case.boxes[:, :2], matched[:, :2] * 0, matched[:, :2] > 0)
    device = DEVICE if impl == "triton" else "cpu"
    for kept in (0, 17):  # of 18 words of the first object
        pooled = ops.mask_targets(*(x.to(device) for x in (words[:kept], *arguments)), 3, impl=impl)
        assert (pooled == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_memory_layout_changes_nothing(impl: ops.Impl) -> None:
    case = ellipses(9, 37)
    expected = targets(case, 3, impl)
    assert expected.amax() > 0
    device = DEVICE if impl == "triton" else "cpu"
    arguments = (*ops.pack_masks(case.masks), case.views, case.boxes, case.matched, case.valid)
    apart = [torch.stack((x, x), dim=-1).to(device)[..., 0] for x in arguments]
    assert not any(x.is_contiguous() for x in apart if x.numel() > 1)
    assert torch.equal(ops.mask_targets(*apart, 3, impl=impl).cpu(), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(impl: ops.Impl) -> None:
    """No slots, a window of no pixels, no images, and an image without objects, whose view may be anything."""
    case = ellipses(9, 37)
    assert targets(
        case._replace(boxes=case.boxes[:, :0], matched=case.matched[:, :0], valid=case.valid[:, :0]), 3, impl
    ).shape == (*(1, 0, 3, 3),)
    seen = torch.tensor([[9, 37, 9, 37, 0, 0, 0, 37], [9, 37, 9, 37, 0, 0, 9, 0], [9, 37, 9, 37, 0, 0, 1, 1]])
    everything = torch.ones(3, 1, 9, 37, dtype=torch.bool)
    at_the_corner, one = torch.tensor([[[-0.5, -0.5, 0.5, 0.5]]]).repeat(3, 1, 1), torch.ones(3, 1)
    pooled = targets(Case(list(everything), seen, at_the_corner, one.long() - 1, one.bool()), 1, impl)
    assert pooled.flatten().tolist() == [0, 0, 1]
    none = Case([], *(x[:0] for x in case[1:]))
    assert targets(none, 3, impl).shape == (0, 2, 3, 3)
    for view in (
        torch.zeros(1, 8),
        torch.tensor([[0, 37, 9, 37, 0, 0, 9, 37]]),
        torch.tensor([[9, 37, 9, 37, 0, 0, 0, 37]]),
    ):
        for valid in (False, True):
            empty = case._replace(masks=[case.masks[0][:0]], views=view.long(), valid=torch.full((1, 2), valid))
            assert (targets(empty, 3, impl) == 0).all()


@given(found=st.lists(st.tuples(masks(), st.booleans()), max_size=4))
def test_packing(found: list[tuple[Tensor, bool]]) -> None:
    """Object g of an image is where `mask_targets` is said to look for it, of bool and uint8 masks alike."""
    given_masks = [mask.to(torch.uint8) * 255 if as_bytes else mask for mask, as_bytes in found]
    words, offsets = ops.pack_masks(given_masks)
    assert (words.dtype, offsets.dtype) == (torch.int32, torch.int64)
    assert (words.dim(), len(offsets)) == (1, len(found))
    assert len(words) == sum(mask.shape[0] * mask.shape[1] * -(-mask.shape[2] // 32) for mask, _ in found)
    for offset, (mask, _) in zip(offsets.tolist(), found, strict=True):
        count, height, width = mask.shape
        its = words[offset : offset + count * height * -(-width // 32)].view(count, height, -(-width // 32))
        assert torch.equal(ops.unpack_bits(its, width), mask)


def test_shapes_do_not_depend_on_data() -> None:
    """Nothing is read from the GPU: fake tensors have nothing to read."""
    with FakeTensorMode(), torch.device("cuda"):
        words, offsets = ops.pack_masks([torch.ones(2, 5, 40, dtype=torch.uint8), torch.ones(0, 7, 9) > 0])
        assert (words.shape, words.device.type, offsets.device.type) == ((20,), "cuda", "cuda")
        shown, found = torch.ones(2, 8, dtype=torch.int64), torch.rand(2, 3, 4, dtype=torch.float16)
        pooled = ops.mask_targets(words, offsets, shown, found, shown[:, :3], shown[:, :3] > 0, 28)
        assert (pooled.shape, pooled.dtype, pooled.device.type) == ((2, 3, 28, 28), torch.float32, "cuda")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_gradient(impl: ops.Impl) -> None:
    case = ellipses(9, 37)
    assert not targets(case._replace(boxes=case.boxes.clone().requires_grad_()), 2, impl).requires_grad


def test_what_is_refused() -> None:
    case = ellipses(9, 37)
    words, offsets = ops.pack_masks(case.masks)
    right = {"words": words, "offsets": offsets, "views": case.views, "boxes": case.boxes}
    right |= {"matched": case.matched, "valid": case.valid}
    for wrong, message in (
        ({"words": words.view(2, -1)}, r"words: expected shape \[\*\]"),
        ({"offsets": offsets.repeat(2)}, r"views: expected shape \[2, 8\]"),
        ({"views": case.views[:, :7]}, r"views: expected shape \[1, 8\]"),
        ({"boxes": case.boxes[0]}, r"boxes: expected shape \[1, \*, 4\]"),
        ({"matched": case.matched[:, :1]}, r"matched: expected shape \[1, 2\]"),
        ({"valid": case.valid[0]}, r"valid: expected shape \[1, 2\]"),
        ({"size": 0}, "size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.mask_targets(**{"size": 3, **right, **wrong})
    for wrong, message in (
        ({"words": words.long()}, "words: expected torch.int32"),
        ({"valid": case.matched}, "valid: expected torch.bool"),
        ({"boxes": case.boxes.double(), "impl": "triton"}, "impl='triton': expected float32 boxes"),
    ):
        with pytest.raises(TypeError, match=message):
            ops.mask_targets(**{"size": 3, **right, **wrong})
    with pytest.raises(TypeError, match=r"masks\[1\]: expected bool or uint8, got torch.float32"):
        ops.pack_masks([case.masks[0], case.masks[0].float()])
    with pytest.raises(ValueError, match=r"masks\[0\]: expected shape"):
        ops.pack_masks([case.masks[0][0]])
