"""Masks as COCO polygons: their boundaries, along the edges of pixels.

A boundary is made of horizontal sides, each a maximal row of pixel edges with the mask on the same side of them, and of
vertical ones, each of which joins the end of one horizontal side to the start of another.  Walking with the mask to the
right, sides above the mask lead to the right and sides below it to the left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels.reference.rle import RLE, run_lengths_of

__all__ = ["masks_to_polygons", "rle_to_polygons"]

Polygon = list[int]
"""x0, y0, x1, y1, ... in pixels, y down; the corner of an image is at 0, 0."""

_Integers: TypeAlias = NDArray[Any]


class _Sides(NamedTuple):
    """Horizontal sides [S], by mask, from top to bottom and left to right."""

    mask: _Integers
    y: _Integers
    left: _Integers
    right: _Integers
    above: _Integers  # bool: above the mask, else below it
    first: _Integers  # bar at its left end


def masks_to_polygons(masks: Tensor) -> list[list[Polygon]]:
    """Polygons of masks [D, H, W] or [D, 1, H, W], true where not 0: :func:`rle_to_polygons` of their encodings."""
    return rle_to_polygons(ops.encode_bool(masks[:, 0] if masks.dim() == 4 else masks).rles)


def rle_to_polygons(rles: Sequence[RLE]) -> list[list[Polygon]]:
    """Polygons that cover exactly what masks do.

    Their corners are corners of pixels, so that ``pycocotools.mask.frPyObjects`` and ``merge``, and whatever fills
    polygons by the even-odd rule, give back the mask, pixel for pixel.  COCO knows no holes: the outline of one is
    joined to the outline around it by a line that is walked in both directions, and that has no area.

    Args:
        rles: dicts of ``"size"`` [height, width] and ``"counts"``, compressed (str or bytes) or a list of run lengths.

    Returns:
        For every mask its polygons, one for each part that is connected by edges of pixels, the topmost first; none for
        an empty mask.

    Raises:
        ValueError: counts that are malformed, or do not add up to the size.
    """
    found: list[list[Polygon]] = [[] for _ in rles]
    if not rles:
        return found
    height, width = (max(rle["size"][axis] for rle in rles) for axis in (0, 1))
    bars = _bars(rles)
    sides, side_of_bar = _sides(bars, height, width)
    for number, polygon in _walk(sides, _successors(sides, height, width), bars, side_of_bar):
        found[number].append(polygon)
    return found


class _Bars(NamedTuple):
    """Maximal rows of pixels down a column, [B], in the order of masks, columns and rows."""

    mask: _Integers
    x: _Integers
    top: _Integers
    bottom: _Integers  # below its last pixel


def _bars(rles: Sequence[RLE]) -> _Bars:
    runs, owner = run_lengths_of(rles)
    heights = np.array([rle["size"][0] for rle in rles], np.int64)[owner]
    ends = np.cumsum(runs)
    starts = ends - runs
    # Runs alternate, and each mask starts with one that is outside.
    first = np.searchsorted(owner, owner)
    starts, ends = starts - starts[first], ends - starts[first]
    inside = ((np.arange(len(runs)) - first) % 2 == 1) & (runs > 0)
    starts, ends, owner, heights = (values[inside] for values in (starts, ends, owner, heights))
    # A run may go on at the top of the next column.
    columns, last = starts // heights, (ends - 1) // heights
    pieces = last - columns + 1
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts, ends, owner, heights, columns = (
        np.repeat(values, pieces) for values in (starts, ends, owner, heights, columns)
    )
    x = columns + index
    return _Bars(owner, x, np.maximum(starts - x * heights, 0), np.minimum(ends - x * heights, heights))


def _sides(bars: _Bars, height: int, width: int) -> tuple[_Sides, _Integers]:
    """Horizontal sides, and which of them each bar's upper edge [B] is part of."""
    count = len(bars.x)
    mask, x = np.tile(bars.mask, 2), np.tile(bars.x, 2)
    y = np.concatenate((bars.top, bars.bottom))
    above = np.arange(2 * count) < count
    # One column more than there is: the last edge of a row is then no neighbour of the first of the next.
    key = ((mask * 2 + above) * (height + 1) + y) * (width + 1) + x
    order = np.argsort(key)
    key = key[order]
    starts = np.flatnonzero(np.diff(key, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(key))
    edges = order[starts]
    sides = _Sides(mask[edges], y[edges], x[edges], x[edges] + lengths, above[edges], edges % max(count, 1))
    rank = np.lexsort((sides.left, sides.y, sides.mask))
    number = np.empty(len(rank), np.int64)
    number[rank] = np.arange(len(rank))
    side_of_edge = np.empty(2 * count, np.int64)
    side_of_edge[order] = np.repeat(number, lengths)
    return _Sides(*(values[rank] for values in sides)), side_of_edge[:count]


def _successors(sides: _Sides, height: int, width: int) -> list[int]:
    """The side after each: on every vertical line of pixel edges, the ends of sides from top to bottom are paired.

    Where two pixels touch by a corner only, two sides end and no edge lies between them: sides below a mask come first,
    whose ends belong to the pixel above the corner, which keeps the two apart.
    """
    count = len(sides.y)
    number = np.tile(np.arange(count), 2)
    x = np.concatenate((sides.left, sides.right))
    mask, y, above = (np.tile(values, 2) for values in (sides.mask, sides.y, sides.above))
    is_end = (np.arange(2 * count) >= count) == above
    order = np.argsort((((mask * (width + 1) + x) * (height + 1)) + y) * 2 + above)
    upper, lower = order[::2], order[1::2]
    upward = is_end[lower]
    successor = np.empty(count, np.int64)
    successor[number[np.where(upward, lower, upper)]] = number[np.where(upward, upper, lower)]
    return successor.tolist()


def _walk(sides: _Sides, successor: list[int], bars: _Bars, side_of_bar: _Integers) -> list[tuple[int, Polygon]]:
    """The mask of each polygon, and the polygon."""
    y, above = sides.y.tolist(), sides.above.tolist()
    start, end = (
        np.where(sides.above, *ends).tolist() for ends in ((sides.left, sides.right), (sides.right, sides.left))
    )
    topmost = [loop[0] for loop in _loops(range(len(y)), successor)]
    holes = [side for side in topmost if not above[side]]  # above them is the mask
    for hole in sorted(holes, key=lambda side: -end[side]):
        # From the right to the left, so that what is left of an outline's side keeps its number.
        around = int(side_of_bar[sides.first[hole]])
        rest = len(y)
        y.append(y[around])
        start.append(end[hole])
        end.append(end[around])
        end[around] = end[hole]
        successor.append(successor[around])
        successor[around], successor[hole] = successor[hole], rest
    mask = sides.mask.tolist()
    polygons = []
    for loop in _loops((side for side in topmost if above[side]), successor):
        corners = [
            value for side in loop if start[side] != end[side] for value in (start[side], y[side], end[side], y[side])
        ]
        polygons.append((mask[loop[0]], corners))
    return polygons


def _loops(starts: Iterable[int], successor: list[int]) -> list[list[int]]:
    """The cycles of a permutation that its elements `starts` are in, each beginning with the first of them."""
    seen = bytearray(len(successor))
    loops = []
    for start in starts:
        if seen[start]:
            continue
        loop, current = [], start
        while not seen[current]:
            seen[current] = 1
            loop.append(current)
            current = successor[current]
        loops.append(loop)
    return loops
