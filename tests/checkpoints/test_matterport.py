"""Files of matterport's Mask R-CNN give what it computes, from the bytes of an image to masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.comparing import as_input, photo
from checkpoints.matterport_network import MatterportNetwork, matterport_shapes, random_weights, write_h5

import fastmrcnn

LEAST, MOST = 128, 192
SIZE = (90, 130)


@pytest.fixture(scope="module")
def network() -> MatterportNetwork:
    sizes = {"image_min_dim": LEAST, "image_max_dim": MOST, "post_nms": 200}
    network = MatterportNetwork(random_weights(matterport_shapes()), **sizes)
    with torch.inference_mode():
        network.calibrate(photo(*SIZE))
    return network


@pytest.fixture(scope="module")
def path(network: MatterportNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matterport") / "mask_rcnn_coco.h5"
    write_h5(path, network.saved())
    return path


def load(path: Path) -> Any:
    model = fastmrcnn.load(path, min_size=LEAST, max_size=MOST).double()
    model.rpn._post_nms_top_n["testing"] = 200
    return model


def test_detections(network: MatterportNetwork, path: Path) -> None:
    image = photo(*SIZE)
    with torch.inference_mode():
        theirs = network(image)
        ours = load(path)([as_input(image)])[0]
    assert len(theirs.rois) > 15
    assert ours["labels"].tolist() == theirs.class_ids.tolist()
    np.testing.assert_allclose(ours["scores"], theirs.scores, rtol=1e-4)
    assert ours["boxes"][:, [1, 0, 3, 2]].tolist() == theirs.rois.tolist()
    masks = (ours["masks"][:, 0] >= 0.5).numpy().transpose(1, 2, 0)
    assert 0.05 < masks.mean() < 0.95
    assert (masks != theirs.masks).sum() <= 2
