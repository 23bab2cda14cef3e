"""From the outputs of heads to masks and keypoints of an image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check, pair
from fastmrcnn.ops.implementations import Impl, choose, choose_kernel
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.pasting import Pasting

Semantics = Literal["torchvision", "detectron2"]


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    sizes: Tensor | None = None,
    count: Tensor | None = None,
    out: Literal["soft", "bool", "bits"] = "soft",
    threshold: float = 0.5,
    padding: int = 1,
    semantics: Semantics = "torchvision",
    logits: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Masks of boxes, enlarged and pasted into an image, or into each image of a batch.

    Args:
        masks: probabilities [D, M, M], or of a padded batch [N, D, M, M].
        boxes: [D, 4] or [N, D, 4], in pixels of the image.  A box that is not finite, or reaches more than 2^27 pixels
            from the origin, gives an empty mask.
        size: (height, width) of the result: of the image, or of a canvas that all images of a batch fit.
        sizes: (height, width) of each image of a batch, int64 [N, 2]; by default that of the canvas.  Masks end there.
        count: how many masks each image of a batch has, int64 [N]; what other slots hold has no influence.
        out: `"soft"` interpolated probabilities, `"bool"` whether they exceed `threshold`, `"bits"` the same in words
            of 32 pixels, for `unpack_bits` and `mask_iou`.
        threshold: from 0.
        padding: border of zeros put around each mask first, by torchvision's semantics.
        semantics: `"torchvision"`, whose `paste_masks_in_image` enlarges the box by the border, truncates it to whole
            pixels, and counts both ends; or `"detectron2"`, whose function of that name samples the mask at the centres
            of pixels by `grid_sample`, and takes a pixel that equals the threshold for inside.
        logits: `masks` are logits, of which the sigmoid is pasted.

    Returns:
        [D, height, width], or with [N, D, ...] in front for a batch: float32 (float64 for float64 masks), bool, or
        int32 with ceil(width / 32) words per row, in which bit k of word w, the least significant first, is pixel
        32 w + k.  All are zero outside boxes and images, and in slots without a mask.
    """
    batched = masks.dim() == 4
    check_pasted(masks, boxes, count)
    if out not in ("soft", "bool", "bits"):
        raise ValueError(f"out={out!r}: expected 'soft', 'bool' or 'bits'")
    if sizes is not None:
        check("sizes", sizes, len(masks) if batched else 1, 2, dtype=torch.int64)
    pasting = as_pasting(semantics, padding, threshold)
    without_kernel = "torchvision" if on_host(masks) and on_host(boxes) else "reference"
    run = choose_kernel("paste_masks", impl, masks, without_kernel, "masks")[1]
    prepared = prepare(masks, boxes, logits)
    result = run(*prepared, pair(size, "size"), sizes, count, pasting, out)
    return result if batched else result[0]


def check_pasted(masks: Tensor, boxes: Tensor, count: Tensor | None) -> None:
    """Raise unless masks, boxes and counts are of one image or one batch."""
    lead = (None,) * (masks.dim() - 2 if isinstance(masks, Tensor) and masks.dim() == 4 else 1)
    check("masks", masks, *lead, None, None)
    check("masks", masks, *lead, masks.shape[-1], masks.shape[-1])
    check("boxes", boxes, *masks.shape[:-2], 4)
    if count is not None:
        check("count", count, len(masks) if masks.dim() == 4 else 1, dtype=torch.int64)


def as_pasting(semantics: str, padding: int, threshold: float) -> Pasting:
    """Checked semantics of pasting."""
    if semantics not in ("torchvision", "detectron2"):
        raise ValueError(f"semantics={semantics!r}: expected 'torchvision' or 'detectron2'")
    if not 0 <= padding <= 4:
        raise ValueError(f"padding={padding}: expected 0 .. 4 cells")
    # Where there is no mask its value is 0, which has to be outside.
    if not (threshold > 0 or (threshold == 0 and semantics == "torchvision")):
        raise ValueError(f"threshold={threshold}: expected a positive number, or 0 by torchvision's semantics")
    return Pasting(semantics == "detectron2", padding, threshold)


def prepare(masks: Tensor, boxes: Tensor, logits: bool) -> tuple[Tensor, Tensor]:
    """Probabilities [N, D, M, M] and boxes [N, D, 4] of one dtype, float32 or float64."""
    dtype = torch.promote_types(masks.dtype, torch.float32)
    masks = masks.to(dtype).sigmoid() if logits else masks.to(dtype)
    boxes = boxes.to(dtype)
    return (masks, boxes) if masks.dim() == 4 else (masks[None], boxes[None])


def paste_masks_in_image(
    masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1, *, impl: Impl = "auto"
) -> Tensor:
    """`paste_masks` with the signature of torchvision's function of this name: [D, 1, M, M] to [D, 1, H, W]."""
    check("masks", masks, None, 1, None, None)
    return paste_masks(masks[:, 0], boxes, img_shape, padding=padding, impl=impl)[:, None].to(masks.dtype)


def heatmaps_to_keypoints(
    heatmaps: Tensor, boxes: Tensor, max_size: tuple[int, int], *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Peak of each heatmap after bicubic enlargement to its box (torchvision's function of this name).

    Args:
        heatmaps: logits [D, K, S, S].
        boxes: [D, 4] in pixels, none higher or wider than `max_size`.
        max_size: (height, width) that bounds the boxes, so that shapes do not depend on data.

    Returns:
        Keypoints [D, K, 3] (x, y, 1) in pixels and the heights of their peaks [D, K].
    """
    check("heatmaps", heatmaps, None, None, None, None)
    check("boxes", boxes, len(heatmaps), 4)
    run = choose("heatmaps_to_keypoints", impl, "torchvision" if on_host(boxes) else "reference")
    return run(heatmaps, boxes, max_size)
