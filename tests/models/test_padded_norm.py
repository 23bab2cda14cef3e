"""Batch statistics leave out the padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastmrcnn.models.padded_norm import ignoring_padding, weighted_batch_norm


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
@pytest.mark.parametrize("rows", [[0, 2, 5], [3], [0, 1, 2, 3, 4, 5]])
def test_equals_the_norm_of_the_valid_rows(shape: tuple[int, ...], rows: list[int]) -> None:
    if len(shape) == 2 and len(rows) == 1:
        rows = [1, 4]  # one value per channel has no variance: torch refuses
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    valid = torch.zeros(6, dtype=torch.bool)
    valid[rows] = True
    running = [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    expected_running = [value.clone() for value in running]

    found = weighted_batch_norm(valid, x, *running, weight, bias, True, 0.3, 1e-5)[rows]
    expected = functional.batch_norm(x[rows], *expected_running, weight, bias, True, 0.3, 1e-5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(running, expected_running)
    scale = torch.randn_like(found)
    inputs = (x, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad((found * scale).sum(), inputs), torch.autograd.grad((expected * scale).sum(), inputs)
    )


def test_no_row_is_no_news() -> None:
    running = [torch.full((3,), 2.0), torch.full((3,), 5.0)]
    x = torch.full((4, 3, 2, 2), torch.nan)
    weighted_batch_norm(torch.zeros(4, dtype=torch.bool), x, *running, training=True)
    assert running[0].tolist() == [2.0] * 3
    assert running[1].tolist() == [5.0] * 3


def test_norms_inside_modules() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    x, valid = torch.randn(4, 2, 5, 5), torch.tensor([[True, False], [True, False]])
    with ignoring_padding(valid, head):
        found = head(x)[[0, 2]]
    mean, counted = head[1].running_mean.clone(), head[1].num_batches_tracked.clone()
    head[1].reset_running_stats()
    torch.testing.assert_close(found, head(x[[0, 2]]))
    torch.testing.assert_close(mean, head[1].running_mean)
    assert counted == 1
    head.eval()
    with ignoring_padding(valid, head):
        assert torch.equal(head(x), head(x))
