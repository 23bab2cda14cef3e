"""Settings of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("default")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def photos() -> list[torch.Tensor]:
    """Three images [3, H, W] of different sizes: photos where there are some beside the repository, else generated."""
    from fastmrcnn.data import Shapes, image_files, load_image

    folder = SHARED / "data" / "coco_cc" / "train"
    if folder.is_dir():
        return [load_image(path) for path in image_files(folder)[:3]]
    return [Shapes(1, image_size=size, seed=i)[0][0] for i, size in enumerate([(427, 640), (480, 640), (640, 424)])]
