"""From class logits and box deltas of proposals to the detections of a batch of images, in two launches.

N images, K proposals, C classes with the background (class 0), D detections.  The first kernel finds the candidates:
pairs of a proposal and a class whose score is above the threshold and whose box is large enough.  There are few, so
only they are written, in no particular order, under keys that say all about rank: score, then proposal, then class.
The second kernel takes them in order of their keys, a chunk at a time, and ends when it has D survivors.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.selection import Selection
from fastmrcnn_kernels.triton.box_coding import clip, decode
from fastmrcnn_kernels.triton.elementary import exp
from fastmrcnn_kernels.triton.launch import cdiv, next_power_of_2, on_device_of
from fastmrcnn_kernels.triton.suppression import (
    BLOCK,
    CHUNK,
    LAUNCH_OPTIONS,
    as_word,
    bit_of,
    load_boxes,
    resolve,
    suppressed_by,
    suppressed_in_block,
)

TILE = 1024  # pairs of a proposal and a class that a program looks at, or one proposal's
SORTED = 256  # candidates that are put in order at a time
SCAN = 2048  # candidates that are looked at at a time


@triton.jit(do_not_specialize=["num_proposals", "capacity"])
def _candidates_kernel(
    keys_ptr,
    boxes_ptr,
    found_ptr,
    logits_ptr,
    deltas_ptr,
    proposals_ptr,
    counts_ptr,
    sizes_ptr,
    weights,
    score_threshold,
    min_size,
    num_proposals,
    capacity,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """keys[n, i], boxes[n, i]: candidates of image n, of which there are found[n].

    A program owns ROWS proposals of one image with all their classes, and reserves room for its candidates at once.
    """
    blocks = tl.cdiv(num_proposals, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    present = row < tl.minimum(tl.load(counts_ptr + image), num_proposals)
    c = tl.arange(0, BLOCK_C)
    proposal = image * num_proposals + row
    pair = (proposal * C)[:, None] + c[None, :]
    logit = tl.load(logits_ptr + pair, mask=present[:, None] & (c < C)[None, :], other=float("-inf")).to(tl.float32)
    share = exp(logit - tl.max(logit, axis=1)[:, None])
    score = tl.div_rn(share, tl.sum(share, axis=1)[:, None])
    candidate = (score > score_threshold) & present[:, None] & ((c > 0) & (c < C))[None, :]

    dx = tl.div_rn(tl.load(deltas_ptr + pair * 4, mask=candidate, other=0.0).to(tl.float32), weights[0])
    dy = tl.div_rn(tl.load(deltas_ptr + pair * 4 + 1, mask=candidate, other=0.0).to(tl.float32), weights[1])
    dw = tl.div_rn(tl.load(deltas_ptr + pair * 4 + 2, mask=candidate, other=0.0).to(tl.float32), weights[2])
    dh = tl.div_rn(tl.load(deltas_ptr + pair * 4 + 3, mask=candidate, other=0.0).to(tl.float32), weights[3])
    x1, y1, x2, y2 = load_boxes(proposals_ptr, proposal, present)
    x1, y1, x2, y2 = decode(dx, dy, dw, dh, x1[:, None], y1[:, None], x2[:, None], y2[:, None])
    height = tl.load(sizes_ptr + image * 2).to(tl.float32)
    width = tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
    x1, y1, x2, y2 = clip(x1, y1, x2, y2, width, height)
    candidate = candidate & (x2 - x1 >= min_size) & (y2 - y1 >= min_size)

    ones = tl.where(candidate, 1, 0)
    per_row = tl.sum(ones, axis=1)
    room = tl.atomic_add(found_ptr + image, tl.sum(per_row, axis=0), sem="relaxed")
    slot = (room + tl.cumsum(per_row, axis=0) - per_row)[:, None] + tl.cumsum(ones, axis=1) - 1
    stored = candidate & (slot < capacity)
    place = image * capacity + slot
    number = row[:, None] * (C - 1) + (c - 1)[None, :]
    key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (0x7FFFFFFF - number)
    tl.store(keys_ptr + place, key, mask=stored)
    tl.store(boxes_ptr + place * 4, x1, mask=stored)
    tl.store(boxes_ptr + place * 4 + 1, y1, mask=stored)
    tl.store(boxes_ptr + place * 4 + 2, x2, mask=stored)
    tl.store(boxes_ptr + place * 4 + 3, y2, mask=stored)


@triton.jit
def _count_keys(keys_ptr, total, least, end, SCAN: tl.constexpr):
    """How many of `total` keys are in [`least`, `end`)."""
    number = tl.zeros([SCAN], tl.int32)
    for first in range(0, total, SCAN):
        at = first + tl.arange(0, SCAN)
        key = tl.load(keys_ptr + at, mask=at < total, other=-1)
        number += tl.where((key >= least) & (key < end), 1, 0)
    return tl.sum(number, axis=0)


@triton.jit
def _next_chunk(keys_ptr, total, lowest, end, remaining, SORTED: tl.constexpr, SCAN: tl.constexpr):
    """The least key of the next chunk below `end`, and how many keys that makes: all, or SORTED / 2 .. SORTED.

    By bisection of the keys, which are unique.
    """
    low = lowest
    least = tl.where(remaining <= SORTED, lowest, end)
    number = tl.where(remaining <= SORTED, remaining, 0)
    while (number < SORTED // 2) & (number < remaining):
        middle = low + ((least - low) >> 1)
        wider = _count_keys(keys_ptr, total, middle, end, SCAN)
        fits = wider <= SORTED
        low = tl.where(fits, low, middle)
        least = tl.where(fits, middle, least)
        number = tl.where(fits, wider, number)
    return least, number


@triton.jit
def _sort_chunk(
    order_ptr, chunk_ptr, source_ptr, keys_ptr, total, least, end, number, SORTED: tl.constexpr, SCAN: tl.constexpr
):
    """Where the `number` keys in [`least`, `end`) are, in descending order, at `order_ptr`."""
    filled = number * 0
    for first in range(0, total, SCAN):
        at = first + tl.arange(0, SCAN)
        key = tl.load(keys_ptr + at, mask=at < total, other=-1)
        taken = tl.where((key >= least) & (key < end), 1, 0)
        slot = filled + tl.cumsum(taken, axis=0) - 1
        tl.store(chunk_ptr + slot, key, mask=taken != 0)
        tl.store(source_ptr + slot, at, mask=taken != 0)
        filled += tl.sum(taken, axis=0)
    tl.debug_barrier()  # what follows reads what other threads wrote
    slot = tl.arange(0, SORTED)
    mine = tl.load(chunk_ptr + slot, mask=slot < number, other=-1)
    rank = tl.zeros([SORTED], tl.int32)
    for first in range(0, number, 32):
        other = first + tl.arange(0, 32)
        key = tl.load(chunk_ptr + other, mask=other < number, other=-1)
        rank += tl.sum(tl.where(key[None, :] > mine[:, None], 1, 0), axis=1)
    tl.store(order_ptr + rank, tl.load(source_ptr + slot, mask=slot < number, other=0), mask=slot < number)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["lowest", "highest", "capacity", "max_keep"])
def _select_detections_kernel(
    out_boxes_ptr,
    out_scores_ptr,
    out_labels_ptr,
    out_count_ptr,
    keys_ptr,
    boxes_ptr,
    found_ptr,
    chunk_ptr,
    source_ptr,
    order_ptr,
    threshold,
    lowest,
    highest,
    capacity,
    max_keep,
    C: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SORTED: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Greedy suppression of candidates by descending key, per class if GROUPED, until `max_keep` are kept.

    A program owns one image.  The kept boxes in the result are those that later candidates are compared with.
    """
    image = tl.program_id(0).to(tl.int64)
    keys_ptr += image * capacity
    boxes_ptr += image * capacity * 4
    chunk_ptr += image * SORTED
    source_ptr += image * SORTED
    order_ptr += image * SORTED
    out_boxes_ptr += image * max_keep * 4
    out_scores_ptr += image * max_keep
    out_labels_ptr += image * max_keep
    place = tl.arange(0, BLOCK)

    total = tl.minimum(tl.load(found_ptr + image), capacity)
    remaining = total
    kept = total * 0
    end = highest + image * 0
    while (remaining > 0) & (kept < max_keep):
        least, number = _next_chunk(keys_ptr, total, lowest + image * 0, end, remaining, SORTED, SCAN)
        _sort_chunk(order_ptr, chunk_ptr, source_ptr, keys_ptr, total, least, end, number, SORTED, SCAN)
        first = number * 0
        while (first < number) & (kept < max_keep):
            usable = first + place < number
            source = tl.load(order_ptr + first + place, mask=usable, other=0).to(tl.int64)
            key = tl.load(keys_ptr + source, mask=usable, other=0)
            label = (0x7FFFFFFF - (key & 0x7FFFFFFF)) % (C - 1) + 1
            x1, y1, x2, y2 = load_boxes(boxes_ptr, source, usable)
            found = suppressed_by(
                out_boxes_ptr, out_labels_ptr, 0, kept, x1, y1, x2, y2, label, threshold, GROUPED, CHUNK
            )
            within = suppressed_in_block(x1, y1, x2, y2, label, threshold, GROUPED)
            chosen = tl.where(bit_of(resolve(within, as_word(usable & ~found)), place.to(tl.int64)), 1, 0)
            slot = kept + tl.cumsum(chosen, axis=0) - 1
            stored = (chosen != 0) & (slot < max_keep)
            tl.store(out_boxes_ptr + slot * 4, x1, mask=stored)
            tl.store(out_boxes_ptr + slot * 4 + 1, y1, mask=stored)
            tl.store(out_boxes_ptr + slot * 4 + 2, x2, mask=stored)
            tl.store(out_boxes_ptr + slot * 4 + 3, y2, mask=stored)
            tl.store(out_scores_ptr + slot, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=stored)
            tl.store(out_labels_ptr + slot, label, mask=stored)
            kept = tl.minimum(kept + tl.sum(chosen, axis=0), max_keep)
            first += BLOCK
            tl.debug_barrier()
        end = least
        remaining -= number

    tl.store(out_count_ptr + image, kept.to(tl.int64))
    for first in range(kept, max_keep, BLOCK):
        slot = first + place
        for side in tl.static_range(4):
            tl.store(out_boxes_ptr + slot * 4 + side, 0.0, mask=slot < max_keep)
        tl.store(out_scores_ptr + slot, 0.0, mask=slot < max_keep)
        tl.store(out_labels_ptr + slot, 0, mask=slot < max_keep)


