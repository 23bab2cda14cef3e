"""The kernels of box coding against the reference, its float64 oracle, and torchvision's whole pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torchvision
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import boxes, ordered
from tolerances import assert_same_decisions, assert_within_budget
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fastmrcnn_kernels.library import boxes as library
from fastmrcnn_kernels.reference.boxes import anchors_at, clip_boxes, decode_deltas, encode_deltas, large_enough

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of NaN boxes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 200 if torch.cuda.is_available() else 50  # the interpreter takes 5 ms per program and more
PHASES = tuple(Phase) if torch.cuda.is_available() else (Phase.explicit, Phase.generate)  # shrinking takes minutes
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONES = (1.0, 1.0, 1.0, 1.0)
WEIGHTS = st.sampled_from([ONES, (10.0, 10.0, 5.0, 5.0), (3.0, 7.0, 2.0, 11.0)])
HOSTILE = [torch.nan, torch.inf, -torch.inf, 300.0, -300.0]
EPS = torch.finfo(torch.float32).eps


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """The kernel's boxes, on the CPU: there the reference divides by its weights, on a GPU it multiplies."""
    return library.decode_boxes(deltas.to(DEVICE), anchors.to(DEVICE), weights).cpu()


def encode(found: Tensor, anchors: Tensor, weights: Sequence[float] = ONES) -> Tensor:
    return library.encode_boxes(found.to(DEVICE), anchors.to(DEVICE), weights).cpu()


def assert_identical(found: Tensor, expected: Tensor) -> None:
    """Bit by bit, NaN for NaN."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_as_good(found: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """Within the budget where the reference is finite; NaN for NaN and infinity for infinity elsewhere."""
    finite = reference.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert_identical(found[~finite], reference[~finite])
    assert_within_budget(found[finite], reference[finite], oracle[finite])


@st.composite
def some_deltas(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor:
    """Deltas [*shape, 4], small ones or beyond the limit of growth, in dense or strided memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(*shape, 8, generator=generator) * draw(st.sampled_from([0.3, 8.0]))
    layout = draw(st.sampled_from(["dense", "strided", "reversed"]))
    values = values[..., ::2] if layout == "strided" else values[..., :4]
    values = values.to(dtype)
    return values.transpose(0, -1).contiguous().transpose(0, -1) if layout == "reversed" else values


@settings(max_examples=EXAMPLES, phases=PHASES)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), weights=WEIGHTS, classes=st.sampled_from([None, 1, 5]))
def test_decoding_equals_reference(
    data: st.DataObject, dtype: torch.dtype, weights: tuple[float, ...], classes: int | None
) -> None:
    """One anchor for each box, or for the boxes of all classes."""
    anchors = ordered(data.draw(boxes(12)).clamp(-500, 500)).view(2, 6, 4)
    deltas = data.draw(some_deltas(2, 6, *(() if classes is None else (classes,)), dtype=dtype))
    each = anchors if classes is None else anchors[:, :, None]
    reference = decode_deltas(deltas.float(), each, weights)
    found = decode(deltas, anchors, weights)
    assert_within_budget(found, reference, decode_deltas(deltas.double(), each.double(), weights))

    deltas[..., 2:] = 0  # nothing but exp may be rounded otherwise, and its value here is 1
    assert torch.equal(decode(deltas, anchors, weights), decode_deltas(deltas.float(), each, weights))


@settings(max_examples=EXAMPLES, phases=PHASES)
@given(data=st.data(), weights=WEIGHTS)
def test_decoding_hostile_input_equals_reference(data: st.DataObject, weights: tuple[float, ...]) -> None:
    """NaN, infinite and huge deltas; anchors without area, inverted, far away, not finite."""
    deltas = data.draw(some_deltas(12, dtype=torch.float32))
    anchors = data.draw(boxes(12, not_finite=True))
    for i in data.draw(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), max_size=6)):
        deltas[i] = data.draw(st.sampled_from(HOSTILE))
    oracle = decode_deltas(deltas.double(), anchors.double(), weights)
    assert_as_good(decode(deltas, anchors, weights), decode_deltas(deltas, anchors, weights), oracle)


