"""Torchvision's modules, continued by ours: same parameters, same attributes, other flow."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher

Adopted = TypeVar("Adopted", bound=nn.Module)

STILL_CALLED = {"pre_nms_top_n", "post_nms_top_n", "has_mask", "torch_choice", "max_by_axis", "batch_images"}
"""Methods of torchvision's flow that ours calls in the same places: who overrides them gets what they want."""

OWNED = (dict, list, set, BoxCoder, Matcher, BalancedPositiveNegativeSampler)
"""What holds options, not state: a continued module has copies, so that setting one leaves the other as it is."""

JOINED: dict[tuple[type, type], Any] = {}
"""Classes that `joined` has made."""


def adopt(module: object, ours: type[Adopted], name: str = "module") -> Adopted:
    """`module`, of the torchvision class that `ours` derives from, as an `ours`; itself if it is one already.

    The result is a new object that shares submodules, parameters and buffers with `module`, which stays as it is; its
    options and mode are copies.  Deriving from torchvision's classes and taking over what their constructors built
    keeps every argument, default, check and `state_dict` key theirs.

    A class derived from torchvision's may add what it likes, and the result is an instance of it, too.  What it may
    not do is to override a part of the flow, since ours would not call that.

    Raises:
        TypeError: `module`, called `name` in the message, is of another class, or overrides the flow.
    """
    if isinstance(module, ours):
        return module
    theirs = next(base for base in ours.__mro__ if base.__module__.startswith("torchvision."))
    require(module, theirs, methods(theirs, "torchvision.") - STILL_CALLED | methods(ours, "fastmrcnn."), name)
    adopted = object.__new__(ours if type(module) is theirs else joined(type(module), ours))
    for key, value in vars(module).items():
        if key != "_compiled_call_impl":  # it is bound to `module`
            vars(adopted)[key] = copy.copy(value) if isinstance(value, OWNED) else value
    return adopted


def require(part: object, theirs: type, names: Iterable[str], name: str) -> None:
    """Raise TypeError unless `part`, called `name` in messages, is a `theirs` that has all methods `names` from there.

    Methods that a class of its own defines, or that were set in the object itself, are what our flow would not call.
    So is `__call__`.
    """
    found = f"{name} is {describe(part)}"
    if not isinstance(part, theirs):
        raise TypeError(f"{found}: expected torchvision's {theirs.__name__}, or a subclass that keeps its methods")
    own = [base for base in type(part).__mro__ if base not in theirs.__mro__]
    if any(base.__module__.startswith("torch.") for base in own):
        raise TypeError(f"{found}, which PyTorch made of it: pass the module as it was, and do that afterwards")
    scopes = [*map(vars, own), vars(part)]
    if isinstance(part, nn.Module):
        scopes += [part._modules, part._parameters, part._buffers]
    if changed := sorted(method for method in {*names, "__call__"} if any(method in scope for scope in scopes)):
        raise TypeError(
            f"{found} with {', '.join(changed)} of its own: expected the methods of torchvision's {theirs.__name__}, "
            "since others are not called, or collide with ours"
        )


def describe(part: object) -> str:
    """The type of `part` in the words of a message."""
    return "None" if part is None else f"a {type(part).__name__}"


def methods(own: type, package: str) -> set[str]:
    """Names of the methods, other than `__init__` and its like, that the class `own` has from those of a `package`."""
    return {
        name
        for base in own.__mro__
        if base.__module__.startswith(package)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and not name.startswith("__")
    }


def joined(own: type, ours: type[Adopted]) -> type[Adopted]:
    """The class `own`, derived from torchvision's, with the flow of `ours`; always the same one."""

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return blank, (own, ours), self.__getstate__()

    if (own, ours) not in JOINED:
        contents = {"__module__": own.__module__, "__doc__": own.__doc__, "__reduce_ex__": reduce}
        JOINED[own, ours] = types.new_class(own.__name__, (ours, own), exec_body=lambda scope: scope.update(contents))
    return JOINED[own, ours]


def blank(own: type, ours: type[Adopted]) -> Adopted:
    """An object of a joined class, without state: what unpickling begins with, since no module has that class."""
    return object.__new__(joined(own, ours))
