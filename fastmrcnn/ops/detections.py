"""From the outputs of a box head to detections, for a batch of images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check, widen
from fastmrcnn.ops.implementations import Impl, choose_kernel
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.selection import Selection


def select_detections(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    sizes: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    min_size: float = 1e-2,
    weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    class_agnostic: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best boxes of each image over all classes, as torchvision's `RoIHeads.postprocess_detections`.

    Every pair of a proposal and a class is a candidate: its score, the softmax of the logits, must exceed a threshold,
    and its box, decoded and clipped, must be large enough.  Suppression is among candidates of one class; the best of
    what it leaves are the detections.

    Args:
        logits: [N, K, C], where class 0 is the background.
        deltas: [N, K, C, 4].
        proposals: [N, K, 4], in pixels.
        counts: how many proposals each image has, int64 [N]; what the other slots hold has no influence.
        sizes: (height, width) of each image, [N, 2].
        score_threshold: scores of candidates exceed it.
        iou_threshold: overlaps above it suppress.
        max_detections: at most so many detections per image, D.
        min_size: shortest side of a detection, in pixels.
        weights: of dx, dy, dw, dh.
        class_agnostic: suppress across classes, too.

    Returns:
        Boxes [N, D, 4], scores [N, D] and labels, int64 [N, D], best first (equal scores by proposal, then class), all
        0 after the last; and how many there are, int64 [N].  Boxes and scores are float32 (float64 for float64 logits).
    """
    check("logits", logits, None, None, None)
    check("deltas", deltas, *logits.shape, 4, dtype=logits.dtype)
    check("proposals", proposals, *logits.shape[:2], 4)
    check("counts", counts, len(logits), dtype=torch.int64)
    check("sizes", sizes, len(logits), 2, floating=False)
    if max_detections < 0:
        raise ValueError(f"max_detections={max_detections}: expected 0 or more")
    without_kernel = "torchvision" if on_host(logits) else "reference"
    _, run = choose_kernel("select_detections", impl, logits, without_kernel, "logits")
    selection = Selection(score_threshold, iou_threshold, max_detections, min_size, weights, class_agnostic)
    return run(logits, deltas, widen(proposals), counts, sizes, selection)
