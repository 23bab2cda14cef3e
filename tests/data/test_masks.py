"""Masks of run lengths against pycocotools, which writes them pixel by pixel."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks import masks
from pycocotools import mask as mask_utils

from fastmrcnn.data.masks import rasterise


@given(masks(), st.integers(0, 2))
def test_any_masks(expected, form):
    arrays = [np.asfortranarray(mask.numpy(), dtype=np.uint8) for mask in expected]
    rles = [mask_utils.encode(array) for array in arrays]
    if form == 1:
        rles = [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]
    if form == 2:
        columns = [array.ravel(order="F").astype(np.int64) for array in arrays]
        ends = [np.flatnonzero(np.diff(column, prepend=0)) for column in columns]
        rles = [
            {"size": rle["size"], "counts": np.diff(end, prepend=0, append=column.size).tolist()}
            for rle, end, column in zip(rles, ends, columns, strict=True)
        ]
    found = rasterise(rles, *expected.shape[1:])
    assert found.dtype == np.uint8
    assert torch.equal(torch.from_numpy(found), expected.byte())


@given(st.lists(st.lists(st.integers(0, 9), min_size=11, max_size=11), min_size=1, max_size=4))
def test_runs_of_no_pixels_and_over_many_columns(lists):
    height, width = 3, 40
    counts = [[*runs, height * width - sum(runs)] for runs in lists]
    rles = [{"size": [height, width], "counts": runs} for runs in counts]
    expected = [np.repeat(np.arange(12) % 2, runs).reshape(width, height).T for runs in counts]
    assert np.array_equal(rasterise(rles, height, width), np.stack(expected))


def test_runs_of_no_pixels_at_the_end():
    for counts, value in (([120, 0], 0), ([0, 120, 0, 0], 1)):
        assert (rasterise([{"size": [3, 40], "counts": counts}] * 2, 3, 40) == value).all()


def test_polygons():
    polygons = [[[1.2, 2, 30.7, 2.5, 20, 60]], [[0, 0, 5, 0, 5, 5], [40, 40, 64, 40, 64, 70, 40, 70]]]
    expected = mask_utils.decode([mask_utils.merge(mask_utils.frPyObjects(p, 70, 64)) for p in polygons])
    assert np.array_equal(rasterise(polygons, 70, 64), expected.transpose(2, 0, 1))
