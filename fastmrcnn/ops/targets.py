"""What heads are to learn: targets made of ground truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn.ops.bits import pack_bits
from fastmrcnn.ops.checks import check, widen
from fastmrcnn.ops.implementations import Impl, choose_kernel
from fastmrcnn_kernels import views as view
from fastmrcnn_kernels.host import on_host


def mask_targets(
    words: Tensor,
    offsets: Tensor,
    views: Tensor,
    boxes: Tensor,
    matched: Tensor,
    valid: Tensor,
    size: int,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Masks of matched objects inside of boxes, in cells of the mask head: what its loss compares with.

    Same numbers as torchvision's `project_masks_on_boxes`, which is RoIAlign with adaptive sampling of masks as large
    as the network's input; but masks stay packed and in the size of their image, and are resized while being read.

    Args:
        words: masks of all images, int32 [T], as `pack_masks` makes them.
        offsets: the word where those of each image begin, int64 [N].  Object g of an image of height H and width W is
            at `offsets` + g H ceil(W / 32).
        views: size of each image, and what the network sees of it, int64 [N, 8]: see `fastmrcnn_kernels/views.py`.
        boxes: [N, S, 4] in pixels of the window that is seen.  What a box covers beyond it is 0 (torchvision's rule: a
            sample up to one pixel outside counts as the border).  Boxes smaller than one pixel, inverted ones too,
            are made one pixel large; such as are not finite, or of infinite extent, give zeros.
        matched: the object of each box, int64 [N, S].  How many there are is not known here: a number beyond gives a
            mask of something else, or zeros where `words` end.
        valid: which slots have a box and an object, bool [N, S]; the others may hold anything.
        size: cells M along either side.

    Returns:
        [N, S, M, M] in 0 .. 1, float32 (float64 for float64 boxes), zeros where not `valid`.  No gradient.
    """
    check("words", words, None, dtype=torch.int32)
    check("offsets", offsets, None, dtype=torch.int64)
    check("views", views, len(offsets), view.COLUMNS, dtype=torch.int64)
    check("boxes", boxes, len(offsets), None, 4)
    check("matched", matched, *boxes.shape[:2], dtype=torch.int64)
    check("valid", valid, *boxes.shape[:2], dtype=torch.bool)
    if size < 1:
        raise ValueError(f"size={size}: expected 1 cell or more")
    boxes = widen(boxes.detach())
    without_kernel = "numpy" if on_host(words) and on_host(boxes) else "reference"
    _, run = choose_kernel("mask_targets", impl, boxes, without_kernel, "boxes", (torch.float32,))
    with torch.autocast(boxes.device.type, enabled=False):  # targets are as exact as the boxes are
        return run(words, offsets, views, boxes, matched, valid, size)


def pack_masks(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Masks of the objects of each image, packed into one tensor.

    Args:
        masks: bool or uint8 [G, H, W] per image, which differ in size and number; what is not 0 belongs to an object.

    Returns:
        Words, int32 [T]: the objects of the first image, those of the second, and so on, each H ceil(W / 32) words as
        `pack_bits` makes them.  And the word where each image begins, int64 [N], on the same device.
    """
    for i, mask in enumerate(masks):
        check(f"masks[{i}]", mask, None, None, None, floating=False)
        if mask.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"masks[{i}]: expected bool or uint8, got {mask.dtype}")
    if not masks:
        return torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    packed = [pack_bits(mask.bool()).flatten() for mask in masks]
    ends = torch.tensor([len(words) for words in packed], dtype=torch.int64, device="cpu").cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends[:-1]))
    return torch.cat(packed), offsets.to(packed[0].device, non_blocking=True)