def key_of(score: float) -> int:
    """The least key of candidates with this score, or more."""
    return struct.unpack("i", struct.pack("f", max(score, 0.0)))[0] << 32


def most_candidates(num_classes: int, score_threshold: float) -> int:
    """How many classes of a proposal can have a score above the threshold: scores add up to 1, but for rounding."""
    limit = int(1 / score_threshold) + 1 if score_threshold > 1e-4 else num_classes - 1
    return min(num_classes - 1, limit)


def select_detections(
    logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor, *selection: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes [N, D, 4], scores [N, D], labels [N, D] and counts [N]; `selection` is what a `Selection` holds."""
    score_threshold, iou_threshold, max_detections, min_size, weights, class_agnostic = Selection(*selection)
    (num_images, num_proposals, num_classes), device = logits.shape, logits.device
    boxes = torch.empty(num_images, max_detections, 4, device=device)
    scores = torch.empty(num_images, max_detections, device=device)
    labels = torch.empty(num_images, max_detections, dtype=torch.int64, device=device)
    count = torch.empty(num_images, dtype=torch.int64, device=device)
    found = torch.zeros(num_images, dtype=torch.int32, device=device)
    capacity = num_proposals * most_candidates(num_classes, score_threshold)
    keys = torch.empty(num_images, capacity, dtype=torch.int64, device=device)
    candidates = torch.empty(num_images, capacity, 4, device=device)
    scratch = torch.empty(num_images, SORTED, dtype=torch.int64, device=device)
    numbers = torch.empty(2, num_images, SORTED, dtype=torch.int32, device=device)
    block_c = next_power_of_2(num_classes)
    rows = max(TILE // block_c, 1)
    if num_images == 0:
        return boxes, scores, labels, count
    with on_device_of(logits):
        if capacity:
            _candidates_kernel[(num_images * cdiv(num_proposals, rows),)](
                keys,
                candidates,
                found,
                logits.contiguous(),
                deltas.contiguous(),
                proposals.float().contiguous(),
                counts.contiguous(),
                sizes.contiguous(),
                tuple(map(float, weights)),
                score_threshold,
                min_size,
                num_proposals,
                capacity,
                num_classes,
                rows,
                block_c,
                **LAUNCH_OPTIONS,
            )
        _select_detections_kernel[(num_images,)](
            boxes,
            scores,
            labels,
            count,
            keys,
            candidates,
            found,
            scratch,
            numbers[0],
            numbers[1],
            iou_threshold,
            key_of(score_threshold),
            key_of(1.0) + (1 << 32),
            capacity,
            max_detections,
            max(num_classes, 2),
            not class_agnostic,
            BLOCK,
            CHUNK,
            SORTED,
            SCAN,
            **LAUNCH_OPTIONS,
        )
    return boxes, scores, labels, count
