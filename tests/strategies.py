"""Hypothesis strategies for boxes, RoIs, scores, features and padded segments, hostile ones included; and where and
how often kernels are tried on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Of kernels under test.  On a CPU Triton interprets them, at 5 to 50 ms per program."""
DEFAULT_EXAMPLES = 40
UNSHRUNK = (Phase.explicit, Phase.generate)


def examples(compiled: int, *, interpreted: int) -> settings:
    """How many a kernel is tried on, or fewer by `--hypothesis-profile few`.

    The interpreter does not shrink those that fail, which would take minutes.
    """
    wanted, limit = compiled if DEVICE == "cuda" else interpreted, settings().max_examples
    count = min(wanted, limit) if limit < DEFAULT_EXAMPLES else wanted
    return settings(max_examples=count) if DEVICE == "cuda" else settings(max_examples=count, phases=UNSHRUNK)


SAMPLERS: list[dict[str, Any]] = [
    {"sampling_ratio": 2},
    {"sampling_ratio": 2, "aligned": True},
    {"sampling_ratio": 3, "aligned": True},
    {"sampling_ratio": 0},
    {"sampling_ratio": -1, "aligned": True},
    {"sampling_ratio": 1, "interpolation": "bicubic"},
    {"sampling_ratio": 0, "interpolation": "bicubic", "aligned": True},
    {"sampling": "corner"},
    {"sampling": "corner", "interpolation": "bicubic", "aligned": True},
]
"""Of RoIAlign: every way of sampling."""

ODD_BOXES = [
    [0.0, 0.0, 0.0, 0.0],
    [5.0, 5.0, 5.0, 9.0],
    [9.0, 9.0, 4.0, 2.0],
    [-30.0, -20.0, 10.0, 12.0],
    [0.0, 0.0, 1e6, 1e6],
    [1e6, 1e6, 1e6 + 7, 1e6 + 9],
    [3.0, 4.0, 3.0 + 1e-4, 4.0 + 1e-4],
]
NOT_FINITE = [[torch.nan] * 4, [torch.nan, 0.0, 5.0, 5.0], [0.0, 0.0, torch.inf, 5.0], [-torch.inf, 0.0, 5.0, 5.0]]


@st.composite
def boxes(draw: st.DrawFn, count: int | None = None, extent: float = 64.0, *, not_finite: bool = False) -> Tensor:
    """Boxes [count, 4] float32 about an image of `extent` pixels, odd ones and duplicates among them."""
    count = draw(st.integers(0, 12)) if count is None else count
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    start = (torch.rand(count, 2, generator=generator) * 1.2 - 0.1) * extent
    result = torch.cat((start, start + torch.rand(count, 2, generator=generator) * extent * 0.6), dim=1)
    if draw(st.booleans()):  # whole pixels: ties and exact edges
        result = result.round()
    odd = ODD_BOXES + (NOT_FINITE if not_finite else [])
    for i in draw(st.lists(st.integers(0, max(count - 1, 0)), max_size=4)) if count else []:
        result[i] = torch.tensor(draw(st.sampled_from(odd))) if draw(st.booleans()) else result[0]
    return result


def ordered(found: Tensor, least: float = 0.0) -> Tensor:
    """`found` [..., 4] with x2 >= x1 + `least` and y2 >= y1 + `least`."""
    return torch.cat((found[..., :2], torch.maximum(found[..., :2] + least, found[..., 2:])), dim=-1)


@st.composite
def rois(draw: st.DrawFn, images: int, *, limit: float = torch.inf, inverted: bool = True) -> Tensor:
    """RoIs [R, 5] float32 about an image of 80 pixels; batch index -1 .. `images` - 1, -1 being padding."""
    found = draw(boxes(extent=80.0)).clamp(-limit, limit)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    index = torch.randint(-1, images, (len(found), 1), generator=generator).float()
    return torch.cat((index, found if inverted else ordered(found)), dim=1)


def extreme_rois(height: int, width: int) -> Tensor:
    """RoIs [R, 5] of a map: all of it and more, points, inverted ones, coordinates that leave float32 no fractions."""
    return torch.tensor(
        [
            [0, 0, 0, width, height],
            [0, -0.5, -0.5, width - 0.5, height - 0.5],
            [0, -20_000, -20_000, 20_000, 20_000],
            [0, 0, 0, 40_000, 40_000],
            [0, 39_990, 39_990, 40_000, 40_000],
            [0, 0.5, 0.5, 0.5, 0.5],
            [0, 9, 9, -4, -2],
            [0, -1e30, -1e30, 1e30, 1e30],
            [0, 3e38, -3e38, -3e38, 3e38],
        ]
    )


@st.composite
def scores(draw: st.DrawFn, count: int) -> Tensor:
    """Scores [count] float32: often tied, some of them NaN, infinite or a negative zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    result = torch.rand(count, generator=generator)
    if draw(st.booleans()):
        result = (result * 4).round() / 4
    for i in draw(st.lists(st.integers(0, max(count - 1, 0)), max_size=4)) if count else []:
        result[i] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]))
    return result


@st.composite
def features(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features [N, C, H, W]: odd sizes, single cells, channels_last and strided memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 19), st.integers(1, 23)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    if layout == "strided":
        wide = torch.randn(*shape[:3], 2 * shape[3], generator=generator, dtype=torch.float64).to(dtype)
        return wide[..., ::2]
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else values


class Segments(NamedTuple):
    """Padded segments: boxes [S, K, 4], scores [S, K] and which slots count, bool [S, K]."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@st.composite
def segments(draw: st.DrawFn, most: int = 40) -> Segments:
    """Segments of up to `most` slots, boxes and scores as hostile as they come; padding is NaN, infinite or huge."""
    count, slots = draw(st.integers(1, 4)), draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    all_boxes = draw(boxes(count * slots, extent=24.0, not_finite=True)).view(count, slots, 4)
    all_scores = draw(scores(count * slots)).view(count, slots)
    valid = torch.rand(count, slots, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    garbage = draw(st.sampled_from([torch.nan, torch.inf, 1e9]))
    return Segments(torch.where(valid[..., None], all_boxes, garbage), torch.where(valid, all_scores, garbage), valid)
