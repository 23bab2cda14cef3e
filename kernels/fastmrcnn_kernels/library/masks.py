"""Pasting and encoding of masks as PyTorch operators; soft masks have gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.host import begin_copy
from fastmrcnn_kernels.library.launchers import implement
from fastmrcnn_kernels.pasting import HEADER, Pasting, layout
from fastmrcnn_kernels.reference import paste as reference
from fastmrcnn_kernels.reference.rle import Encoded

torch.library.define(
    "fastmrcnn::paste_masks",
    "(Tensor masks, Tensor boxes, SymInt height, SymInt width, Tensor? sizes, Tensor? counts, bool detectron2, "
    "int padding, float threshold, str out) -> Tensor",
)
torch.library.define(
    "fastmrcnn::encode_masks",
    "(Tensor masks, Tensor boxes, Tensor sizes, Tensor? counts, SymInt height, SymInt width, SymInt capacity, "
    "bool detectron2, int padding, float threshold) -> Tensor",
)
torch.library.define("fastmrcnn::encode_bool", "(Tensor masks, SymInt capacity) -> Tensor")
implement("paste_masks", "paste", "paste_masks")
implement("encode_masks", "rle", "encode_masks")
implement("encode_bool", "rle", "encode_bool")

ROOM = 256
"""Characters per mask that there is room for, beside one per column of the image; too few, and it is done again."""


@torch.library.register_fake("fastmrcnn::paste_masks")
def _pasted_shape(masks: Tensor, boxes: Tensor, height: int, width: int, *rest: Any) -> Tensor:
    shape, dtype = layout((height, width), rest[-1], torch.float32)
    return masks.new_empty(*boxes.shape[:2], *shape, dtype=dtype)


@torch.library.register_fake("fastmrcnn::encode_masks")
def _encoded_shape(masks: Tensor, boxes: Tensor, *rest: Any) -> Tensor:
    return _buffer(masks, boxes.shape[0] * boxes.shape[1], rest[4])


@torch.library.register_fake("fastmrcnn::encode_bool")
def _encoded_bool_shape(masks: Tensor, capacity: int) -> Tensor:
    return _buffer(masks, masks.shape[0], capacity)


def _buffer(masks: Tensor, number: int, capacity: int) -> Tensor:
    return masks.new_empty(4 * HEADER * (number + 1) + capacity, dtype=torch.uint8)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    masks, boxes, height, width, sizes, counts, detectron2, padding, threshold, out = inputs
    ctx.save_for_backward(masks, boxes, sizes, counts)
    ctx.semantics = (height, width), Pasting(detectron2, padding, threshold), out


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """By the reference: few differentiate through pasted masks, and nobody in a hurry."""
    masks, boxes, sizes, counts = ctx.saved_tensors
    canvas, pasting, out = ctx.semantics
    with torch.enable_grad():
        leaf = masks.detach().requires_grad_()
        soft = reference.paste_masks(leaf, boxes, canvas, sizes, counts, pasting, "soft")
    return torch.autograd.grad(soft, leaf, gradient)[0] if out == "soft" else None, *[None] * 9


torch.library.register_autograd("fastmrcnn::paste_masks", _backward, setup_context=_save)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    canvas: tuple[int, int],
    sizes: Tensor | None,
    counts: Tensor | None,
    pasting: Pasting,
    out: str,
) -> Tensor:
    """See `fastmrcnn.ops.paste_masks`."""
    if out != "soft":
        masks = masks.detach()
    return torch.ops.fastmrcnn.paste_masks(masks, boxes.detach(), *canvas, sizes, counts, *pasting, out)


def encode_masks(
    masks: Tensor,
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    counts: Tensor | None,
    pasting: Pasting,
    launched: Tensor | None = None,
) -> Callable[[], list[Encoded]]:
    """See `fastmrcnn.ops.begin_encoding`."""
    height, width = (max((size[axis] for size in sizes), default=1) for axis in (0, 1))
    slots = boxes.shape[1]

    def launch(capacity: int) -> Tensor:
        on_device = torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1, 2)
        on_device = on_device.to(masks.device, non_blocking=True)
        return torch.ops.fastmrcnn.encode_masks(
            masks.detach(), boxes.detach(), on_device, counts, height, width, capacity, *pasting
        )

    begun = _begin(launch, len(sizes) * slots, width, launched)

    def finish() -> list[Encoded]:
        rows, text = begun()
        return [_encoded(rows[i * slots : (i + 1) * slots], text, size) for i, size in enumerate(sizes)]

    return finish


def launch_encoding(
    masks: Tensor, boxes: Tensor, sizes: Tensor, counts: Tensor, canvas: tuple[int, int], pasting: Pasting
) -> Tensor:
    """See `fastmrcnn.ops.launch_encoding`."""
    capacity = boxes.shape[0] * boxes.shape[1] * (canvas[1] + ROOM)
    return torch.ops.fastmrcnn.encode_masks(masks, boxes, sizes, counts, *canvas, capacity, *pasting)


def encode_bool(masks: Tensor) -> Encoded:
    """See `fastmrcnn.ops.encode_bool`."""
    number, height, width = masks.shape
    rows, text = _begin(lambda capacity: torch.ops.fastmrcnn.encode_bool(masks, capacity), number, width)()
    return _encoded(rows, text, (height, width))


def _begin(
    launch: Callable[[int], Tensor], number: int, width: int, launched: Tensor | None = None
) -> Callable[[], tuple[Tensor, str]]:
    """Launches the encoding of `number` masks, and the one copy of its result; what is returned waits for it.

    That is the rows of the header, and all text.  Where there was too little room, also in what was `launched` before,
    it is launched anew.
    """
    capacity = number * (width + ROOM) if launched is None else launched.numel() - 4 * HEADER * (number + 1)
    copied = begin_copy(launch(capacity) if launched is None else launched)

    def finish() -> tuple[Tensor, str]:
        nonlocal capacity, copied
        for _ in range(3):
            buffer = copied()
            header = buffer[: 4 * HEADER * (number + 1)].view(torch.int32).view(-1, HEADER)
            changes, characters = header[0, :2].tolist()
            if max(changes, characters) <= capacity:
                text = buffer[header.nbytes : header.nbytes + characters].numpy().tobytes().decode("ascii")
                return header[1:], text
            # There are two characters to a change, more or less; only once all changes fit are those counted.
            capacity = characters if changes <= capacity else 2 * changes + ROOM
            copied = begin_copy(launch(capacity))
        raise AssertionError(f"{characters} characters do not fit the room that was made for them, {capacity}")

    return finish


def _encoded(rows: Tensor, text: str, size: tuple[int, int]) -> Encoded:
    """The masks of an image, by their rows of the header; slots without a mask have no text."""
    used = rows[rows[:, 1] > 0].to(torch.int64)
    rles = [{"size": list(size), "counts": text[start : start + n]} for start, n in used[:, :2].tolist()]
    return Encoded(rles, used[:, 2], used[:, 3:7])
