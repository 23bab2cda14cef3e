"""COCO's run-length encoding, of masks that were never full-size images, and of those that are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check
from fastmrcnn.ops.implementations import Impl, choose_kernel
from fastmrcnn.ops.masks import Semantics, as_pasting, check_pasted, prepare
from fastmrcnn_kernels import library
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.reference import rle as reference
from fastmrcnn_kernels.reference.rle import RLE, Encoded

Size = tuple[int, int]


def encode_masks(
    masks: Tensor,
    boxes: Tensor,
    size: Size | Sequence[Size],
    *,
    count: Tensor | None = None,
    threshold: float = 0.5,
    padding: int = 1,
    semantics: Semantics = "torchvision",
    logits: bool = False,
    impl: Impl = "auto",
) -> Encoded | list[Encoded]:
    """What `paste_masks` pastes, as COCO run-length encodings, without pasting it.

    Args:
        masks, boxes, count, threshold, padding, semantics, logits: as for `paste_masks`.
        size: (height, width) of the image, or one such pair for each image of a batch.

    Returns:
        For one image, or one for each image of a batch: `rles`, one dict per mask with `"size"` and `"counts"` (text,
        character by character what `pycocotools.mask.encode` gives of the pasted mask), their `areas` in pixels, int64
        [D], and the smallest `boxes` around them (x, y, width, height), int64 [D, 4]; all on the CPU.  Images of up to
        2^31 - 1 pixels.
    """
    options: dict[str, Any] = {"threshold": threshold, "padding": padding, "semantics": semantics, "logits": logits}
    pairs: Any = size
    one = len(pairs) == 2 and all(isinstance(side, int) for side in pairs)
    if isinstance(masks, Tensor) and masks.dim() == 4:
        sizes = [pairs] * len(masks) if one else pairs
        return begin_encoding(masks, boxes, sizes, count=count, impl=impl, **options)()
    check_pasted(masks, boxes, count)
    if not one:
        raise ValueError(f"size={size!r}: expected (height, width) of the image")
    return begin_encoding(masks[None], boxes[None], [pairs], count=count, impl=impl, **options)()[0]


def begin_encoding(
    masks: Tensor,
    boxes: Tensor,
    sizes: Sequence[Size],
    *,
    count: Tensor | None = None,
    threshold: float = 0.5,
    padding: int = 1,
    semantics: Semantics = "torchvision",
    logits: bool = False,
    launched: Tensor | None = None,
    impl: Impl = "auto",
) -> Callable[[], list[Encoded]]:
    """`encode_masks` of a batch in two steps, so that a GPU can go on meanwhile.

    The first step does not wait: it launches the encoding, unless that was `launched` by `launch_encoding`, and one
    copy to the CPU.  The result is a function that waits for that copy, and returns what `encode_masks` does.
    """
    check("masks", masks, None, None, None, None)
    check_pasted(masks, boxes, count)
    if len(sizes) != len(masks):
        raise ValueError(f"sizes: expected one for each of {len(masks)} images, got {len(sizes)}")
    for i, (height, width) in enumerate(sizes):
        if not (height > 0 and width > 0 and height * width < 2**31):
            raise ValueError(f"sizes[{i}]={sizes[i]}: expected a positive height and width, up to 2^31 - 1 pixels")
    pasting = as_pasting(semantics, padding, threshold)
    without_kernel = "torchvision" if on_host(masks) and on_host(boxes) else "reference"
    name, run = choose_kernel("encode_masks", impl, masks, without_kernel, "masks")
    if launched is not None and name != "triton":
        raise ValueError(f"launched: only kernels are, and on {masks.device.type!r} masks are encoded by {name!r}")
    begun = () if launched is None else (launched,)
    return run(*prepare(masks, boxes, logits), sizes, count, pasting, *begun)


def launch_encoding(
    masks: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    canvas: Size,
    *,
    count: Tensor,
    threshold: float = 0.5,
    padding: int = 1,
    semantics: Semantics = "torchvision",
) -> Tensor:
    """The kernels of `begin_encoding` alone, for a CUDA graph: sizes are read on the device.

    Args:
        masks, boxes, count, threshold, padding, semantics: as for `begin_encoding`, masks float32.
        sizes: (height, width) of each image, int64 [N, 2], on the device of the masks.
        canvas: (height, width) that none of them exceeds.

    Returns:
        What `begin_encoding` takes as `launched`, uint8 on the device; its length depends on shapes and `canvas` alone.
    """
    check("masks", masks, None, None, None, None, dtype=torch.float32)
    check_pasted(masks, boxes, count)
    check("sizes", sizes, len(masks), 2, dtype=torch.int64)
    pasting = as_pasting(semantics, padding, threshold)
    return library.launch_encoding(masks, boxes.float(), sizes, count, canvas, pasting)


def encode_bool(masks: Tensor, *, impl: Impl = "auto") -> Encoded:
    """COCO run-length encodings of masks [D, H, W] that exist already: bool, or any dtype, where not 0 is inside."""
    check("masks", masks, None, None, None, floating=False)
    if masks.shape[1] * masks.shape[2] >= 2**31:
        raise ValueError(f"masks: expected up to 2^31 - 1 pixels, got {list(masks.shape[1:])}")
    inside = masks if masks.dtype == torch.bool else masks != 0
    return choose_kernel("encode_bool", impl, inside, "reference", "masks", (torch.bool,))[1](inside)


def decode(rles: Sequence[RLE]) -> Tensor:
    """Masks of COCO run-length encodings, bool [D, H, W] on the CPU.

    Args:
        rles: at least one, all of one size: dicts of `"size"` [height, width] and `"counts"`, compressed (str or
            bytes) or a list of run lengths.

    Raises:
        ValueError: counts that are malformed, or do not add up to the size.
    """
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"rles: expected at least one, and all of one size, got the sizes {sorted(sizes)}")
    return reference.decode(rles)
