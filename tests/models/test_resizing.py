"""Bytes as Pillow, OpenCV and scikit-image resize them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastmrcnn.models.conventions import CONVENTIONS
from fastmrcnn.models.preprocess import BytesPreprocess
from fastmrcnn.models.resizing import resize_like_opencv, resize_like_pillow, resize_like_skimage


@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.2, 4), st.integers(0, 2**32 - 1))
def test_pillow(height: int, width: int, scale: float, seed: int) -> None:
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Columns first: Pillow 13 begins with rows where these shrink much more, which they do not here but by rounding.
    columns = Image.fromarray(image).resize((size[1], height), Image.Resampling.BILINEAR)
    wanted = np.asarray(columns.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    found = resize_like_pillow(torch.from_numpy(image).permute(2, 0, 1), size)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)


def test_pillow_at_once() -> None:
    """A photo's sides, as detectron2 has them."""
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    for size in ((800, 1067), (300, 400), (120, 160)):
        wanted = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        found = resize_like_pillow(torch.from_numpy(image).permute(2, 0, 1), size).permute(1, 2, 0).numpy()
        assert np.array_equal(found, wanted)


def test_opencv() -> None:
    """What `cv2.resize` of OpenCV 5.0 gave."""
    image = torch.tensor([[[255, 228, 34, 121], [243, 189, 6, 131], [102, 168, 82, 193]]], dtype=torch.uint8)
    large = [
        [255, 241, 196, 66, 77, 121],
        [250, 231, 181, 54, 74, 125],
        [243, 216, 159, 36, 69, 131],
        [158, 167, 155, 72, 110, 168],
        [102, 135, 154, 96, 137, 193],
    ]
    assert resize_like_opencv(image, (5, 6))[0].tolist() == large
    assert resize_like_opencv(image, (2, 3))[0].tolist() == [[246, 123, 107], [143, 118, 158]]
    assert resize_like_opencv(image, (3, 4)) is image


def test_skimage() -> None:
    """By hand: what is outside counts as 0, but nothing gets darker than the darkest pixel; bytes are truncated."""
    image = torch.tensor([[[100, 200]]], dtype=torch.uint8)
    # Centres at -0.25, 0.25, 0.75, 1.25: 75, 125, 175, 150; 75 is below all pixels.
    assert resize_like_skimage(image, (1, 4)).tolist() == [[[100, 125, 175, 150]]]
    assert resize_like_skimage(torch.tensor([[[0, 99, 201]]], dtype=torch.uint8), (1, 2)).tolist() == [[[24, 175]]]


def test_sizes_of_detectron2() -> None:
    """`ResizeShortestEdge.get_output_shape`: scaled to the shorter side, or down to the bound, and rounded."""
    transform = BytesPreprocess(
        resize_like_pillow, min_size=800, max_size=1333, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    expected = {(480, 640): (800, 1067), (427, 640): (800, 1199), (300, 1000): (400, 1333), (1000, 300): (1333, 400)}
    assert {size: transform.size_of(size) for size in expected} == expected
    assert CONVENTIONS["detectron2"].resize_bytes is resize_like_pillow
