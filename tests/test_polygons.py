"""Polygons that fill to exactly the masks they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask
from torch import Tensor

from fastmrcnn.ops import encode_bool
from fastmrcnn.polygons import masks_to_polygons, rle_to_polygons


def filled(polygons: list[list[int]], height: int, width: int) -> Tensor:
    if not polygons:
        return torch.zeros(height, width, dtype=torch.bool)
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return torch.from_numpy(coco_mask.decode(rle)).bool()


def signed_area(polygon: list[int]) -> float:
    x, y = np.array(polygon).reshape(-1, 2).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def check(masks: Tensor) -> None:
    found = masks_to_polygons(masks)
    assert len(found) == len(masks)
    for mask, polygons in zip(masks, found, strict=True):
        assert torch.equal(filled(polygons, *mask.shape), mask)
        # None covers what another does, and what a line to a hole encloses is nothing.
        assert sum(map(signed_area, polygons)) == mask.sum()
        assert all(signed_area(polygon) > 0 and len(polygon) >= 8 for polygon in polygons)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).flatmap(
        lambda shape: arrays.arrays(np.bool_, shape)
    )
)
def test_any_mask_comes_back_to_the_pixel(masks: np.ndarray) -> None:
    check(torch.from_numpy(masks))


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9, 1.0])
def test_noise_comes_back(density: float) -> None:
    check(torch.rand(3, 61, 47, generator=torch.Generator().manual_seed(0)) < density)


def test_rectangle_is_four_corners_and_diagonal_pixels_are_two_polygons() -> None:
    mask = torch.zeros(3, 6, 8, dtype=torch.bool)
    mask[0, 1:4, 2:7] = True
    mask[1, 1, 1] = mask[1, 2, 2] = mask[1, 1, 3] = True
    found = masks_to_polygons(mask)
    assert found[0] == [[2, 1, 7, 1, 7, 4, 2, 4]]
    assert [sorted(polygon) for polygon in found[1]] == [
        [1, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 2, 2, 3, 3, 4, 4],
        [2, 2, 2, 2, 3, 3, 3, 3],
    ]
    assert found[2] == []


def test_holes_in_holes() -> None:
    mask = torch.zeros(1, 21, 21, dtype=torch.bool)
    for ring in range(0, 10, 2):
        mask[0, ring : 21 - ring, ring : 21 - ring] = True
        mask[0, ring + 1 : 20 - ring, ring + 1 : 20 - ring] = False
    mask[0, 5, ::2] = True
    check(mask)
    grid = torch.ones(1, 31, 31, dtype=torch.bool)
    grid[0, 1::2, 1::2] = False
    (polygons,) = masks_to_polygons(grid)
    assert len(polygons) == 1  # one part with many holes
    check(grid)


@pytest.mark.parametrize("as_given", ["text", "bytes", "list"])
def test_every_form_of_counts_and_sizes_that_differ(as_given: str) -> None:
    masks = [torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.6 for size in [(7, 5), (4, 9), (1, 1)]]
    rles = []
    for mask in masks:
        rle = encode_bool(mask[None]).rles[0]
        if as_given == "bytes":
            rle = {**rle, "counts": rle["counts"].encode()}
        elif as_given == "list":
            flat = mask.T.flatten().numpy()
            changes = np.flatnonzero(np.diff(flat, prepend=False))
            rle = {**rle, "counts": np.diff(changes, prepend=0, append=len(flat)).tolist()}
        rles.append(rle)
    mixed = [*rles, encode_bool(masks[0][None]).rles[0]]
    for mask, polygons in zip([*masks, masks[0]], rle_to_polygons(mixed), strict=True):
        assert torch.equal(filled(polygons, *mask.shape), mask)


def test_malformed_counts_are_refused() -> None:
    assert rle_to_polygons([]) == []
    good = {"size": [2, 2], "counts": [1, 3]}
    for counts in ("??", [1, 2], [5, -1], [], b"\xff"):
        with pytest.raises(ValueError, match=r"rles\[1\]: its counts"):
            rle_to_polygons([good, {"size": [2, 2], "counts": counts}])
