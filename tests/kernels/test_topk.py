"""Top-k against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmrcnn_kernels.reference.topk import stable_topk

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan]


def sorted_indices(scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), -torch.inf, scores).sort(dim=-1, descending=True, stable=True).indices


@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=True),
            st.sampled_from(SPECIAL),
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
    expected = sorted_indices(scores)[:, :k]
    assert torch.equal(indices, expected)
    torch.testing.assert_close(found, scores.gather(1, expected), rtol=0, atol=0, equal_nan=True)


def test_topk_of_many_ties() -> None:
    scores = torch.randint(0, 3, (2, 100_000), generator=torch.Generator().manual_seed(0)).float()
    _, indices = stable_topk(scores, 50_000)
    assert torch.equal(indices, sorted_indices(scores)[:, :50_000])


def test_order_of_special_values() -> None:
    """NaN ties with -inf, the zeros tie with each other, and subnormal numbers are numbers."""
    scores = torch.tensor([torch.nan, -0.0, -torch.inf, 0.0, torch.inf, 1e-45, -1e-45, -0.0])
    values, indices = stable_topk(scores, 8)
    assert indices.tolist() == [4, 5, 1, 3, 7, 6, 0, 2]
    assert torch.equal(values[:-2], scores[indices[:-2]])
    assert values[-2].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(0)).double().add(1e-12).to(dtype)
    values, indices = stable_topk(scores, 77)
    assert values.dtype == dtype
    assert torch.equal(indices, sorted_indices(scores)[..., :77])
    assert torch.equal(values, scores.gather(-1, indices))


def test_float64_is_not_rounded() -> None:
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)  # the same number in float32
    assert stable_topk(close, 2)[1].tolist() == [1, 0]


def test_strided_scores() -> None:
    scores = torch.randint(0, 5, (40, 3), generator=torch.Generator().manual_seed(1)).float().mT
    assert torch.equal(stable_topk(scores, 11)[1], sorted_indices(scores)[:, :11])
