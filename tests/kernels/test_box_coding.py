"""The kernels of box coding against the reference and its float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, boxes, examples, ordered
from tolerances import assert_within_budget
from torch import Tensor

from fastmrcnn_kernels.library import boxes as library
from fastmrcnn_kernels.reference.boxes import decode_deltas, encode_deltas

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of NaN boxes

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


@examples(200, interpreted=50)
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


@examples(200, interpreted=50)
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


@examples(200, interpreted=50)
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


def test_no_boxes() -> None:
    for shape in ((0, 4), (2, 0, 4), (0, 3, 4)):
        empty = torch.zeros(shape, dtype=torch.float16)
        assert decode(empty, empty.float(), ONES).shape == shape
        assert encode(empty.float(), empty.float()).dtype == torch.float32
    assert decode(torch.zeros(3, 0, 4), torch.zeros(3, 4), ONES).shape == (3, 0, 4)
    assert encode(torch.zeros(0, 3, 4), torch.zeros(1, 3, 4)).shape == (0, 3, 4)


def test_opcheck() -> None:
    found = ordered(torch.rand(2, 3, 4, device=DEVICE), 0.1)
    anchors = found[:, :1].expand(2, 3, 4)
    weights = [10.0, 10.0, 5.0, 5.0]
    torch.library.opcheck(torch.ops.fastmrcnn.decode_boxes.default, (found.half(), found[:, 0], weights))
    torch.library.opcheck(torch.ops.fastmrcnn.encode_boxes.default, (found, anchors, weights))


def test_gradients_are_refused() -> None:
    found, leaf = torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)
    refused: list[Callable[[], object]] = [
        lambda: decode(leaf, found, ONES),
        lambda: decode(found, leaf, ONES),
        lambda: encode(leaf, found),
        lambda: encode(found, leaf),
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
