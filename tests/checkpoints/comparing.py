"""What the tests of foreign formats share: an image, and what is the same of two results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from checkpoints.foreign_networks import DETECTIONS, Found
from torch import Tensor

SHORTER, LONGER = 128, 200
FEW = {"min_size": SHORTER, "max_size": LONGER, "proposals": 2 * DETECTIONS, "detections_per_image": DETECTIONS}
"""Options of a model that is compared with one of `foreign_networks`."""


def photo(height: int = 150, width: int = 180) -> Any:
    """Rectangles and noise, uint8 [H, W, 3] RGB."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 60, (height, width, 3))
    for _ in range(12):
        y, x = generator.integers(0, height), generator.integers(0, width)
        image[y : y + 40, x : x + 50] = image[y : y + 40, x : x + 50] // 2 + generator.integers(0, 160, 3)
    return image.astype(np.uint8)


def as_input(image: Any) -> Tensor:
    """The same as our models take it, float64."""
    return torch.from_numpy(image).permute(2, 0, 1).double() / 255


def assert_same(ours: dict[str, Tensor], theirs: Found) -> None:
    """Detections that are in float64 what the other library computes."""
    assert len(theirs.boxes) > 20
    assert len(theirs.classes.unique()) > 5 or theirs.keypoints is not None
    assert torch.equal(ours["labels"], theirs.classes + 1)
    torch.testing.assert_close(ours["scores"], theirs.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["boxes"], theirs.boxes, rtol=1e-5, atol=1e-4)
    if theirs.masks is not None:
        differing = (ours["masks"][:, 0] >= 0.5) != theirs.masks
        assert theirs.masks.flatten(1).any(dim=1).sum() > 10
        assert differing.sum() <= 2  # pixels at 0.5
    if theirs.mask_scores is not None:
        torch.testing.assert_close(ours["mask_scores"], theirs.mask_scores, rtol=1e-4, atol=1e-6)
    if theirs.keypoints is not None:
        torch.testing.assert_close(ours["keypoints"][..., :2], theirs.keypoints[..., :2], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(ours["keypoints_scores"], theirs.keypoints[..., 2], rtol=1e-4, atol=1e-6)
