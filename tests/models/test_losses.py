"""Pieces of the losses against torchvision's functions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import keypoints_to_heatmap

from fastmrcnn.models.losses import keypoint_cells


@given(seed=st.integers(0, 10_000), rois=st.integers(1, 8), cells=st.integers(1, 60))
def test_keypoint_cells(seed: int, rois: int, cells: int) -> None:
    """Whole coordinates: many keypoints lie exactly on an edge of their box, and some outside."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 4, (rois, 2), generator=generator)
    boxes = torch.cat((start, start + torch.randint(1, 6, (rois, 2), generator=generator)), dim=1).float()
    keypoints = torch.randint(0, 9, (rois, 17, 3), generator=generator).float()
    keypoints[..., 2].remainder_(3)
    expected_cell, expected_inside = keypoints_to_heatmap(keypoints, boxes, cells)
    cell, inside = keypoint_cells(keypoints[None], boxes[None], cells)
    assert torch.equal(cell[0], expected_cell)
    assert torch.equal(inside[0], expected_inside > 0)
