"""Images of bytes, resized by the rules of other libraries: the same bytes, on any device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FRACTION_BITS = 22
"""Of the fixed-point weights that Pillow has for bytes."""


def resize_like_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`Image.resize` with `BILINEAR`, byte by byte: a triangle as wide as two pixels of the smaller of the two images.

    Columns first, rounded to bytes, then rows, by weights of 22 bits each.

    Args:
        image: uint8 [C, H, W].
        size: (height, width) of the result.

    Returns:
        uint8 [C, height, width].
    """
    for axis in (2, 1):
        before, after = image.shape[axis], size[axis - 1]
        if before != after:
            image = _resample(image, axis, before, after)
    return image


def _resample(image: Tensor, axis: int, before: int, after: int) -> Tensor:
    taps = [(torch.tensor(pixels), torch.tensor(weights)) for pixels, weights in pillow_taps(before, after)]
    shape = [1, 1, 1]
    shape[axis] = after
    total = torch.full((), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=image.device)
    for pixels, weights in taps:
        chosen = image.index_select(axis, pixels.to(image.device, non_blocking=True)).to(torch.int32)
        total = total + chosen * weights.to(image.device, torch.int32, non_blocking=True).view(shape)
    return (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def pillow_taps(before: int, after: int) -> list[tuple[list[int], list[int]]]:
    """The k-th pixel that each of `after` pixels is made of, and its weight, for each k; weight 0 where there is none.

    After `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow, in double precision as there.
    """
    scale = before / after
    support = max(scale, 1.0)
    rows: list[tuple[int, list[int]]] = []
    for i in range(after):
        center = (i + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        end = min(before, int(center + support + 0.5))
        weights = [max(0.0, 1.0 - abs((x - center + 0.5) * (1.0 / support))) for x in range(first, end)]
        total = sum(weights)
        rows.append((first, [int(0.5 + w / total * (1 << FRACTION_BITS)) for w in weights]))
    most = max(len(weights) for _, weights in rows)
    taps = []
    for k in range(most):
        pixels = [min(first + k, before - 1) for first, _ in rows]
        taps.append((pixels, [weights[k] if k < len(weights) else 0 for _, weights in rows]))
    return taps


def resize_like_opencv(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`cv2.resize` with `INTER_LINEAR`, byte by byte: the four pixels around each centre, also where the image shrinks.

    Weights have 11 bits, and sums lose some on the way, as OpenCV's arithmetic for bytes has it.

    Args:
        image: uint8 [C, H, W].
        size: (height, width) of the result.

    Returns:
        uint8 [C, height, width].
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    first, second, share, rest = (_sent(x, image.device) for x in opencv_taps(image.shape[2], size[1], True))
    columns = image.to(torch.int32)
    columns = columns[:, :, first] * share + columns[:, :, second] * rest
    columns = columns >> 4
    first, second, share, rest = (_sent(x, image.device) for x in opencv_taps(image.shape[1], size[0], False))
    above = (columns[:, first] * share[:, None]) >> 16
    below = (columns[:, second] * rest[:, None]) >> 16
    return ((above + below + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True)


@lru_cache(maxsize=256)
def opencv_taps(before: int, after: int, stays_inside: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two pixels that each of `after` pixels is made of, int32, and their weights of 11 bits, int32.

    At borders columns have one pixel (`stays_inside`), and rows the same one twice, which rounds otherwise.
    """
    scale = 1.0 / (after / before)
    position = ((torch.arange(after, dtype=torch.float64) + 0.5) * scale - 0.5).float()
    pixel = position.floor()
    share = position - pixel
    if stays_inside:
        share = torch.where((pixel < 0) | (pixel >= before - 1), 0, share)
    one = 1 << 11
    weights = ((1 - share) * one).round().int(), (share * one).round().int()
    first = pixel.int()
    if stays_inside:
        first = first.clamp(0, before - 1)
    return first.clamp(0, before - 1), (first + 1).clamp(0, before - 1), *weights


def resize_like_skimage(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`skimage.transform.resize` of order 1 without anti-aliasing, and what matterport makes of it: truncated bytes.

    Bilinear in double precision; what lies outside the image counts as 0, so that a border that is enlarged darkens,
    as far as the darkest pixel.

    Args:
        image: uint8 [C, H, W].
        size: (height, width) of the result.

    Returns:
        uint8 [C, height, width].
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    pixels = image.double()
    for axis in (1, 2):
        before, after = image.shape[axis], size[axis - 1]
        if before == after:
            continue
        position = (torch.arange(after, dtype=torch.float64, device=image.device) + 0.5) * (before / after) - 0.5
        pixel = position.floor()
        share = position - pixel
        shape = [1, 1, 1]
        shape[axis] = after
        total: Tensor | float = 0.0
        for number, weight in ((pixel.long(), 1 - share), (pixel.long() + 1, share)):
            weight = torch.where((number >= 0) & (number < before), weight, 0)
            total = total + pixels.index_select(axis, number.clamp(0, before - 1)) * weight.view(shape)
        assert isinstance(total, Tensor)
        pixels = total
    return pixels.clamp(image.amin().double(), image.amax().double()).to(torch.uint8)
