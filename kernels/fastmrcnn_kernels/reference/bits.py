"""Masks of one bit per pixel: packing, areas, overlaps and boundaries.

Packed masks, `bits`, are int32 [..., H, ceil(W / 32)]: pixel 32 w + k of a row is bit k of its word w, the least
significant being bit 0.  Bits beyond the width W are zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmrcnn_kernels.pasting import WORD

PIXELS_AT_A_TIME = 1 << 23
"""How many are unpacked to float32, 32 MB, to count intersections; fewer than 2^24, up to which it counts exactly."""


def pack_bits(mask: Tensor) -> Tensor:
    """Bits, int32 [..., H, ceil(W / 32)], of bool `mask` [..., H, W]."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % WORD))
    words = padded.shape[-1] // WORD
    bits = padded.unflatten(-1, (words * 4, 8)) << _range(8, 1, padded)
    octets = bits.sum(dim=-1, dtype=torch.uint8).unflatten(-1, (words, 4)).to(torch.int32)
    return (octets << _range(4, 8, octets)).sum(dim=-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, width: int) -> Tensor:
    """Bool mask [..., H, `width`] of `bits` [..., H, ceil(width / 32)]."""
    octets = (bits[..., None] >> _range(4, 8, bits) & 255).to(torch.uint8)
    pixels = octets[..., None] >> _range(8, 1, octets) & 1
    return pixels.flatten(-3)[..., :width].bool()


def _range(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


def count_bits(bits: Tensor) -> Tensor:
    """Areas, int64 [...], of `bits` [..., H, Wb]: counts within 2, 4, 8 and all 32 bits of each word, then of words."""
    pairs = bits - (bits >> 1 & 0x55555555)
    nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    octets = (nibbles & 0x0F0F0F0F) + (nibbles >> 4 & 0x0F0F0F0F)
    return (octets * 0x01010101 >> 24).sum(dim=(-2, -1))


def mask_iou(a: Tensor, b: Tensor, crowd: Tensor | None = None) -> Tensor:
    """Intersection over union of all pairs of masks, as `pycocotools.mask.iou(a, b, crowd)`.

    Args:
        a: bits [A, H, Wb].
        b: bits [B, H, Wb].
        crowd: which of `b` are crowds, bool [B]: there the area of a stands for that of the union.

    Returns:
        float32 [A, B], the quotient of exact counts; 0 where the divisor is.
    """
    return ratio(_intersections(a.flatten(1), b.flatten(1)), count_bits(a), count_bits(b), crowd)


def ratio(intersections: Tensor, areas_a: Tensor, areas_b: Tensor, crowd: Tensor | None) -> Tensor:
    """What `mask_iou` makes of counts, int64 [A, B], [A] and [B]."""
    union = areas_a[:, None] + areas_b - intersections
    if crowd is not None:
        union = torch.where(crowd, areas_a[:, None], union)
    return intersections.float() / union.clamp(min=1).float()


def _intersections(a: Tensor, b: Tensor) -> Tensor:
    """How many bits both have, int64 [A, B], of words [A, L] and [B, L]: products of matrices of zeros and ones."""
    found = torch.zeros(len(a), len(b), dtype=torch.int64, device=a.device)
    words = max(1, PIXELS_AT_A_TIME // (WORD * max(1, len(a) + len(b))))
    for first in range(0, a.shape[1], words):
        part = torch.zeros(found.shape, device=a.device)
        x, y = (unpack_bits(bits[:, first : first + words], words * WORD).float() for bits in (a, b))
        found += part.addmm_(x, y.T).long()  # in place: autocast would round a new matrix to 16 bits
    return found


def mask_boundary(bits: Tensor, distance: int) -> Tensor:
    """Bits of those pixels of masks [..., H, Wb] that are within `distance` pixels of their outside.

    The distance is the chessboard metric's, and all beyond the image is outside: mask minus `erode`.  That is the
    boundary of Boundary IoU (Cheng et al., CVPR 2021) as its authors compute it.
    """
    return bits & ~erode(bits, distance)


def erode(bits: Tensor, distance: int) -> Tensor:
    """Bits of those pixels of masks [..., H, Wb] that are more than `distance` pixels from their outside.

    Erosion by a square of 2 `distance` + 1 pixels, or by one of 3 x 3 `distance` times, in O(log distance) passes.
    """
    for shifted in (_shifted_columns, _shifted_rows):
        bits = shifted(_all_in_window(bits, 2 * distance + 1, shifted), -distance)
    return bits


def _all_in_window(bits: Tensor, length: int, shifted: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Whether a pixel and the `length` - 1 after it are all set: windows are joined to ones of twice their length."""
    reached = 1
    while reached < length:
        step = min(reached, length - reached)
        bits = bits & shifted(bits, step)
        reached += step
    return bits


def _shifted_rows(bits: Tensor, by: int) -> Tensor:
    """Row y + `by` in place of row y; zeros where there is none."""
    by = max(-bits.shape[-2], min(by, bits.shape[-2]))
    return F.pad(bits, (0, 0, -by, by))


def _shifted_columns(bits: Tensor, by: int) -> Tensor:
    """Pixel x + `by` of each row in place of pixel x; zeros where there is none."""
    words, rest = divmod(by, WORD)
    first = _shifted_words(bits, words)
    if rest == 0:
        return first
    low = first >> rest & (1 << WORD - rest) - 1  # without the copies of the sign bit that come from the left
    return low | _shifted_words(bits, words + 1) << WORD - rest


def _shifted_words(bits: Tensor, by: int) -> Tensor:
    """Word w + `by` of each row in place of word w; zeros where there is none."""
    by = max(-bits.shape[-1], min(by, bits.shape[-1]))
    return F.pad(bits, (-by, by))
