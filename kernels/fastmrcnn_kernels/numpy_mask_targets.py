"""Targets of the mask head on a CPU: weights by NumPy, two small matrix products per box.

RoIAlign of a mask resized by its nearest pixels is Wy V Wx^T, where V takes rows and columns of the mask as they are
(see `reference/roi_align.py`).  Adding up the weights of all rows of V that are one row of the mask gives the same
product with those rows and columns of the mask alone that are seen, once each: of a photo that is enlarged, several
times fewer pixels.  The memory this takes, 40 MB where boxes fill a window of 800 x 1333, does not grow with the number
of masks, nor with their size.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn_kernels.numpy_bits import unpack_bits
from fastmrcnn_kernels.pasting import WORD
from fastmrcnn_kernels.reference.mask_targets import first_words, is_empty, nearest, words_of

BOXES_AT_A_TIME = 32
"""Whose weights are computed together: 28 for each row and column that a box touches, some MB."""

PIXELS_AT_A_TIME = 1 << 20
"""Of an object, unpacked at a time: 1 MB as bool, 4 as float32."""

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


class Axis(NamedTuple):
    """Rows, or columns, of masks that are seen in R boxes: first, one after the last, and their weights [R, M, L].

    Of the rows that are seen in the window, by their number among these.  Weight k is that of row `first` + k; `end`
    is 0 where no row is seen.
    """

    first: list[int]
    end: list[int]
    weights: Tensor


def mask_targets(
    words: Tensor, offsets: Tensor, views: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, size: int
) -> Tensor:
    """`fastmrcnn_kernels.reference.mask_targets.mask_targets` of tensors in CPU memory."""
    targets = boxes.new_zeros(*boxes.shape[:2], size, size)
    finite = boxes.isfinite().all(dim=2) & (boxes[..., 2:] - boxes[..., :2]).isfinite().all(dim=2)
    for i, view in enumerate(views.tolist()):
        if is_empty(view):
            continue
        height, width, resized_height, resized_width, top, left, window_height, window_width = view
        first, usable = first_words(offsets[i], view, matched[i], valid[i] & finite[i], len(words))
        rows, row_of_cell = nearest(top, window_height, height, resized_height).unique(return_inverse=True)
        columns, column_of_cell = nearest(left, window_width, width, resized_width).unique(return_inverse=True)
        slots = usable.nonzero().flatten()
        slots = slots[first[slots].argsort(stable=True)]  # boxes of an object are neighbours: it is unpacked once
        for part in slots.split(BOXES_AT_A_TIME):
            corners = boxes[i, part].numpy()
            y = seen(corners[:, 1], corners[:, 3], size, row_of_cell.numpy())
            x = seen(corners[:, 0], corners[:, 2], size, column_of_cell.numpy())
            starts = first[part].tolist()
            pooled = boxes.new_zeros(len(part), size, size)
            for start, group in groupby(range(len(part)), key=starts.__getitem__):
                mask = words[start : start + words_of(view)].view(height, -1)
                pool(pooled, mask, rows, columns, [r for r in group if y.end[r] and x.end[r]], y, x)
            targets[i, part] = pooled
    return targets


def pool(pooled: Tensor, mask: Tensor, rows: Tensor, columns: Tensor, boxes: list[int], y: Axis, x: Axis) -> None:
    """Adds to `pooled` [R, M, M] what number `boxes` see of `rows` and `columns` of a packed mask, strip by strip."""
    if not boxes:
        return
    top, bottom = min(y.first[r] for r in boxes), max(y.end[r] for r in boxes)
    left, right = min(x.first[r] for r in boxes), max(x.end[r] for r in boxes)
    first_word, last_word = int(columns[left]) // WORD, int(columns[right - 1]) // WORD
    width, its_columns = (last_word + 1 - first_word) * WORD, columns[left:right] - first_word * WORD
    begin, end = int(its_columns[0]), int(its_columns[-1]) + 1
    neighbours = end - begin == right - left  # as they are unless the mask was made smaller
    strip = max(1, PIXELS_AT_A_TIME // width)
    for above in range(top, bottom, strip):
        below = min(bottom, above + strip)
        pixels = unpack_bits(mask[rows[above:below], first_word : last_word + 1], width)
        pixels = (pixels[:, begin:end] if neighbours else pixels[:, its_columns]).to(pooled.dtype)
        for r in boxes:
            first, last = max(above, y.first[r]), min(below, y.end[r])
            if first < last:
                wy = y.weights[r, :, first - y.first[r] : last - y.first[r]]
                wx = x.weights[r, :, : x.end[r] - x.first[r]]
                pooled[r].addmm_(wy @ pixels[first - above : last - above, x.first[r] - left : x.end[r] - left], wx.T)


@np.errstate(over="ignore", invalid="ignore")
def seen(low: Floats, high: Floats, bins: int, source: Ints) -> Axis:
    """What intervals [`low`, `high`] of R boxes, finite, see of an axis whose cells are numbers `source` of its rows.

    Positions of samples are computed in the order of operations of `reference/roi_align.py`, to the same bits.  Of a
    bin's samples those near the map alone are visited; they are more than half a cell apart, or there is just one.
    What overflows float32, in boxes of 1e30 pixels, is as far from the map as it can be.
    """
    length, dtype = len(source), low.dtype
    extent = np.maximum(high - low, 1)
    bin_size = extent / bins
    grid = np.ceil(bin_size)
    origin = low[:, None] + np.arange(bins).astype(dtype) * bin_size[:, None]
    step = (bin_size / grid)[:, None]
    first = np.maximum(np.floor((-1 - origin) / step) - 2, 0)
    beyond = np.minimum(np.ceil((length - origin) / step) + 2, grid[:, None])
    count = np.clip(beyond - first, 0, np.floor((length + 1) / step) + 5).astype(np.int64).ravel()

    b = np.repeat(np.arange(count.size), count)
    nth = np.arange(b.size) - np.repeat(count.cumsum() - count, count)
    sample = first.ravel()[b] + nth.astype(dtype)
    position = origin.ravel()[b] + (sample + dtype.type(0.5)) * bin_size[b // bins] / grid[b // bins]
    counts = (position >= -1) & (position <= length)
    b, position = b[counts], position[counts].clip(0, length - 1)
    box = b // bins
    cell = np.floor(position)
    share = (position - cell) / grid[box]
    near = cell.astype(np.int64)
    near, far = source[near], source[np.minimum(near + 1, length - 1)]

    begin, end = np.full(len(low), np.iinfo(np.int64).max), np.zeros(len(low), np.int64)
    np.minimum.at(begin, box, near)
    np.maximum.at(end, box, far + 1)
    span = int((end - begin).max(initial=0))
    place = b * span - begin[box]
    place = np.concatenate((place + near, place + far))
    weights = np.bincount(place, np.concatenate((1 / grid[box] - share, share)), len(low) * bins * span)
    return Axis(begin.tolist(), end.tolist(), torch.from_numpy(weights.astype(dtype)).view(len(low), bins, span))
