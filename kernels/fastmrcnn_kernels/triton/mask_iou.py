"""Intersection over union of packed masks, all pairs: counts of common bits, then their quotients.

Counts are exact and quotients correctly rounded, so results are bit-equal to those of `reference/bits.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.launch import cdiv, on_device_of

TILE = 8  # masks of either side whose pairs a program owns
WORDS = 128  # of each mask, per step of a program
PROGRAMS = 1024  # that share the words of a few masks
BLOCK = 256  # quotients of a program

LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _population(words):
    """How many bits of each uint32 are set.  Compilers know these steps, and make an instruction of them."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _load_masks(words_ptr, mask, count, word, words):
    """Words, uint32, number `word` of masks number `mask`, broadcast: 0 beyond the last, all bits in mask `count`."""
    found = tl.load(words_ptr + mask.to(tl.int64) * words + word, mask=(mask < count) & (word < words), other=0)
    return tl.where(mask == count, -1, found).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["num_a", "num_b", "words", "share"])
def _mask_counts_kernel(counts_ptr, a_ptr, b_ptr, num_a, num_b, words, share, TILE: tl.constexpr, WORDS: tl.constexpr):
    """counts[i, j]: how many bits masks a_i and b_j have in common, added to what is there.

    One more mask on either side is full: what others have in common with it are their areas, counts[i, num_b] and
    counts[num_a, j].

    A program owns TILE x TILE pairs and `share` of their words, whole steps of WORDS: it keeps a count per place of a
    step, and adds them up at the end.
    """
    tiles = tl.cdiv(num_b + 1, TILE)
    a = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    b = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    begin = tl.program_id(1) * share
    found = tl.zeros([TILE, TILE, WORDS], tl.uint32)
    for first in range(begin, tl.minimum(begin + share, words), WORDS):
        word = (first + tl.arange(0, WORDS))[None, None, :]
        of_a = _load_masks(a_ptr, a[:, None, None], num_a, word, words)
        of_b = _load_masks(b_ptr, b[None, :, None], num_b, word, words)
        found += _population(of_a & of_b)
    place = a[:, None].to(tl.int64) * (num_b + 1) + b[None, :]
    count = tl.sum(found, axis=2).to(tl.int32)
    tl.atomic_add(counts_ptr + place, count, mask=(a[:, None] <= num_a) & (b[None, :] <= num_b), sem="relaxed")


@triton.jit(do_not_specialize=["num_a", "num_b"])
def _mask_iou_kernel(iou_ptr, counts_ptr, crowd_ptr, num_a, num_b, BLOCK: tl.constexpr):
    """iou[i, j] = counts[i, j] / union, which is the area of a_i where b_j is a crowd; 0 where that is.

    A program owns BLOCK pairs.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    usable = pair < num_a.to(tl.int64) * num_b
    a = pair // num_b
    b = pair % num_b
    common = tl.load(counts_ptr + a * (num_b + 1) + b, mask=usable, other=0)
    union = tl.load(counts_ptr + a * (num_b + 1) + num_b, mask=usable, other=0)
    rest = tl.load(counts_ptr + num_a.to(tl.int64) * (num_b + 1) + b, mask=usable, other=0) - common
    if crowd_ptr is not None:
        rest = tl.where(tl.load(crowd_ptr + b, mask=usable, other=0) != 0, 0, rest)
    union = tl.maximum(union + rest, 1)
    tl.store(iou_ptr + pair, tl.div_rn(common.to(tl.float32), union.to(tl.float32)), mask=usable)


def mask_iou(a: Tensor, b: Tensor, crowd: Tensor | None) -> Tensor:
    """float32 [A, B] of bits [A, H, Wb] and [B, H, Wb], as the reference returns it."""
    num_a, num_b, words = len(a), len(b), a.shape[1] * a.shape[2]
    iou = torch.zeros(num_a, num_b, dtype=torch.float32, device=a.device)
    if not (num_a and num_b and words):
        return iou
    counts = torch.zeros(num_a + 1, num_b + 1, dtype=torch.int32, device=a.device)
    tiles = cdiv(num_a + 1, TILE) * cdiv(num_b + 1, TILE)
    share = cdiv(cdiv(words, WORDS), max(1, PROGRAMS // tiles)) * WORDS
    with on_device_of(a):
        _mask_counts_kernel[(tiles, cdiv(words, share))](
            counts, a.contiguous(), b.contiguous(), num_a, num_b, words, share, TILE, WORDS, **LAUNCH_OPTIONS
        )
        _mask_iou_kernel[(cdiv(num_a * num_b, BLOCK),)](
            iou, counts, None if crowd is None else crowd.contiguous(), num_a, num_b, BLOCK, **LAUNCH_OPTIONS
        )
    return iou
