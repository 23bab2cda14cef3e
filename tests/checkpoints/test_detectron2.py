"""Files of detectron2 give what detectron2 computes: every layer, from the bytes of an image to masks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.foreign_networks import Found, Kind, detectron2_network, detectron2_shapes, random_state
from torch import Tensor

import fastmrcnn

SHORTER, LONGER = 128, 200

KINDS = {
    "mask_rcnn_R_50_FPN_3x": Kind(),
    "mask_rcnn_R_50_C4_3x": Kind("c4"),
    "mask_rcnn_R_50_DC5_3x": Kind("dc5"),
    "keypoint_rcnn_R_50_FPN_3x": Kind(mask=False, keypoints=17, classes=1),
    "mask_rcnn_X_101_32x8d_FPN_3x": Kind(depth="101", groups=32, width=8),
}


def photo(height: int, width: int) -> Any:
    """Rectangles and noise, uint8 [H, W, 3] RGB."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 60, (height, width, 3))
    for _ in range(12):
        y, x = generator.integers(0, height), generator.integers(0, width)
        image[y : y + 40, x : x + 50] = image[y : y + 40, x : x + 50] // 2 + generator.integers(0, 160, 3)
    return image.astype(np.uint8)


def as_input(image: Any) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def write_pkl(path: Path, state: dict[str, Tensor], author: str | None = "Detectron2 Model Zoo") -> Path:
    content: dict[str, Any] = {"model": {name: value.numpy() for name, value in state.items()}}
    if author:
        content["__author__"] = author
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def assert_same(ours: dict[str, Tensor], theirs: Found) -> None:
    """Detections that are in float64 what the other library computes."""
    assert len(theirs.boxes) > 50
    assert len(theirs.classes.unique()) > 10 or theirs.keypoints is not None
    assert torch.equal(ours["labels"], theirs.classes + 1)
    torch.testing.assert_close(ours["scores"], theirs.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["boxes"], theirs.boxes, rtol=1e-5, atol=1e-4)
    if theirs.masks is not None:
        differing = (ours["masks"][:, 0] >= 0.5) != theirs.masks
        assert theirs.masks.flatten(1).any(dim=1).sum() > 20
        assert differing.sum() <= 2  # pixels at 0.5
    if theirs.keypoints is not None:
        torch.testing.assert_close(ours["keypoints"][..., :2], theirs.keypoints[..., :2], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(ours["keypoints_scores"], theirs.keypoints[..., 2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_detections(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    state = random_state(detectron2_shapes(kind), of_bytes=kind.groups == 1)
    image = photo(150, 210)
    network = detectron2_network(state, kind, SHORTER, LONGER)
    network.calibrate(image[:, :, ::-1].copy())
    theirs = network(image[:, :, ::-1].copy())
    path = write_pkl(tmp_path / "model_final.pkl", network.saved())
    model = fastmrcnn.load(path, min_size=SHORTER, max_size=LONGER, proposals=100).double()
    with torch.inference_mode():
        assert_same(model([as_input(image).double()])[0], theirs)