def test_growth_is_limited() -> None:
    """To 62.5-fold, after division by the weights."""
    anchors = torch.tensor([[10.0, 20, 14, 28]])
    for growth in (21.0, 1e9, torch.inf):
        found = decode(torch.tensor([[0, 0, growth, growth]]), anchors, (1, 1, 5, 5))
        expected = torch.tensor([[12 - 125.0, 24 - 250, 12 + 125, 24 + 250]])
        assert_within_budget(found, expected, expected.double())


@settings(max_examples=EXAMPLES, phases=PHASES)
@given(a=boxes(12, not_finite=True), b=boxes(12, not_finite=True), weights=WEIGHTS, strided=st.booleans())
def test_encoding_equals_reference(a: Tensor, b: Tensor, weights: tuple[float, ...], strided: bool) -> None:
    """Boxes and anchors without area, inverted, far away and not finite: NaN for NaN, infinity for infinity."""
    if strided:
        a, b = a.repeat_interleave(2, dim=0)[::2], b.t().contiguous().t()
    found, reference = encode(a, b, weights), encode_deltas(a, b, weights)
    assert_identical(found[:, :2], reference[:, :2])
    assert_as_good(found[:, 2:], reference[:, 2:], encode_deltas(a.double(), b.double(), weights)[:, 2:])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_numbers_of_boxes(count: int) -> None:
    """Those of a block, and one more or less; three images share their anchors, or three classes."""
    generator = torch.Generator().manual_seed(count)
    start, size = torch.rand(2, 3, count, 2, generator=generator)
    found = torch.cat((start, start + size), dim=-1)
    anchors = torch.cat((start[:1] + 0.3, start[:1] + 0.3 + size[:1]), dim=-1)
    exact = encode_deltas(found.double(), anchors.double())
    for shared in (anchors, anchors[0], anchors.expand(3, -1, -1)):
        deltas = encode(found, shared)
        assert_within_budget(deltas, encode_deltas(found, anchors), exact)
    one = found[:, :1]
    assert_within_budget(encode(found, one), encode_deltas(found, one), encode_deltas(found.double(), one.double()))

    classes = deltas.transpose(0, 1)
    reference = decode_deltas(classes, anchors[0, :, None])
    exact = decode_deltas(classes.double(), anchors[0, :, None].double())
    assert_within_budget(decode(classes, anchors[0], ONES), reference, exact)


