"""Targets of the mask head: packed masks of objects, seen through a view, and averaged over the bins of boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmrcnn_kernels.pasting import WORD
from fastmrcnn_kernels.reference.roi_align import roi_align

ELEMENTS_AT_A_TIME = 1 << 22
"""How many pixels of windows, or weights of their rows and columns, are computed at a time: boxes come in chunks."""

CANDIDATES = 6
"""What `axis_weights` of RoIAlign computes for each weight."""


def words_of(view: Sequence[int]) -> int:
    """How many words an object has in an image of this view."""
    return view[0] * -(-view[1] // WORD)


def is_empty(view: Sequence[int]) -> bool:
    """Whether image, resized image or window have no pixels; an image without objects may have any view."""
    height, width, resized_height, resized_width, _, _, window_height, window_width = view
    return min(height, width, resized_height, resized_width, window_height, window_width) < 1


def first_words(
    offsets: Tensor, view: Sequence[int], matched: Tensor, valid: Tensor, words: int
) -> tuple[Tensor, Tensor]:
    """Where the objects `matched` [S] of an image begin, int64 [S], and which are there as a whole, and `valid`."""
    first = offsets + matched * words_of(view)
    return first, valid & (first >= 0) & (first <= words - words_of(view))


def nearest(first: int, count: int, size: int, resized: int) -> Tensor:
    """Which of the `size` pixels of an axis, resized to `resized`, the `count` from `first` on show: int64 [count].

    As `torch.nn.functional.interpolate` has it, `mode="nearest"`: in float32.
    """
    ratio = torch.tensor(size, dtype=torch.float32) / resized
    place = torch.arange(first, first + count).float() * ratio
    return place.floor().clamp(0, size - 1).to(torch.int64)


def window(words: Tensor, first: Tensor, view: Sequence[int]) -> Tensor:
    """What is seen of the objects [R] that begin at word `first`: zeros and ones, int32 [R, height, width]."""
    height, width, resized_height, resized_width, top, left, window_height, window_width = view
    rows = nearest(top, window_height, height, resized_height).to(words.device)
    columns = nearest(left, window_width, width, resized_width).to(words.device)
    place = first[:, None, None] + rows[:, None] * -(-width // WORD) + columns // WORD
    return words[place] >> (columns % WORD).to(words.dtype) & 1


def mask_targets(
    words: Tensor, offsets: Tensor, views: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, size: int
) -> Tensor:
    """See `fastmrcnn.ops.mask_targets`; synchronises."""
    targets = boxes.new_zeros(*boxes.shape[:2], size, size)
    for i, view in enumerate(views.tolist()):
        if is_empty(view):
            continue
        first, usable = first_words(offsets[i], view, matched[i], valid[i], len(words))
        height, width = view[6:]
        elements = height * width + CANDIDATES * size * (height + width)
        for slots in usable.nonzero().flatten().split(max(1, ELEMENTS_AT_A_TIME // elements)):
            masks = window(words, first[slots], view).to(boxes.dtype)
            index = torch.arange(len(slots), dtype=boxes.dtype, device=boxes.device)
            rois = torch.cat((index[:, None], boxes[i, slots]), dim=1)
            targets[i, slots] = roi_align(masks[:, None], rois, (size, size), 1.0, -1, False)[:, 0]
    return targets
