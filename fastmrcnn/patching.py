"""torchvision's operations replaced by ours, in a program that knows nothing of it.

A program keeps references to what it calls: `from torchvision.ops import nms` makes one.  So every module is looked
through, and each reference to one of torchvision's functions becomes one to its replacement, which calls ours, or
torchvision's where ours cannot do what torchvision's can.  Modules of this package are left out: what they call of
torchvision is torchvision's, or it would go round in circles.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.ops import poolers as torchvision_poolers

from fastmrcnn import ops
from fastmrcnn_kernels.host import KERNEL_DEVICES

Function = Callable[..., Any]

OWN_PACKAGES = ("fastmrcnn", "fastmrcnn_kernels")

REPLACEMENTS: dict[Function, Function] = {}
"""What takes the place of each of torchvision's functions."""

_lock = threading.RLock()
_in_force = 0
"""How many patches are in force, of all threads: modules are the same for all."""


def patch_torchvision() -> TorchvisionPatch:
    """Let torchvision's operations be ours, for the rest of the program or a block of it.

        fastmrcnn.patch_torchvision()  # from here on

        with fastmrcnn.patch_torchvision():  # within the block
            ...

    `roi_align`, `nms`, `batched_nms`, `paste_masks_in_image` and what `MultiScaleRoIAlign` does become those of
    `fastmrcnn.ops`: in torchvision itself, hence in its detectors and in `RoIAlign`, and in every module that has
    imported one of them.  Poolers that exist already are included, with the scales that they have stored.

    Signatures, dtypes, gradients and memory layout of results stay torchvision's, and what ours does not take goes to
    torchvision: integers, quantized tensors, subclasses of Tensor, other devices, bad arguments.  So does all that is
    compiled or traced (torch.compile, torch.jit, export, functorch).  Calls of `torch.ops.torchvision` stay as they
    are, and so do references that are no global of a module, but held by a class, a closure or an object.

    A patch holds for all threads of the process.  Several may be in force, and end in any order: with the last one
    torchvision's own functions are back.  A reference that was made in between, and is kept, then calls them, too.

    Returns:
        The patch, in force: a context manager, whose method `undo` ends it.
    """
    return TorchvisionPatch()


class TorchvisionPatch:
    """torchvision's operations are ours, from its making to `undo`, or to the end of its block."""

    def __init__(self) -> None:
        self._applied = False
        self._blocks = 0
        self._apply()

    def __enter__(self) -> TorchvisionPatch:
        with _lock:
            self._blocks += 1
            self._apply()
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            self._blocks -= 1
            if not self._blocks:
                self.undo()

    def undo(self) -> None:
        """End this patch; nothing, if it has ended."""
        global _in_force
        with _lock:
            if self._applied:
                self._applied = False
                _in_force -= 1
                if not _in_force:
                    _exchange({ours: theirs for theirs, ours in REPLACEMENTS.items()})

    def _apply(self) -> None:
        global _in_force
        with _lock:
            if not self._applied:
                if not _in_force:
                    _exchange(REPLACEMENTS)
                self._applied = True
                _in_force += 1


def _exchange(functions: Mapping[Function, Function]) -> None:
    """Replace those `functions` that are globals of a module, wherever, by their values."""
    by_identity = {id(old): new for old, new in functions.items()}  # a global may be anything, and slow to compare
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] not in OWN_PACKAGES:
            for key, value in list(vars(module).items()):
                if id(value) in by_identity:
                    vars(module)[key] = by_identity[id(value)]


def _replaces(theirs: Function) -> Callable[[Function], Function]:
    """Make a function the replacement of `theirs`, which still does what that function rejects."""

    def register(ours: Function) -> Function:
        @functools.wraps(theirs)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if _in_force and _is_eager():
                with suppress(NotImplementedError, TypeError, ValueError):
                    return ours(*args, **kwargs)
            return theirs(*args, **kwargs)  # if that is wrong, too, it is said in torchvision's words

        # What torch.jit.script compiles in its place.
        replacement.__prepare_scriptable__ = lambda: theirs  # type: ignore[attr-defined]
        REPLACEMENTS[theirs] = replacement
        return ours

    return register


def _is_eager() -> bool:
    """Whether functions run as they are called, and are not compiled, traced or transformed."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def _check_tensors(*tensors: object) -> None:
    """Raise unless ours computes with `tensors`: plain ones, all on one device, which it knows."""
    plain = [t for t in tensors if isinstance(t, Tensor) and type(t) in (Tensor, nn.Parameter) and not t.is_quantized]
    devices = {t.device for t in plain}
    if len(plain) < len(tensors) or len(devices) != 1 or devices.pop().type not in KERNEL_DEVICES:
        raise NotImplementedError


def _check_gradients(features: Sequence[Tensor], boxes: Sequence[Tensor]) -> None:
    """Raise if boxes alone want a gradient.  None ever reaches them, but torchvision's result still asks for one."""
    learn = [any(t.requires_grad for t in tensors) for tensors in (features, boxes)]
    if torch.is_grad_enabled() and learn == [False, True]:
        raise NotImplementedError


@_replaces(torchvision.ops.roi_align)
def _roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    each = [boxes] if isinstance(boxes, Tensor) else boxes
    _check_tensors(input, *each)
    _check_gradients([input], each)
    # torchvision's result can be viewed in any way; ours is channels_last where that is faster.
    return ops.roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned).contiguous()


def _multiscale_roi_align(
    x_filtered: Sequence[Tensor],
    boxes: Sequence[Tensor],
    output_size: Sequence[int],
    sampling_ratio: int,
    scales: Sequence[float],
    mapper: Callable[[Sequence[Tensor]], Tensor],
) -> Tensor:
    """What `MultiScaleRoIAlign` does once it knows its scales."""
    if len(x_filtered) == 1:
        raise NotImplementedError  # this is `roi_align`, which does not ask for levels
    _check_tensors(*x_filtered, *boxes)
    _check_gradients(x_filtered, boxes)
    levels = mapper(boxes)
    return ops.multilevel_roi_align(x_filtered, boxes, output_size, scales, sampling_ratio, levels=levels).contiguous()


if hasattr(torchvision_poolers, "_multiscale_roi_align"):  # a detail of torchvision's; without it, level by level
    _replaces(torchvision_poolers._multiscale_roi_align)(_multiscale_roi_align)


@_replaces(torchvision.ops.nms)
def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    _check_tensors(boxes, scores)
    return ops.nms(boxes, scores, iou_threshold)


@_replaces(torchvision.ops.batched_nms)
def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    _check_tensors(boxes, scores, idxs)
    if idxs.is_floating_point():
        raise NotImplementedError
    return ops.batched_nms(boxes, scores, idxs.to(torch.int64), iou_threshold)


@_replaces(torchvision_heads.paste_masks_in_image)
def _paste_masks_in_image(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    _check_tensors(masks, boxes)
    differentiated = torch.is_grad_enabled() and masks.requires_grad  # which few do, and ours is not made for
    if differentiated or boxes.dtype != torch.promote_types(masks.dtype, torch.float32):  # precision of whole pixels
        raise NotImplementedError
    return ops.paste_masks_in_image(masks, boxes, img_shape, padding)
