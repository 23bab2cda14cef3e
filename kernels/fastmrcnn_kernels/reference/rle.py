"""COCO's run-length encoding of masks: runs down columns, zeros first, as text.

Run lengths are of the mask column by column; a run may go on at the top of the next column.  As text each is written in
characters of 5 bits, least significant first, from the fourth on as the difference to the one before the last
(pycocotools' `rleToString`, whose output this is byte by byte).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn_kernels.pasting import Pasting
from fastmrcnn_kernels.reference.paste import paste_masks

RLE: TypeAlias = dict[str, Any]
"""`"size"` [height, width] and `"counts"`, the run lengths as text: what pycocotools takes, and JSON holds."""

Integers: TypeAlias = NDArray[Any]

MOST_CHARACTERS = 7
"""Of a run length of 32 bits."""


class Encoded(NamedTuple):
    """Masks of one image.

    Attributes:
        rles: one per mask.
        areas: pixels of each, int64 [D].
        boxes: x, y, width, height of the smallest box around each, int64 [D, 4]; zeros for an empty mask.
    """

    rles: list[RLE]
    areas: Tensor
    boxes: Tensor


def run_lengths(pixels: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> Integers:
    """Run lengths of a mask that is `pixels` [h, w] from row `top` and column `left` on, and empty elsewhere."""
    rows, columns = pixels.shape
    pitch = rows + (rows < height)  # a row of zeros ends each column, unless columns follow one another without a gap
    flat = np.zeros(columns * pitch + 2, np.bool_)
    flat[1:-1].reshape(columns, pitch)[:, :rows] = pixels.T
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    changes += changes // pitch * (height - pitch) + left * height + top
    if len(changes) and changes[-1] == height * width:
        changes = changes[:-1]  # there is nothing after the last pixel
    return np.diff(changes, prepend=0, append=height * width)


def as_text(runs: Sequence[Integers]) -> list[str]:
    """The counts of each of some masks, compressed."""
    if not runs:
        return []
    lengths = np.array([len(x) for x in runs])
    values = np.concatenate(runs)
    starts = np.cumsum(lengths) - lengths
    number = np.arange(len(values)) - np.repeat(starts, lengths)
    before = np.concatenate((np.zeros(2, values.dtype), values[:-2]))[: len(values)]
    rest = values - np.where(number > 2, before, 0)
    digits = rest[:, None] >> np.arange(0, 5 * MOST_CHARACTERS, 5, dtype=np.int64)
    left = digits >> 5  # what is left to write, but for the sign, which is bit 4 of the last character
    more = np.where(digits & 0x10, left != -1, left != 0)
    written = np.concatenate((np.ones_like(more[:, :1]), np.logical_and.accumulate(more[:, :-1], axis=1)), axis=1)
    text = ((digits & 0x1F) + np.where(more, 0x20, 0) + 48).astype(np.uint8)[written].tobytes().decode("ascii")
    ends = np.cumsum(written.sum(axis=1))[np.cumsum(lengths) - 1].tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def from_text(texts: Sequence[bytes]) -> tuple[Integers, Integers, NDArray[np.bool_]]:
    """Run lengths of compressed counts, those of which text each is, and which of the texts [T] are well-formed.

    Those of texts that are not add up to anything.
    """
    all_lengths = np.array([len(text) for text in texts])
    nonempty = np.flatnonzero(all_lengths)
    valid = np.ones(len(texts), np.bool_)
    if not len(nonempty):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), valid
    lengths = all_lengths[nonempty]
    characters = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    owner = np.repeat(nonempty, lengths)
    valid[owner[(characters < 0) | (characters > 63)]] = False

    is_last = (characters & 0x20) == 0
    text_ends = np.cumsum(lengths) - 1
    valid[nonempty[~is_last[text_ends]]] = False
    is_last[text_ends] = True  # keeps an unfinished value from running into the next text

    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    owner = owner[starts]
    valid[owner[digits > MOST_CHARACTERS]] = False
    place = np.minimum(np.arange(len(characters)) - np.repeat(starts, digits), MOST_CHARACTERS - 1)
    values = np.add.reduceat((characters & 0x1F) << (5 * place), starts)
    values -= np.where(characters[ends] & 0x10, np.left_shift(1, 5 * np.minimum(digits, MOST_CHARACTERS)), 0)

    number = np.bincount(owner, minlength=len(texts))[nonempty]
    firsts = np.cumsum(number) - number
    index = np.arange(len(values)) - np.repeat(firsts, number)
    odd, even = (np.cumsum(np.where(index % 2 == parity, values, 0)) for parity in (1, 0))
    odd -= np.repeat(odd[firsts], number)
    even -= np.repeat(even[firsts], number)
    runs = np.where(index == 0, values, np.where(index % 2 == 1, odd, even))
    wrong = (runs < 0) | (runs > np.iinfo(np.int32).max)
    valid[owner[wrong]] = False
    return np.where(wrong, 0, runs), owner, valid


def area_and_box(runs: Integers, height: int) -> tuple[int, list[int]]:
    """Pixels of a mask, and x, y, width, height of the smallest box around it (pycocotools' `toBbox`)."""
    ends = np.cumsum(runs)
    first, last = ends[:-1:2], ends[1::2] - 1
    if not len(first):
        return 0, [0, 0, 0, 0]
    left, right = int(first[0] // height), int(last[-1] // height)
    if (first // height < last // height).any():  # such a run is at the bottom of a column and the top of the next
        top, bottom = 0, height - 1
    else:
        top, bottom = int((first % height).min()), int((last % height).max())
    return int(runs[1::2].sum()), [left, top, right - left + 1, bottom - top + 1]


def encoded(runs: Sequence[Integers], height: int, width: int) -> Encoded:
    """Masks of an image of `height` by `width` pixels, of their run lengths."""
    rles: list[RLE] = [{"size": [height, width], "counts": text} for text in as_text(runs)]
    measured = [area_and_box(x, height) for x in runs]
    areas = torch.tensor([area for area, _ in measured], dtype=torch.int64)
    return Encoded(rles, areas, torch.tensor([box for _, box in measured], dtype=torch.int64).view(-1, 4))


def encode_bool(masks: Tensor) -> Encoded:
    """Masks [D, H, W], true where not 0."""
    pixels = masks.cpu().numpy() != 0
    height, width = masks.shape[1:]
    return encoded([run_lengths(mask, 0, 0, height, width) for mask in pixels], height, width)


def run_lengths_of(rles: Sequence[RLE]) -> tuple[Integers, Integers]:
    """Run lengths of all masks, whose counts are compressed or lists, and whose each is; ValueError if malformed."""
    lists = {i: rle["counts"] for i, rle in enumerate(rles) if not isinstance(rle["counts"], str | bytes)}
    texts = [b"" if i in lists else _as_bytes(rle["counts"]) for i, rle in enumerate(rles)]
    runs, owner, valid = from_text(texts)
    if lists:
        runs = np.concatenate([runs, *(np.array(counts, np.int64) for counts in lists.values())])
        owner = np.concatenate([owner, np.repeat(list(lists), [len(counts) for counts in lists.values()])])
        order = np.argsort(owner, kind="stable")
        runs, owner = runs[order], owner[order]
    covered = np.bincount(owner, runs, len(rles))
    for i, rle in enumerate(rles):
        height, width = rle["size"]
        if not valid[i] or covered[i] != height * width or min(lists.get(i, ()), default=0) < 0:
            raise ValueError(f"rles[{i}]: its counts are malformed, or not of a mask of {height} x {width}")
    return runs, owner


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts


def decode(rles: Sequence[RLE]) -> Tensor:
    """See `fastmrcnn.ops.decode`."""
    runs, owner = run_lengths_of(rles)
    ends = np.searchsorted(owner, np.arange(len(rles) + 1))
    masks = []
    for rle, start, end in zip(rles, ends[:-1], ends[1:], strict=True):
        height, width = rle["size"]
        pixels = np.repeat(np.arange(end - start) % 2 == 1, runs[start:end]).reshape(width, height)
        masks.append(torch.from_numpy(pixels).mT)
    return torch.stack(masks)


def encode_masks(
    masks: Tensor, boxes: Tensor, sizes: Sequence[tuple[int, int]], counts: Tensor | None, pasting: Pasting
) -> Callable[[], list[Encoded]]:
    """What `paste_masks` makes of each image, encoded; see `fastmrcnn.ops.begin_encoding`."""
    found = []
    for i, size in enumerate(sizes):
        pasted = paste_masks(masks[i : i + 1], boxes[i : i + 1], size, None, None, pasting, "bool")[0]
        found.append(encode_bool(pasted if counts is None else pasted[: int(counts[i])]))
    return lambda: found
