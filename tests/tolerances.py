"""When a result counts as equal: error budgets, not tuned tolerances."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(found: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """`found` is as near to the float64 `oracle` as the `reference` run in the same dtype: at most twice its error.

    One rounding of the largest value is allowed beside it, for a reference that happens to be exact.
    """
    assert found.dtype == reference.dtype
    assert found.shape == reference.shape == oracle.shape
    if oracle.numel() == 0:
        return
    rounding = torch.finfo(found.dtype).eps * oracle.abs().amax().item()
    budget = 2 * (reference.double() - oracle).abs().amax().item() + rounding
    error = (found.double() - oracle).abs().amax().item()
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"


def assert_exact_arithmetic(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal in float64 but for the order of additions: 1e-12 of `scale`, the size of the numbers that are added."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * scale)


def assert_same_decisions(found: Tensor, expected: Tensor, margin: Tensor, band: float, flips: float = 0.01) -> None:
    """Bool `found` is `expected` wherever the decided value is further than `band` from its threshold.

    `margin` is that distance.  Within the band a share of at most `flips` of all decisions may differ.
    """
    assert found.dtype == expected.dtype == torch.bool
    differs = found != expected
    interior = differs & (margin > band)
    assert not interior.any(), f"{int(interior.sum())} decisions differ, by up to {margin[interior].max():.3g}"
    assert differs.sum() <= flips * differs.numel(), f"{int(differs.sum())} of {differs.numel()} decisions differ"
