"""Batch statistics of padded batches: the padding must not count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fastmrcnn.batches import widen


@contextmanager
def ignoring_padding(valid: Tensor, *modules: nn.Module) -> Iterator[None]:
    """Within it, training batch norms in `modules` take mean and variance over the `valid` rows of their input alone.

    `valid` [N, K] marks the used rows of the [N K, ...] batch the modules are called with.  Without such norms (frozen
    ones, evaluation) this does nothing.
    """
    if any(isinstance(m, _BatchNorm) and m.training for module in modules for m in module.modules()):
        with _WeightedBatchNorm(valid.flatten()):
            yield
    else:
        yield


class _WeightedBatchNorm(TorchFunctionMode):
    """Replaces `torch.nn.functional.batch_norm`, which every batch norm module calls."""

    def __init__(self, valid: Tensor) -> None:
        super().__init__()
        self.valid = valid

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.batch_norm:
            return weighted_batch_norm(self.valid, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def weighted_batch_norm(
    valid: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` whose statistics leave out the rows of `input` [R, C, ...] not `valid` [R]."""
    if not training:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    spatial = (1,) * (input.dim() - 2)
    rows = valid.view(-1, 1, *spatial)
    over = (0, *range(2, input.dim()))
    values = widen(torch.where(rows, input, 0))
    count = valid.sum() * (input[0, 0].numel() if input.dim() > 2 else 1)
    mean = values.sum(dim=over) / count.clamp(min=1)
    centred = torch.where(rows, values - mean.view(1, -1, *spatial), 0)
    var = centred.square().sum(dim=over) / count.clamp(min=1)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            rate = torch.where(count > 1, momentum, 0.0)  # no rows, no news
            running_mean.lerp_(mean.to(running_mean.dtype), rate.to(running_mean.dtype))
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), rate.to(running_var.dtype))
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (input * scale.view(1, -1, *spatial) + shift.view(1, -1, *spatial)).to(input.dtype)
