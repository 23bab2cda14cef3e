"""Torchvision's modules, continued by ours: same parameters, same attributes, other flow."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Adopted = TypeVar("Adopted", bound=nn.Module)


def adopt(module: nn.Module, ours: type[Adopted]) -> Adopted:
    """`module`, an instance of the torchvision class that `ours` derives from, as an instance of `ours`.

    Both share all state: parameters, buffers, submodules, options.  Deriving from torchvision's classes and taking over
    what their constructors built keeps every argument, default, check and `state_dict` key theirs.
    """
    if isinstance(module, ours):
        return module
    if type(module) not in ours.__mro__:
        raise TypeError(f"cannot run a {type(module).__name__} as {ours.__name__}: it may compute something else")
    adopted = ours.__new__(ours)
    adopted.__dict__ = module.__dict__
    return adopted
