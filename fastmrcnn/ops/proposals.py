"""From the outputs of an RPN head to proposals, for all levels of all images at once.

N images, L levels, A anchors per cell (which may differ by level), K selected anchors per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check
from fastmrcnn.ops.implementations import Impl, choose_kernel


def topk_anchors(logits: Sequence[Tensor], k: int, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The `k` anchors of highest score of each level and image.

    Args:
        logits: objectness per level, [N, A, Hl, Wl], in any memory format.
        k: how many; a level with fewer anchors has them all.

    Returns:
        Scores in descending order, float32 (float64 for float64 logits) [N, L, k], -inf after the last; and the numbers
        of the anchors, (y * Wl + x) * A + a, int64 [N, L, k], -1 after the last.  Among equal scores the lower number
        comes first; NaN counts as -inf.
    """
    if k < 0 or not len(logits):
        raise ValueError(f"k={k}, {len(logits)} levels: expected k of 0 or more, and at least one level")
    check("logits[0]", logits[0], None, None, None, None)
    for i, level in enumerate(logits):
        check(f"logits[{i}]", level, len(logits[0]), None, None, None, dtype=logits[0].dtype)
    return choose_kernel("topk_anchors", impl, logits[0], "reference", "logits")[1](logits, k)


def decode_proposals(
    deltas: Sequence[Tensor],
    indices: Tensor,
    base_anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]] | Tensor,
    sizes: Tensor,
    *,
    scores: Tensor | None = None,
    min_size: float = 1e-3,
    min_score: float = -torch.inf,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Boxes of selected anchors, decoded and clipped.

    Args:
        deltas: regression output of the RPN head per level, [N, 4 A, Hl, Wl], in any memory format.
        indices: numbers of the selected anchors, (y * Wl + x) * A + a, int64 [N, L, K]; -1 in padding.
        base_anchors: anchors of the cell at the origin per level, [A, 4].
        strides: (height, width) of a cell per level, in pixels; or of each image, int64 [N, L, 2].
        sizes: (height, width) of each image, [N, 2].
        scores: of the selected anchors, [N, L, K].
        min_size: shortest side of a usable proposal, in pixels.
        min_score: lowest of the `scores` of a usable proposal.
        weights: of dx, dy, dw, dh.

    Returns:
        Boxes [N, L, K, 4], float32 (float64 for float64 deltas), 0 in padding; and which are usable, bool [N, L, K].
    """
    if not len(deltas) == len(base_anchors) > 0 or not (isinstance(strides, Tensor) or len(strides) == len(deltas)):
        raise ValueError("deltas, base_anchors, strides: expected one of each per level")
    check("sizes", sizes, None, 2, floating=False)
    if isinstance(strides, Tensor):
        check("strides", strides, len(sizes), len(deltas), 2, dtype=torch.int64)
    check("indices", indices, len(sizes), len(deltas), None, dtype=torch.int64)
    if scores is not None:
        check("scores", scores, *indices.shape)
    check("deltas[0]", deltas[0], None, None, None, None)
    for i, (delta, base) in enumerate(zip(deltas, base_anchors, strict=True)):
        check(f"base_anchors[{i}]", base, None, 4)
        check(f"deltas[{i}]", delta, len(sizes), 4 * len(base), None, None, dtype=deltas[0].dtype)
    run = choose_kernel("decode_proposals", impl, deltas[0], "reference", "deltas")[1]
    options = {"scores": scores, "min_size": min_size, "min_score": min_score, "weights": weights}
    return run(deltas, indices, base_anchors, strides, sizes, **options)


def merge_levels(
    boxes: Tensor, scores: Tensor, kept: Tensor, counts: Tensor, max_keep: int, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """What suppression kept of each level, as one list per image, best first.

    Args:
        boxes: [N, L, K, 4].
        scores: [N, L, K].
        kept: indices into the K slots by descending score, int64 [N, L, M], as `padded_nms` returns them.
        counts: how many of them there are, int64 [N, L].
        max_keep: length of the lists, at most L * M.

    Returns:
        Boxes [N, max_keep, 4] and scores [N, max_keep], 0 after the last, and their number, int64 [N].  Among equal
        scores the finer level comes first.
    """
    check("boxes", boxes, None, None, None, 4)
    check("scores", scores, *boxes.shape[:3])
    check("kept", kept, *boxes.shape[:2], None, dtype=torch.int64)
    check("counts", counts, *boxes.shape[:2], dtype=torch.int64)
    if not 0 <= max_keep <= kept.shape[1] * kept.shape[2]:
        raise ValueError(f"max_keep={max_keep}: expected 0 .. {kept.shape[1] * kept.shape[2]}, as many as were kept")
    return choose_kernel("merge_levels", impl, boxes, "reference", "boxes")[1](boxes, scores, kept, counts, max_keep)
