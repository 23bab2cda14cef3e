"""COCO segmentations to masks.

pycocotools' C code trusts its input: a hostile run length or coordinate makes it write outside its buffers or ask for
any amount of memory. So everything is checked here before it goes there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from fastmrcnn_kernels.reference.rle import from_text

# Boundary points pycocotools is let to visit for one polygon, counting 5 per pixel; each takes 16 bytes.
_MAX_BOUNDARY_POINTS = 20_000_000
_CHUNK_BYTES = 1 << 15  # so that the arrays of a chunk stay in the processor's cache


def check_segmentation(segmentation: Any, height: int, width: int, total: int | None = None) -> str | None:
    """Say what keeps a segmentation from being a mask of height x width pixels: None if nothing does.

    Args:
        segmentation: polygons (a list of lists x0, y0, x1, y1, ... in pixels), or a run-length encoding: a dict of
            "size" [height, width] and "counts", a list of run lengths or their compressed form.
        height: of the image, in pixels.
        width: of the image, in pixels.
        total: `total_pixels` of compressed counts where it is known already.
    """
    if isinstance(segmentation, dict):
        return _check_rle(segmentation, height, width, total)
    if not segmentation:
        return "has no segmentation"
    if not isinstance(segmentation, list) or not isinstance(segmentation[0], list):
        return f"segmentation is neither a list of polygons nor an RLE dict: {shorten(segmentation)}"
    reach = max(height, width)
    for polygon in segmentation:
        problem = _check_polygon(polygon, reach)
        if problem:
            return problem
    return None


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Turn a segmentation that `check_segmentation` passed into one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects({"size": [height, width], "counts": segmentation["counts"]}, height, width)
    return {"size": [height, width], "counts": segmentation["counts"]}


def rasterise(segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.uint8]:
    """Checked segmentations as masks, uint8 [G,H,W] of 0 and 1: what pycocotools' `decode` makes of them.

    That writes every pixel of every mask, column by column, and rows of it are gathered from there. Here each piece of
    a column that is inside switches one bit on, in the row where it begins, and off in the row after it; sums of rows
    from the top down then are the rows of the mask, 32 pixels per word.
    """
    rles = [to_rle(segmentation, height, width)["counts"] for segmentation in segmentations]
    runs, owner, _ = from_text([counts.encode() if isinstance(counts, str) else counts for counts in rles])
    number = np.arange(len(runs)) - np.searchsorted(owner, owner)
    inside = (number % 2 == 1) & (runs > 0)
    # Down the columns of all masks, as if they were one image: each covers height x width pixels.
    ends = np.cumsum(runs)[inside]
    starts = ends - runs[inside]
    columns = starts // height
    pieces = (ends - 1) // height - columns + 1
    if (pieces > 1).any():  # runs that go on at the top of the next column
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        columns = np.repeat(columns, pieces) + nth
        starts, ends = np.repeat(starts, pieces), np.repeat(ends, pieces)
    top, bottom = np.maximum(starts - columns * height, 0), np.minimum(ends - columns * height, height)

    mask, x = np.divmod(columns, width)
    words = np.zeros((len(rles), height + 1, -(-width // 32)), np.uint32)
    bit = np.left_shift(np.uint32(1), (x % 32).astype(np.uint32))
    first = mask * (height + 1) * words.shape[2] + x // 32
    np.add.at(words.reshape(-1), first + top * words.shape[2], bit)
    np.subtract.at(words.reshape(-1), first + bottom * words.shape[2], bit)
    np.cumsum(words, axis=1, dtype=np.uint32, out=words)
    octets = words[:, :height].astype("<u4").view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=width, bitorder="little")


def total_pixels(counts: Sequence[str | bytes]) -> list[int]:
    """Pixels that each compressed counts string covers, -1 where it does not decode to run lengths.

    Many strings are decoded at once: a data set holds up to a million.
    """
    totals: list[int] = []
    chunk: list[bytes] = []
    size = 0
    for string in counts:
        encoded = string.encode("utf-8", "surrogatepass") if isinstance(string, str) else bytes(string)
        if chunk and size + len(encoded) > _CHUNK_BYTES:
            totals += _totals_of_chunk(chunk)
            chunk, size = [], 0
        chunk.append(encoded)
        size += len(encoded)
    return totals + _totals_of_chunk(chunk)


def _totals_of_chunk(strings: list[bytes]) -> list[int]:
    runs, owner, valid = from_text(strings)
    totals = np.bincount(owner, runs, len(strings)).astype(np.int64)  # sums below 2^53 are exact
    return np.where(valid, totals, -1).tolist()


def _check_rle(rle: dict[str, Any], height: int, width: int, total: int | None) -> str | None:
    if rle.get("size") != [height, width]:
        return f"RLE size {shorten(rle.get('size'))} differs from the image's [height, width] = [{height}, {width}]"
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        covered = total_pixels([counts])[0] if total is None else total
        if covered < 0:
            return f"RLE counts do not decode: {shorten(counts)}"
    elif isinstance(counts, list):
        if set(map(type, counts)) - {int} or min(counts, default=0) < 0:
            return f"RLE counts must be non-negative integers: {shorten(counts)}"
        covered = sum(counts)
    else:
        return f"RLE counts must be a string or a list of integers, got {shorten(counts)}"
    if covered != height * width:
        return f"RLE counts cover {covered} pixels, the image has {height} x {width} = {height * width}"
    return None


def _check_polygon(polygon: Any, reach: int) -> str | None:
    if not isinstance(polygon, list):
        return f"polygon is not a list: {shorten(polygon)}"
    if len(polygon) < 6 or len(polygon) % 2:
        return (
            f"polygon has {len(polygon)} coordinates; accepted is an even number from 6 (3 points): {shorten(polygon)}"
        )
    try:
        finite = math.isfinite(sum(polygon))
        low, high = min(polygon), max(polygon)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        return f"polygon coordinates must be finite numbers: {shorten(polygon)}"
    if low < -reach or high > 2 * reach:
        return f"polygon reaches {low:g} to {high:g}, farther than one image size ({reach}) outside: {shorten(polygon)}"
    # 3 * reach is the longest a step can be: the exact sum is formed for monsters only.
    if len(polygon) // 2 * 15 * reach > _MAX_BOUNDARY_POINTS:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        steps = 5 * np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
        if steps.sum() > _MAX_BOUNDARY_POINTS:
            return f"polygon has a boundary of more than {_MAX_BOUNDARY_POINTS // 5} pixels: {shorten(polygon)}"
    return None


def shorten(value: Any, limit: int = 80) -> str:
    """`repr`, cut to `limit` characters: for messages about records of any size."""
    if isinstance(value, list | str | bytes):
        value = value[:limit]
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
