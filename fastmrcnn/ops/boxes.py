"""Non-maximum suppression and proposals from anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check, widen
from fastmrcnn.ops.implementations import Impl, choose, choose_kernel
from fastmrcnn_kernels.host import on_host


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, impl: Impl = "auto") -> Tensor:
    """Greedy non-maximum suppression, as `torchvision.ops.nms`.

    Returns the indices, int64, of those `boxes` [K, 4] that overlap no kept box of a higher score (equal scores: of a
    lower index) with an IoU above `iou_threshold`, in descending order of `scores` [K].
    """
    check("boxes", boxes, None, 4)
    check("scores", scores, len(boxes))
    boxes = widen(boxes)
    _, run = choose_kernel("nms", impl, boxes, "torchvision", "boxes")
    return run(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, impl: Impl = "auto") -> Tensor:
    """`nms` within each group, as `torchvision.ops.batched_nms`; `idxs` [K] names the group of each box.

    Group numbers are compared.  torchvision instead moves each group to coordinates of its own, which rounds the boxes.
    """
    check("boxes", boxes, None, 4)
    check("scores", scores, len(boxes))
    check("idxs", idxs, len(boxes), floating=False)
    boxes = widen(boxes)
    _, run = choose_kernel("batched_nms", impl, boxes, "torchvision", "boxes")
    return run(boxes, scores, idxs, iou_threshold)


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    iou_threshold: float,
    max_keep: int,
    *,
    groups: Tensor | None = None,
    presorted: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`nms` of many segments at once, each with its own number of boxes; results stay on the device.

    Args:
        boxes: [S, K, 4].
        scores: [S, K].
        valid: which slots hold a box, bool [S, K]; or how many of the first slots do, int64 [S].  What the other slots
            hold, NaN included, has no influence.
        iou_threshold: overlaps above it suppress.
        max_keep: at most so many boxes are kept per segment, those of highest score.
        groups: only boxes with the same number, int64 [S, K], suppress each other; by default all do.
        presorted: the boxes of each segment come by descending score, and `scores` need not be looked at.

    Returns:
        Indices into the K slots, int64 [S, max_keep], by descending score (equal scores by index), -1 after the last;
        and the number of boxes kept, int64 [S].
    """
    check("boxes", boxes, None, None, 4)
    check("scores", scores, *boxes.shape[:2])
    if isinstance(valid, Tensor) and valid.dim() == 1 and valid.dtype != torch.bool:
        check("valid", valid, len(boxes), dtype=torch.int64)
        valid = torch.arange(boxes.shape[1], device=boxes.device) < valid[:, None]
    check("valid", valid, *boxes.shape[:2], dtype=torch.bool)
    if max_keep < 0:
        raise ValueError(f"max_keep={max_keep}: expected 0 or more")
    if groups is not None:
        check("groups", groups, *boxes.shape[:2], dtype=torch.int64)
    boxes = widen(boxes)
    without_kernel = "torchvision" if on_host(boxes) else "reference"
    _, run = choose_kernel("padded_nms", impl, boxes, without_kernel, "boxes")
    return run(boxes, scores, valid, iou_threshold, max_keep, groups=groups, presorted=presorted)


def decode_proposals(
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    base_anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]],
    sizes: Tensor,
    *,
    min_size: float = 1e-3,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Boxes of selected anchors of all levels and images, decoded and clipped.

    Args:
        deltas: regression output of the RPN head per level, [N, 4 A, Hl, Wl].
        indices: selected anchors per level, int64 [N, Kl], numbered (y * Wl + x) * A + a.
        base_anchors: anchors of the cell at the origin per level, [A, 4].
        strides: (height, width) of a cell per level, in pixels.
        sizes: (height, width) of each image, [N, 2].
        min_size: shortest side of a usable proposal, in pixels.
        weights: of dx, dy, dw, dh.

    Returns:
        Boxes [N, sum of Kl, 4], float32 (float64 for float64 deltas), and whether each is usable, bool [N, sum of Kl].
    """
    if not len(deltas) == len(indices) == len(base_anchors) == len(strides):
        raise ValueError("deltas, indices, base_anchors, strides: expected one of each per level")
    check("sizes", sizes, None, 2, floating=False)
    for i, (delta, index, base) in enumerate(zip(deltas, indices, base_anchors, strict=True)):
        check(f"base_anchors[{i}]", base, None, 4)
        check(f"deltas[{i}]", delta, len(sizes), 4 * len(base), None, None)
        check(f"indices[{i}]", index, len(sizes), None, dtype=torch.int64)
    run = choose("decode_proposals", impl, "reference")
    return run(deltas, indices, base_anchors, strides, sizes, min_size=min_size, weights=weights)
