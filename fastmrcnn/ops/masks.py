"""From the outputs of heads to masks and keypoints of an image."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastmrcnn.ops.checks import check, pair
from fastmrcnn.ops.implementations import Impl, choose
from fastmrcnn_kernels.host import on_host


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    out: Literal["soft", "bool"] = "soft",
    threshold: float = 0.5,
    padding: int = 1,
    impl: Impl = "auto",
) -> Tensor:
    """Masks of boxes, enlarged and pasted into an image.

    Args:
        masks: probabilities [D, M, M].
        boxes: [D, 4] in pixels of the image.  A box that is not finite gives an empty mask.
        size: (height, width) of the image.
        out: `"soft"` interpolated probabilities, `"bool"` whether they exceed `threshold`.
        padding: border of zeros put around each mask first.

    Returns:
        [D, height, width], the dtype of `masks` or bool.  Semantics of torchvision's `paste_masks_in_image`: the box is
        enlarged by the border, truncated to whole pixels, and both ends count.
    """
    check("masks", masks, None, None, None)
    check("masks", masks, None, masks.shape[1], masks.shape[1])
    check("boxes", boxes, len(masks), 4)
    if out not in ("soft", "bool"):
        raise ValueError(f"out={out!r}: expected 'soft' or 'bool'")
    soft = choose("paste_masks", impl, "reference")(masks, boxes, pair(size, "size"), padding)
    return soft if out == "soft" else soft > threshold


def paste_masks_in_image(
    masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1, *, impl: Impl = "auto"
) -> Tensor:
    """`paste_masks` with the signature of torchvision's function of this name: [D, 1, M, M] to [D, 1, H, W]."""
    check("masks", masks, None, 1, None, None)
    return paste_masks(masks[:, 0], boxes, img_shape, padding=padding, impl=impl)[:, None]


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
