"""That a result is another one is noticed, if it is by one bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import repeats


def test_differing() -> None:
    results = iter([0.0, 0.0, -0.0, torch.nan, 0.0, 1.0])
    seen: list[int] = []

    def call() -> Sequence[Tensor]:
        return [torch.ones(3), torch.tensor([2.0, next(results)])]

    assert repeats.differing(call, 5, seen.append) == 3
    assert seen == [0, 1, 2, 3, 4]


def test_nothing_differs_if_nan_stays() -> None:
    assert repeats.differing(lambda: [torch.tensor([torch.nan]), torch.tensor([True])], 3, lambda _: None) == 0


def test_gradients() -> None:
    leaf = torch.tensor([1.0, 2.0])
    call = repeats.gradients(lambda maps: maps * 3, leaf)
    (first,), (second,) = call(), call()
    assert torch.equal(first, second)
    assert (first / 3).abs().sum() > 0
