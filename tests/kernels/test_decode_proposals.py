"""Proposals from selected anchors: the reference against torchvision, the kernel against both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, examples
from tolerances import assert_same_decisions, assert_within_budget
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fastmrcnn import ops
from fastmrcnn_kernels import library
from fastmrcnn_kernels.reference.boxes import anchors_at, clip_boxes, large_enough

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of NaN boxes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONES = (1.0, 1.0, 1.0, 1.0)
WEIGHTS = st.sampled_from([ONES, (10.0, 10.0, 5.0, 5.0), (3.0, 7.0, 2.0, 11.0)])
IMPLEMENTATIONS: list[ops.Impl] = ["reference", "triton"]
HOSTILE = [torch.nan, torch.inf, -torch.inf, 300.0, -300.0]
EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """Maps, base anchors and strides per level; indices and scores [N, L, K]; sizes [N, 2]."""

    deltas: list[Tensor]
    base_anchors: list[Tensor]
    strides: list[tuple[int, int]] | Tensor
    indices: Tensor
    scores: Tensor
    sizes: Tensor


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """One to three levels, each with its own number of anchors and layout in memory; some slots are padding."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images, slots = draw(st.integers(1, 2)), draw(st.sampled_from([1, 7, 130]))
    deltas, base_anchors, strides, indices = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        anchors, height, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7)))
        values = torch.randn(images, 8 * anchors, height, width, generator=generator).to(dtype)
        layout = draw(st.sampled_from(["NCHW", "NHWC", "strided"]))
        if layout == "strided":
            values = values.transpose(2, 3).contiguous().transpose(2, 3)[:, ::2]
        else:
            values = values[:, : 4 * anchors].contiguous(
                memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format
            )
        deltas.append(values)
        size = torch.rand(anchors, 2, generator=generator) * 20 + 2
        base_anchors.append(torch.cat((-size / 2, size / 2), dim=1))
        strides.append(draw(st.tuples(st.integers(4, 16), st.integers(4, 16))))
        index = torch.randint(0, anchors * height * width, (images, slots), generator=generator)
        padding = draw(st.sampled_from([-1, anchors * height * width, 2**62, -(2**62)]))
        index[torch.rand(images, slots, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = padding
        indices.append(index)
    scores = torch.rand(images, len(deltas), slots, generator=generator).round(decimals=1)
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = torch.nan
    sizes = torch.randint(30, 90, (images, 2), generator=generator)
    sizes = sizes + 0.5 if draw(st.booleans()) else sizes
    return Case(deltas, base_anchors, strides, torch.stack(indices, dim=1), scores, sizes)


def proposals(
    case: Case,
    impl: ops.Impl = "triton",
    *,
    scored: bool = True,
    min_size: float = 1e-3,
    min_score: float = 0.0,
    weights: Sequence[float] = ONES,
) -> tuple[Tensor, Tensor]:
    """Boxes and which are usable, on the CPU."""
    device = "cpu" if impl == "reference" else DEVICE
    found, valid = ops.decode_proposals(
        [x.to(device) for x in case.deltas],
        case.indices.to(device),
        [x.to(device) for x in case.base_anchors],
        case.strides,
        case.sizes.to(device),
        scores=case.scores.to(device) if scored else None,
        min_size=min_size,
        min_score=min_score,
        weights=weights,
        impl=impl,
    )
    return found.cpu(), valid.cpu()


def boxes_of(case: Case, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Clipped boxes [N, L, K, 4], step by step, and which slots hold an anchor; boxes are 0 where there is none."""
    levels, present = [], []
    for i, (delta, base, stride) in enumerate(zip(case.deltas, case.base_anchors, case.strides, strict=True)):
        flat = delta.permute(0, 2, 3, 1).reshape(len(delta), -1, 4).float()
        index = case.indices[:, i]
        present.append((index >= 0) & (index < flat.shape[1]))
        index = torch.where(present[-1], index, 0)
        anchors = anchors_at(index, base, (delta.shape[2], delta.shape[3]), stride)
        selected = flat.gather(1, index[..., None].expand(-1, -1, 4))
        levels.append(library.decode_boxes(selected.to(DEVICE), anchors.to(DEVICE), weights).cpu())
    exists = torch.stack(present, dim=1)
    return clip_boxes(torch.stack(levels, dim=1), case.sizes).masked_fill(~exists[..., None], 0), exists


@examples(200, interpreted=50)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), weights=WEIGHTS, scored=st.booleans(), hostile=st.booleans())
def test_proposals_are_selected_decoded_and_clipped(
    data: st.DataObject, dtype: torch.dtype, weights: tuple[float, ...], scored: bool, hostile: bool
) -> None:
    """Bit by bit what the kernel that decodes, and the reference for the other steps, make of them one by one."""
    case = data.draw(cases(dtype))
    if hostile:
        for delta in case.deltas:
            places = torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) < 0.1
            delta[places] = data.draw(st.sampled_from(HOSTILE))
    min_size = data.draw(st.sampled_from([0.0, 1e-3, 6.0]))
    found, valid = proposals(case, scored=scored, min_size=min_size, min_score=0.3, weights=weights)
    expected, exists = boxes_of(case, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    usable = exists & large_enough(expected, min_size)
    assert torch.equal(valid, usable & (case.scores >= 0.3) if scored else usable)


@examples(60, interpreted=15)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), impl=st.sampled_from(IMPLEMENTATIONS))
def test_strides_of_each_image(data: st.DataObject, dtype: torch.dtype, impl: ops.Impl) -> None:
    """As each image has them on its own."""
    case = data.draw(cases(dtype))
    if impl == "reference":  # where numbers of no anchor are undefined
        most = [len(base) * x.shape[2] * x.shape[3] for base, x in zip(case.base_anchors, case.deltas, strict=True)]
        exists = case.indices < torch.tensor(most)[:, None]
        case = case._replace(indices=torch.where(exists & (case.indices >= 0), case.indices, -1))
    levels = len(case.deltas)
    strides = torch.tensor(data.draw(st.lists(st.integers(4, 16), min_size=4 * levels, max_size=4 * levels)))
    strides = strides.view(2, levels, 2)[: len(case.sizes)]
    device = "cpu" if impl == "reference" else DEVICE
    found, valid = proposals(case._replace(strides=strides.to(device)), impl)
    for i, its in enumerate(strides):
        alone = [x[i : i + 1] for x in case.deltas], case.base_anchors, [tuple(x) for x in its.tolist()]
        one = Case(*alone, *(x[i : i + 1] for x in (case.indices, case.scores, case.sizes)))
        boxes, usable = proposals(one, impl)
        torch.testing.assert_close(found[i : i + 1], boxes, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(valid[i : i + 1], usable)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        (((32,), (64,)), ((0.5, 1.0, 2.0),) * 2),
        (((16, 24, 40), (50,)), ((0.3, 1.0), (0.7, 1.9))),
        (((8,), (60, 200)), ((1.0,), (0.5, 0.9, 1.0))),
    ],
)
def test_proposals_equal_torchvision(
    sizes: tuple[tuple[int, ...], ...], ratios: tuple[tuple[float, ...], ...], memory_format: torch.memory_format
) -> None:
    """All anchors made, decoded and clipped by torchvision, against ours from indices; the reference bit by bit."""
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
    slots = 130  # more than a block, and than the second level of one case has
    indices = torch.full((3, 2, slots), -1)
    for i, level in enumerate(anchors):
        for image in range(3):
            best = torch.randperm(len(level))[:slots]
            indices[image, i, : len(best)] = best
    scores, size = torch.full(indices.shape, torch.nan), torch.tensor(images.image_sizes)
    case = Case(deltas, generator.cell_anchors, [(8, 16), (16, 16)], indices, scores, size)
    found, valid = proposals(case, scored=False, min_size=6.0)
    reference, usable = proposals(case, "reference", scored=False, min_size=6.0)

    coder = BoxCoder(ONES)
    for i, image_size in enumerate(images.image_sizes):
        for j, (level, a, all_anchors) in enumerate(zip(deltas, counts, anchors, strict=True)):
            index = indices[i, j][indices[i, j] >= 0]
            for result in (found, valid, reference, usable):
                assert not result[i, j, len(index) :].any()
            flat = level[i].view(a, 4, *level.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            expected, exact = (
                torchvision.ops.clip_boxes_to_image(coder.decode_single(x, y)[index], image_size)
                for x, y in ((flat, all_anchors), (flat.double(), all_anchors.double()))
            )
            assert torch.equal(reference[i, j, : len(index)], expected)
            assert_within_budget(found[i, j, : len(index)], expected, exact)
            its_usable = usable[i, j, : len(index)].nonzero().flatten()
            assert torch.equal(its_usable, torchvision.ops.remove_small_boxes(expected, 6.0))
            keep = torch.zeros(len(index), dtype=torch.bool)
            keep[torchvision.ops.remove_small_boxes(exact, 6.0)] = True
            margin = (exact[:, 2:] - exact[:, :2]).amin(dim=1).sub(6).abs()
            assert_same_decisions(valid[i, j, : len(index)], keep, margin, band=8 * EPS * max(image_size))
            assert 0 < keep.sum() < len(keep)


def plain_case(base_anchors: Sequence[Sequence[float]], scores: Sequence[float] | None = None) -> Case:
    """One cell, no deltas, every anchor once, in an image of 30 x 40 pixels."""
    count = len(base_anchors)
    return Case(
        [torch.zeros(1, 4 * count, 1, 1)],
        [torch.tensor(base_anchors)],
        [(8, 8)],
        torch.arange(count).view(1, 1, -1),
        torch.tensor(scores or [1.0] * count).view(1, 1, -1),
        torch.tensor([[30, 40]]),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_just_large_enough_is_usable(impl: ops.Impl) -> None:
    """A side of exactly the least size, before or after clipping, and exactly the least score; NaN is not."""
    case = plain_case([[1.0, 1, 7, 9], [1, 1, 9, 7], [1, 1, 6.5, 9], [1, 1, 9, 6.5], [34, 24, 60, 60], [-9, 0, 6, 30]])
    assert proposals(case, impl, min_size=6.0)[1].flatten().tolist() == [True, True, False, False, True, True]
    case = plain_case([[1.0, 1, 7, 9]] * 5, [0.25, 0.24, torch.nan, torch.inf, -torch.inf])
    assert proposals(case, impl, min_score=0.25)[1].flatten().tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_clipping_knows_height_from_width(impl: ops.Impl) -> None:
    case = plain_case([[-50.0, -60, 500, 600], [35, -10, 90, 20], [-10, 25, 20, 90]])
    found, valid = proposals(case, impl)
    assert found[0, 0].tolist() == [[0, 0, 40, 30], [35, 0, 40, 20], [0, 25, 20, 30]]
    assert valid.all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_proposals_of_hostile_deltas(impl: ops.Impl) -> None:
    """NaN is unusable; infinite growth is limited to 62.5-fold, then clipped to the image."""
    case = plain_case([[16.0, 12, 24, 18]] * 3)
    case.deltas[0][0, 4] = torch.nan
    case.deltas[0][0, 10:] = torch.inf
    found, valid = proposals(case, impl)
    assert valid.flatten().tolist() == [True, False, True]
    assert found[0, 0, 0].tolist() == [16, 12, 24, 18]
    assert found[0, 0, 1].isnan().tolist() == [True, False, True, False]
    assert found[0, 0, 2].tolist() == [0, 0, 40, 30]


@pytest.mark.parametrize(("impl", "numbers"), [("reference", [-1]), ("triton", [-1, 2, 2**31, 2**62, -(2**62)])])
def test_what_padding_holds_has_no_influence(impl: ops.Impl, numbers: list[int]) -> None:
    """-1 is padding, and to the kernel, which reads nothing there, so is all that is no number of an anchor."""
    case = plain_case([[1.0, 2, 7, 9], [2, 1, 9, 7]])
    found, valid = proposals(case, impl)
    for garbage in numbers:
        for score in (torch.nan, torch.inf, 9e9):
            slots = torch.tensor([[[garbage, 0, garbage, 1, garbage]]])
            scores = torch.tensor([[[score, 1, score, 1, score]]])
            padded, usable = proposals(case._replace(indices=slots, scores=scores), impl)
            assert torch.equal(padded[:, :, 1::2], found)
            assert torch.equal(usable[:, :, 1::2], valid)
            assert not padded[:, :, ::2].any()
            assert not usable[:, :, ::2].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("images", "side"), [(1, 26_800), (4, 13_400)])
def test_offsets_beyond_31_bits(images: int, side: int, memory_format: torch.memory_format) -> None:
    """The last channel, or image, begins there; only what belongs to the selected anchors is ever touched."""
    deltas = torch.empty(images, 4, side, side, dtype=torch.float16, device=DEVICE, memory_format=memory_format)
    assert 3 * deltas.numel() // 4 > 2**31
    deltas[-1, :, -1, -2] = torch.tensor([0.5, -0.25, 0, -100]).to(DEVICE)
    indices = torch.full((images, 1, 1), -1)
    indices[-1] = side * side - 2
    case = Case(
        [deltas],
        [torch.tensor([[-4.0, -8, 4, 8]])],
        [(2, 1)],
        indices,
        torch.ones(images, 1, 1),
        torch.full((images, 2), 2 * side),
    )
    found, valid = proposals(case, min_size=0.0)
    x, y = side - 2 + 4, 2 * (side - 1) - 4
    assert valid.flatten().tolist() == [False] * (images - 1) + [True]
    assert found[-1, 0, 0].tolist() == [x - 4, y, x + 4, y]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_proposals(impl: ops.Impl) -> None:
    case = plain_case([[1.0, 2, 7, 9]])
    none = torch.zeros(1, 1, 0, dtype=torch.int64)
    found, valid = proposals(case._replace(indices=none, scores=none.float()), impl)
    assert (found.shape, valid.shape) == ((1, 1, 0, 4), (1, 1, 0))
    no_images = case._replace(indices=none.view(0, 1, 1), deltas=[torch.zeros(0, 4, 1, 1)], sizes=torch.zeros(0, 2))
    assert proposals(no_images, impl, scored=False)[0].shape == (0, 1, 1, 4)


def test_levels_without_anchors() -> None:
    """Of no cells, of no anchors per cell; or no levels at all, which the operator takes."""
    case = plain_case([[1.0, 2, 7, 9]])
    none = torch.zeros(1, 0, 1, dtype=torch.int64, device=DEVICE)
    sizes, limits = case.sizes.to(DEVICE), {"min_size": 0.0, "min_score": 0.0, "weights": ONES}
    assert library.decode_proposals([], none, [], [], sizes, **limits)[1].shape == (1, 0, 1)
    for deltas, base in ((torch.zeros(1, 4, 0, 0), torch.ones(1, 4)), (torch.zeros(1, 0, 2, 2), torch.ones(0, 4))):
        found, valid = proposals(case._replace(deltas=[deltas], base_anchors=[base]))
        assert not found.any()
        assert not valid.any()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_proposals_are_float32_at_least(dtype: torch.dtype) -> None:
    """Deltas of 16 bits are decoded in float32, as if they had been given so."""
    case = plain_case([[-8.0, -8, 8, 8], [-16, -4, 16, 4]])
    deltas = torch.randn(1, 8, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    indices = torch.arange(24).view(1, 1, -1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow, widened = (case._replace(deltas=[x], indices=indices) for x in (deltas, deltas.to(wide)))
    for impl in IMPLEMENTATIONS[: 1 if dtype == torch.float64 else 2]:
        found, expected = (proposals(x, impl, scored=False)[0] for x in (narrow, widened))
        assert found.dtype == wide
        assert torch.equal(found, expected)


@pytest.mark.parametrize("own_strides", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_opcheck(scored: bool, own_strides: bool) -> None:
    case = plain_case([[1.0, 2, 7, 9], [2, 1, 9, 7]])
    deltas, base = ([x.to(DEVICE) for x in level] for level in (case.deltas, case.base_anchors))
    scores = case.scores.to(DEVICE) if scored else None
    strides = torch.full((1, 1, 2), 8, device=DEVICE) if own_strides else None
    rest = ([8], [8], strides, case.sizes.to(DEVICE), 0.1, 0.5, [10.0, 10.0, 5.0, 5.0])
    operator = torch.ops.fastmrcnn.decode_proposals.default
    torch.library.opcheck(operator, (deltas, case.indices.to(DEVICE), scores, base, *rest))


def test_gradients_are_refused() -> None:
    case = plain_case([[1.0, 2, 7, 9]])
    case.deltas[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="use impl='reference'"):
        proposals(case)
    with torch.no_grad():
        proposals(case)
