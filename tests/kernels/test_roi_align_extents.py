"""RoIAlign of maps of which each image fills a part: as if the rest were not there, whatever it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, SAMPLERS, examples, extreme_rois, rois
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor

from fastmrcnn import ops

SCALES = [0.5, 0.25]


def filled(extents: Tensor, dtype: torch.dtype, garbage: float, seed: int) -> list[Tensor]:
    """Maps of two levels, [N, 3, 20, 22] and [N, 3, 10, 11], with `garbage` beyond the `extents` of each image."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for level, shape in enumerate([(20, 22), (10, 11)]):
        values = torch.randn(len(extents), 3, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for image, (rows, columns) in enumerate(extents[:, level].tolist()):
            values[image, :, rows:] = garbage
            values[image, :, :, columns:] = garbage
        maps.append(values)
    return maps


def alone(maps: list[Tensor], extents: Tensor, boxes: Tensor, sampler: dict[str, Any]) -> Tensor:
    """What the reference pools from each image's part of the maps, cut out."""
    pooled = maps[0].new_zeros(len(boxes), 3, 3, 2)
    for image in range(len(extents)):
        here = (boxes[:, 0] == image).nonzero().flatten()
        parts = [m[image : image + 1, :, :r, :c] for m, (r, c) in zip(maps, extents[image].tolist(), strict=True)]
        if all(part.numel() for part in parts):
            found = torch.cat((torch.zeros(len(here), 1, dtype=boxes.dtype), boxes[here, 1:]), dim=1)
            pooled[here] = ops.multilevel_roi_align(
                parts, found, (3, 2), SCALES, impl="reference", canonical_scale=12, canonical_level=1, **sampler
            )
    return pooled


def pool(maps: list[Tensor], extents: Tensor, boxes: Tensor, sampler: dict[str, Any], impl: ops.Impl) -> Tensor:
    device = DEVICE if impl == "triton" else "cpu"
    return ops.multilevel_roi_align(
        [m.to(device) for m in maps],
        boxes.to(device),
        (3, 2),
        SCALES,
        canonical_scale=12,
        canonical_level=1,
        extents=extents.to(device),
        impl=impl,
        **sampler,
    ).cpu()


@st.composite
def parts(draw: st.DrawFn) -> Tensor:
    """Extents of two images at both levels, empty ones among them."""
    rows = draw(st.lists(st.integers(0, 20), min_size=2, max_size=2))
    columns = draw(st.lists(st.integers(0, 22), min_size=2, max_size=2))
    fine = torch.tensor([rows, columns]).T
    return torch.stack((fine, (fine + 1) // 2), dim=1)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@examples(40, interpreted=40)
@given(data=st.data(), extents=parts())
def test_reference(sampler: dict[str, Any], data: st.DataObject, extents: Tensor) -> None:
    maps = filled(extents, torch.float64, 1e3, data.draw(st.integers(0, 100)))
    boxes = data.draw(rois(2)).double()
    found = pool(maps, extents, boxes, sampler, "reference")
    assert_exact_arithmetic(found, alone(maps, extents, boxes, sampler), scale=100)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@examples(60, interpreted=4)
@given(data=st.data(), extents=parts(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_kernel(sampler: dict[str, Any], data: st.DataObject, extents: Tensor, dtype: torch.dtype) -> None:
    """It does not read beyond, where there is NaN."""
    maps = filled(extents, dtype, torch.nan, data.draw(st.integers(0, 100)))
    boxes = data.draw(rois(2))
    exact = alone([m.double() for m in maps], extents, boxes.double(), sampler)
    assert_within_budget(pool(maps, extents, boxes, sampler, "triton"), alone(maps, extents, boxes, sampler), exact)


@pytest.mark.parametrize("sampler", SAMPLERS[:2], ids=str)
def test_extreme_rois(sampler: dict[str, Any]) -> None:
    extents = torch.tensor([[[13, 9], [7, 5]], [[20, 22], [10, 11]]])
    maps = filled(extents, torch.float32, torch.nan, 0)
    slivers = torch.tensor([[0, 17.9, 3, 18, 20], [0, 17.9, 25.9, 18, 26], [0, 18, 26, 18, 26], [0, 18.1, 0, 21, 9]])
    boxes = torch.cat((extreme_rois(13, 9), slivers))
    exact = alone([m.double() for m in maps], extents, boxes.double(), sampler)
    assert_within_budget(pool(maps, extents, boxes, sampler, "triton"), alone(maps, extents, boxes, sampler), exact)


def test_what_has_no_extents() -> None:
    maps, extents, boxes = [torch.zeros(1, 3, 4, 4)], torch.ones(1, 1, 2, dtype=torch.int64), torch.zeros(1, 5)
    for impl in ("torchvision", "torch"):
        with pytest.raises(NotImplementedError, match=f"impl='{impl}' has no extents"):
            ops.multilevel_roi_align(maps, boxes, 2, [1.0], extents=extents, impl=impl)
    with pytest.raises(ValueError, match=r"extents: expected shape \[1, 1, 2\]"):
        ops.multilevel_roi_align(maps, boxes, 2, [1.0], extents=extents[0])
    learning = [maps[0].to(DEVICE).requires_grad_()]
    with pytest.raises(NotImplementedError, match="extents the kernel has no gradient"):
        ops.multilevel_roi_align(learning, boxes.to(DEVICE), 2, [1.0], extents=extents.to(DEVICE), impl="triton")
    learning = [maps[0].requires_grad_()]
    ops.multilevel_roi_align(learning, boxes, 2, [1.0], extents=extents, impl="reference").sum().backward()
    assert learning[0].grad is not None
