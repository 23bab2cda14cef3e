"""Non-maximum suppression, of one list of boxes or of many at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check, widen
from fastmrcnn.ops.implementations import Impl, choose_kernel
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.reference.soft_nms import Method


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

    The kernels compare 4,096 boxes of a segment at a time, for which they need at most 2 MB per segment.

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
    valid = _check_segments(boxes, scores, valid, groups, max_keep)
    boxes = widen(boxes)
    without_kernel = "torchvision" if on_host(boxes) else "reference"
    _, run = choose_kernel("padded_nms", impl, boxes, without_kernel, "boxes")
    return run(boxes, scores, valid, iou_threshold, max_keep, groups=groups, presorted=presorted)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    idxs: Tensor | None = None,
    method: Method = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Soft non-maximum suppression (Bodla et al. 2017): scores of boxes decay with their overlap, none is cut off.

    Args:
        boxes: [K, 4].
        scores: [K].
        idxs: group of each box, int64 [K], of which each decays by itself; by default all boxes are of one.
        method: how the scores of the others decay by their IoU with each box taken: "linear", times 1 - IoU where that
            exceeds `iou_threshold`, or "gaussian", times exp(-IoU^2 / `sigma`).
        iou_threshold: for "linear".
        sigma: for "gaussian".
        min_score: boxes whose score falls below it are left out.

    Returns:
        Indices, int64 [D], in the order taken, and the scores that the boxes had then, float32 [D], descending.
    """
    check("boxes", boxes, None, 4)
    check("scores", scores, len(boxes))
    if idxs is not None:
        check("idxs", idxs, len(boxes), dtype=torch.int64)
    valid = torch.ones_like(scores, dtype=torch.bool)[None]
    indices, decayed, _ = padded_soft_nms(
        boxes[None],
        scores[None],
        valid,
        len(boxes),
        groups=None if idxs is None else idxs[None],
        method=method,
        iou_threshold=iou_threshold,
        sigma=sigma,
        min_score=min_score,
        impl=impl,
    )
    taken = indices[0] >= 0
    return indices[0][taken], decayed[0][taken]


def padded_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    max_keep: int,
    *,
    groups: Tensor | None = None,
    method: Method = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`soft_nms` of many segments at once; arguments as those of `padded_nms` and `soft_nms`, results on the device.

    Returns:
        Indices into the K slots in the order taken, int64 [S, max_keep], -1 after the last; their scores then,
        float32 [S, max_keep], 0 after the last; and how many were taken, int64 [S].
    """
    valid = _check_segments(boxes, scores, valid, groups, max_keep)
    if method not in ("linear", "gaussian"):
        raise ValueError(f"method={method!r}: expected 'linear' or 'gaussian'")
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: expected a positive number")
    boxes = widen(boxes)
    _, run = choose_kernel("padded_soft_nms", impl, boxes, "reference", "boxes")
    return run(boxes, scores, valid, groups, method, iou_threshold, sigma, min_score, max_keep)


def _check_segments(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor | None, max_keep: int) -> Tensor:
    """`valid` as a mask [S, K]; ValueError or TypeError if the arguments of padded segments do not fit together."""
    check("boxes", boxes, None, None, 4)
    check("scores", scores, *boxes.shape[:2])
    if isinstance(valid, Tensor) and valid.dim() == 1 and valid.dtype != torch.bool:
        check("valid", valid, len(boxes), dtype=torch.int64)
        valid = torch.arange(boxes.shape[1], device=boxes.device) < valid[:, None]
    check("valid", valid, *boxes.shape[:2], dtype=torch.bool)
    if groups is not None:
        check("groups", groups, *boxes.shape[:2], dtype=torch.int64)
    if max_keep < 0:
        raise ValueError(f"max_keep={max_keep}: expected 0 or more")
    return valid
