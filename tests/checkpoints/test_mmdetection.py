"""Files of MMDetection give what MMDetection computes, in either style."""

from __future__ import annotations

import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.comparing import FEW, LONGER, SHORTER, as_input, assert_same, photo
from checkpoints.foreign_files import Kind, mmdetection_shapes, random_state
from checkpoints.foreign_networks import mmdetection_network

import fastmrcnn
from fastmrcnn.checkpoints.reading import read_weights

CAFFE = """
norm = dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(backbone=dict(depth=50, style='caffe'))
anchors = dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])
pipeline = [dict(type='Resize', img_scale=(1333, 800), keep_ratio=True)]
"""
PYTORCH = """
norm = dict(
    mean=[
        123.675,
        116.28,
        103.53,
    ], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
model = dict(backbone=dict(depth=50, style='pytorch'))
pipeline = [dict(type='Resize', scale=(1333, 800), keep_ratio=True)]
"""


def save(path: Path, state: dict[str, torch.Tensor], meta: dict[str, Any]) -> Path:
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}, path)
    return path


@pytest.mark.parametrize("style", ["caffe", "pytorch"])
def test_detections(style: str, tmp_path: Path) -> None:
    caffe = style == "caffe"
    kind = Kind(mask_iou=caffe)
    network = mmdetection_network(
        random_state(mmdetection_shapes(kind), of_bytes=caffe), kind, SHORTER, LONGER, caffe=caffe
    )
    image = photo()
    seen = image[:, :, ::-1].copy() if caffe else image
    network.calibrate(seen)
    theirs = network(seen)
    path = save(tmp_path / "epoch_12.pth", network.saved(), {"config": CAFFE} if caffe else {"cfg": PYTORCH})
    model = fastmrcnn.load(path, **FEW).double()
    with torch.inference_mode():
        assert_same(model([as_input(image)])[0], theirs)


SMALL = {name: torch.zeros(shape) for name, shape in mmdetection_shapes(Kind(mask=False, classes=3)).items()}


def test_what_the_configuration_says(tmp_path: Path) -> None:
    text = CAFFE.replace("(1333, 800)", "(1000, 600)").replace("[8]", "[4]")
    classes = ("cell", "debris", "dust")
    info = read_weights(save(tmp_path / "a.pth", SMALL, {"config": text, "CLASSES": classes})).info
    assert (info.config.name, info.config.conventions) == ("fasterrcnn_resnet50_fpn", "mmdetection")
    assert (info.config.min_size, info.config.max_size) == (600, 1000)
    assert info.config.anchor_sizes == [16, 32, 64, 128, 256]
    assert (info.class_names, info.category_ids) == (list(classes), [1, 2, 3])
    assert info.config.stride_in_1x1
    info = read_weights(save(tmp_path / "b.pth", SMALL, {"dataset_meta": {"classes": classes}})).info
    assert (info.class_names, info.config.stride_in_1x1) == (list(classes), False)
    mean = torch.tensor([0.485, 0.456, 0.406])
    assert torch.allclose(torch.tensor(info.config.image_mean or mean.tolist()), mean)


def test_style_of_the_caller(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", SMALL | {"backbone.conv1.weight": torch.rand(64, 3, 7, 7)}, {})
    first = {
        source: read_weights(path, source).state["backbone.body.conv1.weight"]
        for source in ("mmdetection_caffe", "mmdetection_pytorch")
    }
    assert torch.equal(first["mmdetection_caffe"], first["mmdetection_pytorch"].flip(1))
    config = read_weights(path, "mmdetection_caffe").info.config
    assert config.image_std == [1 / 255] * 3
    assert config.stride_in_1x1


def test_objects_of_its_trainer_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of MMEngine in training has objects of its logs; they are read as things without behaviour."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.values = [1.0]

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging", "HistoryBuffer"
    module: Any = types.ModuleType("mmengine.logging")
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", module)
        torch.save({"state_dict": SMALL, "message_hub": {"loss": HistoryBuffer()}, "meta": {}}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError, match="mmengine"):
        torch.load(tmp_path / "a.pth", weights_only=True)
    assert len(read_weights(tmp_path / "a.pth").info.class_names) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"neck.lateral_convs.0.conv.weight": None},
            "no Faster or Mask R-CNN with a pyramid: it lacks neck.lateral",
        ),
        ({"backbone.layer4.2.conv1.weight": None}, "it lacks backbone.layer4.2.conv1.weight"),
        ({"backbone.layer4.2.conv4.weight": torch.zeros(1)}, "it also has backbone.layer4.2.conv4.weight"),
        ({"rpn_head.rpn_cls.bias": torch.zeros(9)}, r"has in other shapes rpn_head.rpn_cls.bias \[9\]"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = {name: value for name, value in (SMALL | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^checkpoint: .*a.pth: .*{message}"):
        read_weights(save(tmp_path / "a.pth", state, {}))


def test_scales_of_anchors(tmp_path: Path) -> None:
    text = re.sub(r"\[8\]", "[4, 8]", CAFFE)
    with pytest.raises(ValueError, match="anchors have 2 scales per level: expected one"):
        read_weights(save(tmp_path / "a.pth", SMALL, {"config": text}))
    with pytest.raises(ValueError, match=r"anchors have the ratios 1.0, 2.0, 3.0: expected 0.5, 1.0, 2.0"):
        read_weights(save(tmp_path / "a.pth", SMALL, {"config": CAFFE.replace("0.5, 1.0, 2.0", "1.0, 2.0, 3.0")}))
