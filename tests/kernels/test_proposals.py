"""Top-k of anchors and the merging of levels: the kernels against the reference, and that against plain sorts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, examples, features
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels.triton import topk as triton_topk

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, in the interpreter, of NaN scores
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0]


def sorted_anchors(logits: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The definition, level by level: anchors a of cell (y, x) in the order y, x, a; a stable sort; padding."""
    scores, indices = [], []
    for level in logits:
        flat = level.float().permute(0, 2, 3, 1).flatten(1)
        order = torch.where(flat.isnan(), -torch.inf, flat).sort(dim=1, descending=True, stable=True).indices[:, :k]
        missing = k - order.shape[1]
        scores.append(torch.nn.functional.pad(flat.gather(1, order), (0, missing), value=-torch.inf))
        indices.append(torch.nn.functional.pad(order, (0, missing), value=-1))
    return torch.stack(scores, dim=1), torch.stack(indices, dim=1)


def check_topk(logits: Sequence[Tensor], k: int, impl: ops.Impl) -> None:
    found = ops.topk_anchors([x.to(DEVICE) for x in logits], k, impl=impl)
    for a, b in zip(found, sorted_anchors(logits, k), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@st.composite
def heads(draw: st.DrawFn) -> list[Tensor]:
    """Logits of one to three levels: of any layout, often tied, some of them not numbers."""
    dtype = draw(st.sampled_from(DTYPES))
    first = draw(features(dtype))
    levels = [first]
    for _ in range(draw(st.integers(0, 2))):
        other = draw(features(dtype))
        levels.append(other[:1].expand(len(first), *other.shape[1:]))
    if draw(st.booleans()):
        levels = [x.round() for x in levels]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        odd = torch.tensor(SPECIAL, dtype=dtype)
        for i, level in enumerate(levels):
            chosen = odd[torch.randint(0, 5, level.shape, generator=generator)]
            levels[i] = torch.where(torch.rand(level.shape, generator=generator) < 0.2, chosen, level)
    return levels


@given(logits=heads(), k=st.integers(0, 300))
def test_reference_is_a_stable_sort(logits: list[Tensor], k: int) -> None:
    check_topk(logits, k, "reference")


@contextmanager
def anchors_per_program(count: int) -> Iterator[None]:
    before, triton_topk.BLOCK = triton_topk.BLOCK, count
    try:
        yield
    finally:
        triton_topk.BLOCK = before


@examples(100, interpreted=10)
@given(logits=heads(), k=st.integers(0, 150), block=st.sampled_from([128, 2048]))
def test_kernel_is_a_stable_sort(logits: list[Tensor], k: int, block: int) -> None:
    """However many programs share a level."""
    with anchors_per_program(block):
        check_topk(logits, k, "triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("value", [0.0, -3.0, torch.nan])
def test_equal_scores_by_number(impl: ops.Impl, value: float) -> None:
    """Of 1,530 equal anchors in twelve programs, the first 700."""
    logits = torch.full((1, 3, 10, 51), value, device=DEVICE)
    with anchors_per_program(128):
        _, indices = ops.topk_anchors([logits], 700, impl=impl)
    assert torch.equal(indices[0, 0].cpu(), torch.arange(700))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_numbers(dtype: torch.dtype) -> None:
    """Of every exponent, both signs, and zeros: all bits of the keys matter."""
    bits = torch.arange(-(1 << 15), 1 << 15, 7, dtype=torch.int16)
    if dtype == torch.float32:
        high = bits.to(torch.int32) << 16
        values = torch.cat((high, high + 1, high + 255)).view(torch.float32)
    else:
        values = bits.view(dtype)
    generator = torch.Generator().manual_seed(0)
    values = values[torch.randperm(len(values), generator=generator)]
    check_topk([values.view(1, 1, 1, -1)], 1000, "triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_to_select(impl: ops.Impl) -> None:
    logits = [torch.rand(2, 3, 4, 5, device=DEVICE), torch.rand(2, 3, 0, 5, device=DEVICE)]
    assert ops.topk_anchors(logits, 0, impl=impl)[0].shape == (2, 2, 0)
    assert (ops.topk_anchors(logits, 7, impl=impl)[1][:, 1] == -1).all()
    assert ops.topk_anchors([x[:0] for x in logits], 7, impl=impl)[1].shape == (0, 2, 7)


@st.composite
def kept_boxes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores (often tied), kept slots in order of score, and counts, for a few levels; garbage is not kept."""
    images, levels, slots = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 60))
    most = draw(st.integers(1, slots))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(images, levels, slots, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 4).round() / 4
    boxes = torch.rand(images, levels, slots, 4, generator=generator)
    counts = torch.randint(0, most + 1, (images, levels), generator=generator)
    order = scores.sort(dim=2, descending=True, stable=True).indices[:, :, :most]
    kept = torch.where(torch.arange(most) < counts[..., None], order, -1)
    used = torch.zeros(images, levels, slots + 1, dtype=torch.bool).scatter(2, kept % (slots + 1), True)[..., :slots]
    return torch.where(used[..., None], boxes, torch.nan), torch.where(used, scores, torch.inf), kept, counts


def check_merged(case: tuple[Tensor, Tensor, Tensor, Tensor], max_keep: int, impl: ops.Impl) -> None:
    boxes, scores, kept, counts = case
    found = [x.cpu() for x in ops.merge_levels(*(x.to(DEVICE) for x in case), max_keep, impl=impl)]
    for i in range(len(boxes)):
        slots = [
            (level, int(slot)) for level in range(len(kept[i])) for slot in kept[i, level, : int(counts[i, level])]
        ]
        slots.sort(key=lambda at: -float(scores[i, at[0], at[1]]))  # stable
        slots = slots[:max_keep]
        assert found[2][i] == len(slots)
        padding = max_keep - len(slots)
        assert found[0][i].tolist() == [boxes[i, a, b].tolist() for a, b in slots] + [[0.0] * 4] * padding
        assert found[1][i].tolist() == [float(scores[i, a, b]) for a, b in slots] + [0.0] * padding


@given(case=kept_boxes(), share=st.floats(0, 1))
def test_reference_merges_levels(case: tuple[Tensor, Tensor, Tensor, Tensor], share: float) -> None:
    check_merged(case, int(share * case[2][0].numel()), "reference")


@examples(100, interpreted=10)
@given(case=kept_boxes(), share=st.floats(0, 1))
def test_kernel_merges_levels(case: tuple[Tensor, Tensor, Tensor, Tensor], share: float) -> None:
    check_merged(case, int(share * case[2][0].numel()), "triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: programs that race")
def test_topk_is_deterministic() -> None:
    logits = [torch.randn(4, 3, *shape, device=DEVICE).half() for shape in ((200, 336), (50, 84))]
    expected = ops.topk_anchors(logits, 2000)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(ops.topk_anchors(logits, 2000), expected, strict=True))
