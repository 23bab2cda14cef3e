"""The norms of a network: of which kind they are, and that those of layers that do not learn keep still."""

from __future__ import annotations

from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen", "batch", "sync", "group"]

AnyBatchNorm: TypeAlias = FrozenBatchNorm2d | _BatchNorm

LEAST_EPS = 1e-5
"""Of norms with statistics of their own: torchvision's COCO weights have 0, which divides by zero where an input is
constant."""

MOST_GROUPS = 32


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, frozen or not."""
    return isinstance(module, FrozenBatchNorm2d | _BatchNorm)


def replace_norms(network: nn.Module, kind: Norm) -> None:
    """Replace every batch norm in `network`, frozen or not, by one of `kind`, see `converted`.

    Those behind a convolution that does not learn become frozen ones, whatever `kind` says: what a stage computes does
    not change, then, while it is kept as it is (detectron2's FREEZE_AT does the same).
    """
    for parent in list(network.modules()):
        before: nn.Module | None = None
        for name, child in list(parent.named_children()):
            if is_batch_norm(child):
                weights = [] if before is None else list(before.parameters())
                still = bool(weights) and not any(weight.requires_grad for weight in weights)
                setattr(parent, name, converted(cast(AnyBatchNorm, child), "frozen" if still else kind))
            before = child


def converted(norm: AnyBatchNorm, kind: Norm) -> nn.Module:
    """A norm of `kind` in the place of `norm`, with its weight and bias, and where it has any, its statistics.

    "frozen" is torchvision's `FrozenBatchNorm2d`, whose tensors never change; "batch" and "sync" are PyTorch's, the
    latter with statistics over all processes; "group" is `GroupNorm` (Wu and He, 2018) of the most groups that divide
    the channels, up to 32.  eps is kept, but all except frozen ones have at least 1e-5.
    """
    assert isinstance(norm.weight, Tensor)
    channels, eps, least = len(norm.weight), norm.eps, max(norm.eps, LEAST_EPS)
    new: nn.Module
    if kind == "frozen":
        new = FrozenBatchNorm2d(channels, eps=eps)
    elif kind == "batch":
        new = nn.BatchNorm2d(channels, eps=least)
    elif kind == "sync":
        new = nn.SyncBatchNorm(channels, eps=least)
    else:
        groups = max(count for count in range(1, MOST_GROUPS + 1) if channels % count == 0)
        new = nn.GroupNorm(groups, channels, eps=least)
    if isinstance(norm, _BatchNorm) and isinstance(new, _BatchNorm):
        new.momentum = norm.momentum
    new = new.to(norm.weight).train(norm.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (value := getattr(new, name, None)) is not None:
                value.copy_(getattr(norm, name))
    return new
