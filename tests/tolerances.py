"""When a result counts as equal: error budgets, not tuned tolerances."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(found: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """`found` is as near to the float64 `oracle` as the `reference` run in the same dtype: at most twice its error.

    One rounding of the largest value is allowed beside it, for a reference that happens to be exact.
    """
    rounding = torch.finfo(found.dtype).eps * oracle.abs().amax().item() if oracle.numel() else 0.0
    budget = 2 * (reference.double() - oracle).abs().amax().item() + rounding if oracle.numel() else 0.0
    error = (found.double() - oracle).abs().amax().item() if oracle.numel() else 0.0
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"


def assert_exact_arithmetic(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal in float64 but for the order of additions: 1e-12 of `scale`, the size of the numbers that are added."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * scale)
