"""Packed masks by NumPy: the fast implementation on a CPU."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn_kernels.pasting import WORD
from fastmrcnn_kernels.reference.bits import ratio

WORDS_AT_A_TIME = 1 << 19
"""Of 64 bits, of all masks that one is compared with: 4 MB, about as much as caches hold."""


def pack_bits(mask: Tensor) -> Tensor:
    """`fastmrcnn_kernels.reference.bits.pack_bits` of a tensor in CPU memory."""
    octets = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    words = np.zeros((*mask.shape[:-1], -(-mask.shape[-1] // WORD)), "<i4")
    words.view(np.uint8)[..., : octets.shape[-1]] = octets
    return torch.from_numpy(words.astype(np.int32, copy=False))


def unpack_bits(bits: Tensor, width: int) -> Tensor:
    """`fastmrcnn_kernels.reference.bits.unpack_bits` of a tensor in CPU memory."""
    octets = bits.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=-1, count=width, bitorder="little").view(np.bool_))


def count_bits(bits: Tensor) -> Tensor:
    """`fastmrcnn_kernels.reference.bits.count_bits` of a tensor in CPU memory."""
    return torch.from_numpy(np.asarray(count(_rows(bits)).sum(axis=-1, dtype=np.int64)))


def mask_iou(a: Tensor, b: Tensor, crowd: Tensor | None = None) -> Tensor:
    """`fastmrcnn_kernels.reference.bits.mask_iou` of tensors in CPU memory."""
    return ratio(torch.from_numpy(_intersections(_rows(a), _rows(b))), count_bits(a), count_bits(b), crowd)


def _rows(bits: Tensor) -> NDArray[np.unsignedinteger]:
    """Masks as rows of 64 bits, or of 32 where their number is odd."""
    words = bits.flatten(-2).contiguous().numpy()
    return words.view(np.uint32 if words.shape[-1] % 2 else np.uint64)


def _intersections(a: NDArray[np.unsignedinteger], b: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """How many bits rows of both have in common."""
    found = np.zeros((len(a), len(b)), np.int64)
    words = max(1, WORDS_AT_A_TIME // max(1, len(b)))
    for first in range(0, a.shape[1], words):
        block = np.ascontiguousarray(b[:, first : first + words])
        for row, total in zip(a[:, first : first + words], found, strict=True):
            total += count(row & block).sum(axis=1, dtype=np.uint32)
    return found


def count_by_table(words: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """How many bits are set, per 16 of them: for NumPy before 2.0."""
    return np.take(_table(), words.view(np.uint16))


@cache
def _table() -> NDArray[np.uint8]:
    """How many bits of numbers of 16 bits are set."""
    octets = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    return np.unpackbits(octets, axis=1).sum(axis=1, dtype=np.uint8)


count = getattr(np, "bitwise_count", count_by_table)