class Case(NamedTuple):
    """Maps, base anchors and strides per level; indices and scores [N, L, K]; sizes [N, 2]."""

    deltas: list[Tensor]
    base_anchors: list[Tensor]
    strides: list[tuple[int, int]]
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
    case: Case, *, scored: bool = True, min_size: float = 1e-3, min_score: float = 0.0, weights: Sequence[float] = ONES
) -> tuple[Tensor, Tensor]:
    """What the kernel makes of `case`, on the CPU."""
    found, valid = library.decode_proposals(
        [x.to(DEVICE) for x in case.deltas],
        case.indices.to(DEVICE),
        [x.to(DEVICE) for x in case.base_anchors],
        case.strides,
        case.sizes.to(DEVICE),
        scores=case.scores.to(DEVICE) if scored else None,
        min_size=min_size,
        min_score=min_score,
        weights=weights,
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
        levels.append(decode(flat.gather(1, index[..., None].expand(-1, -1, 4)), anchors, weights))
    exists = torch.stack(present, dim=1)
    return clip_boxes(torch.stack(levels, dim=1), case.sizes).masked_fill(~exists[..., None], 0), exists


@settings(max_examples=EXAMPLES, phases=PHASES)
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
    assert_identical(found, expected)
    usable = exists & large_enough(expected, min_size)
    assert torch.equal(valid, usable & (case.scores >= 0.3) if scored else usable)


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
    slots = 130  # more than a block, and than the second level of one case has
    indices = torch.full((3, 2, slots), -1)
    for i, level in enumerate(anchors):
        for image in range(3):
            best = torch.randperm(len(level))[:slots]
            indices[image, i, : len(best)] = best
    scores, size = torch.full(indices.shape, torch.nan), torch.tensor(images.image_sizes)
    case = Case(deltas, generator.cell_anchors, [(8, 16), (16, 16)], indices, scores, size)
    found, valid = proposals(case, scored=False, min_size=6.0)

    coder = BoxCoder(ONES)
    for i, image_size in enumerate(images.image_sizes):
        for j, (level, a, all_anchors) in enumerate(zip(deltas, counts, anchors, strict=True)):
            index = indices[i, j][indices[i, j] >= 0]
            assert not found[i, j, len(index) :].any()
            assert not valid[i, j, len(index) :].any()
            flat = level[i].view(a, 4, *level.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            expected, exact = (
                torchvision.ops.clip_boxes_to_image(coder.decode_single(x, y)[index], image_size)
                for x, y in ((flat, all_anchors), (flat.double(), all_anchors.double()))
            )
            assert_within_budget(found[i, j, : len(index)], expected, exact)
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


def test_what_is_just_large_enough_is_usable() -> None:
    """A side of exactly the least size, before or after clipping, and exactly the least score; NaN is not."""
    case = plain_case([[1.0, 1, 7, 9], [1, 1, 9, 7], [1, 1, 6.5, 9], [1, 1, 9, 6.5], [34, 24, 60, 60], [-9, 0, 6, 30]])
    assert proposals(case, min_size=6.0)[1].flatten().tolist() == [True, True, False, False, True, True]
    case = plain_case([[1.0, 1, 7, 9]] * 5, [0.25, 0.24, torch.nan, torch.inf, -torch.inf])
    assert proposals(case, min_score=0.25)[1].flatten().tolist() == [True, False, False, True, False]


def test_clipping_knows_height_from_width() -> None:
    found, valid = proposals(plain_case([[-50.0, -60, 500, 600], [35, -10, 90, 20], [-10, 25, 20, 90]]))
    assert found[0, 0].tolist() == [[0, 0, 40, 30], [35, 0, 40, 20], [0, 25, 20, 30]]
    assert valid.all()


def test_proposals_of_hostile_deltas() -> None:
    """NaN is unusable; infinite growth is limited to 62.5-fold, then clipped to the image."""
    case = plain_case([[16.0, 12, 24, 18]] * 3)
    case.deltas[0][0, 4] = torch.nan
    case.deltas[0][0, 10:] = torch.inf
    found, valid = proposals(case)
    assert valid.flatten().tolist() == [True, False, True]
    assert found[0, 0, 0].tolist() == [16, 12, 24, 18]
    assert found[0, 0, 1].isnan().tolist() == [True, False, True, False]
    assert found[0, 0, 2].tolist() == [0, 0, 40, 30]


def test_what_padding_holds_has_no_influence() -> None:
    case = plain_case([[1.0, 2, 7, 9], [2, 1, 9, 7]])
    found, valid = proposals(case)
    for garbage in (-1, 2, 2**31, 2**62, -(2**62)):
        for score in (torch.nan, torch.inf, 9e9):
            slots = torch.tensor([[[garbage, 0, garbage, 1, garbage]]])
            scores = torch.tensor([[[score, 1, score, 1, score]]])
            padded, usable = proposals(case._replace(indices=slots, scores=scores))
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


def test_no_boxes() -> None:
    for shape in ((0, 4), (2, 0, 4), (0, 3, 4)):
        empty = torch.zeros(shape, dtype=torch.float16)
        assert decode(empty, empty.float(), ONES).shape == shape
        assert encode(empty.float(), empty.float()).dtype == torch.float32
    assert decode(torch.zeros(3, 0, 4), torch.zeros(3, 4), ONES).shape == (3, 0, 4)
    assert encode(torch.zeros(0, 3, 4), torch.zeros(1, 3, 4)).shape == (0, 3, 4)


def test_no_proposals() -> None:
    case = plain_case([[1.0, 2, 7, 9]])
    none = torch.zeros(1, 1, 0, dtype=torch.int64)
    found, valid = proposals(case._replace(indices=none, scores=none.float()))
    assert (found.shape, valid.shape) == ((1, 1, 0, 4), (1, 1, 0))
    no_images = case._replace(indices=none.view(0, 1, 1), deltas=[torch.zeros(0, 4, 1, 1)], sizes=torch.zeros(0, 2))
    assert proposals(no_images, scored=False)[0].shape == (0, 1, 1, 4)
    no_levels = Case([], [], [], none.view(1, 0, 1), none.view(1, 0, 1).float(), case.sizes)
    assert proposals(no_levels)[1].shape == (1, 0, 1)
    for deltas, base in ((torch.zeros(1, 4, 0, 0), torch.ones(1, 4)), (torch.zeros(1, 0, 2, 2), torch.ones(0, 4))):
        found, valid = proposals(case._replace(deltas=[deltas], base_anchors=[base]))
        assert not found.any()
        assert not valid.any()


def operator_calls() -> list[tuple[object, tuple[object, ...]]]:
    """The three operators with small inputs, the last one with and without scores."""
    case = plain_case([[1.0, 2, 7, 9], [2, 1, 9, 7]])
    deltas, base = ([x.to(DEVICE) for x in level] for level in (case.deltas, case.base_anchors))
    index, scores, size = case.indices.to(DEVICE), case.scores.to(DEVICE), case.sizes.to(DEVICE)
    found = ordered(torch.rand(2, 3, 4, device=DEVICE), 0.1)
    anchors = found[:, :1].expand(2, 3, 4)
    weights = [10.0, 10.0, 5.0, 5.0]
    return [
        (torch.ops.fastmrcnn.decode_boxes.default, (found.half(), found[:, 0], weights)),
        (torch.ops.fastmrcnn.encode_boxes.default, (found, anchors, weights)),
        (torch.ops.fastmrcnn.decode_proposals.default, (deltas, index, None, base, [8], [8], size, 0.1, 0.0, weights)),
        (
            torch.ops.fastmrcnn.decode_proposals.default,
            (deltas, index, scores, base, [8], [8], size, 0.1, 0.5, weights),
        ),
    ]


@pytest.mark.parametrize("call", range(4))
def test_opcheck(call: int) -> None:
    operator, arguments = operator_calls()[call]
    torch.library.opcheck(operator, arguments)


def test_gradients_are_refused() -> None:
    found, leaf = torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)
    case = plain_case([[1.0, 2, 7, 9]])
    refused: list[Callable[[], object]] = [
        lambda: decode(leaf, found, ONES),
        lambda: decode(found, leaf, ONES),
        lambda: encode(leaf, found),
        lambda: encode(found, leaf),
        lambda: proposals(case._replace(deltas=[case.deltas[0].requires_grad_()])),
    ]
    for call in refused:
        with pytest.raises(NotImplementedError, match="use impl='reference'"):
            call()
        with torch.no_grad():
            call()


def test_compile_without_graph_breaks() -> None:
    def coded(found: Tensor, anchors: Tensor) -> Tensor:
        return library.decode_boxes(library.encode_boxes(found, anchors, ONES), anchors, ONES) + 1

    found = torch.rand(2, 5, 4, device=DEVICE)
    anchors = ordered(found, 0.5)
    compiled = torch.compile(coded, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(found, anchors), coded(found, anchors))
