"""Files of detectron2 give what detectron2 computes: every layer, from the bytes of an image to masks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.comparing import LONGER, SHORTER, as_input, assert_same, photo
from checkpoints.foreign_networks import Kind, detectron2_network, detectron2_shapes, random_state
from torch import Tensor

import fastmrcnn

KINDS = {
    "mask_rcnn_R_50_FPN_3x": Kind(),
    "mask_rcnn_R_50_C4_3x": Kind("c4"),
    "mask_rcnn_R_50_DC5_3x": Kind("dc5"),
    "keypoint_rcnn_R_50_FPN_3x": Kind(mask=False, keypoints=17, classes=1),
    "mask_rcnn_X_101_32x8d_FPN_3x": Kind(depth="101", groups=32, width=8),
}


def write_pkl(path: Path, state: dict[str, Tensor], author: str | None = "Detectron2 Model Zoo") -> Path:
    content: dict[str, Any] = {"model": {name: value.numpy() for name, value in state.items()}}
    if author:
        content["__author__"] = author
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_detections(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    state = random_state(detectron2_shapes(kind), of_bytes=kind.groups == 1)
    image = photo()
    network = detectron2_network(state, kind, SHORTER, LONGER)
    network.calibrate(image[:, :, ::-1].copy())
    theirs = network(image[:, :, ::-1].copy())
    path = write_pkl(tmp_path / "model_final.pkl", network.saved())
    model = fastmrcnn.load(path, min_size=SHORTER, max_size=LONGER, proposals=100).double()
    with torch.inference_mode():
        assert_same(model([as_input(image)])[0], theirs)
