"""State dicts of torchvision's detectors, published or fine-tuned, are recognised and give what they give there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models.detection as theirs
from checkpoints.foreign_files import Kind, detectron2_shapes
from torch import nn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

import fastmrcnn
from fastmrcnn.checkpoints import torchvision
from fastmrcnn.checkpoints.reading import read_weights
from fastmrcnn.models.norms import replace_norms

NONE: dict[str, Any] = {"weights": None, "weights_backbone": None}


def older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that torchvision's published files have."""

    def name_of(name: str) -> str:
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        return re.sub(r"mask_head\.(\d)\.0\.", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}.", name)

    return {name_of(name): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("builder", "file", "frozen"),
    [
        ("maskrcnn_resnet50_fpn", "a.pth", True),
        ("maskrcnn_resnet50_fpn", "a.pth", False),
        ("maskrcnn_resnet50_fpn_v2", "a.pth", False),
        ("fasterrcnn_resnet50_fpn", "a.pth", True),
        ("fasterrcnn_resnet50_fpn_v2", "a.pth", False),
        ("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", True),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth", True),
        ("keypointrcnn_resnet50_fpn", "a.pth", True),
    ],
)
def test_builders(builder: str, file: str, frozen: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = getattr(theirs, builder)(**NONE).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 2)
    if frozen:
        replace_norms(model.backbone, "frozen")
    torch.save(older(model.state_dict()), tmp_path / file)
    ours = fastmrcnn.load(tmp_path / file, min_size=64, max_size=96)
    assert ours.info.config.name == builder
    assert ours.info.config.conventions == "torchvision"
    assert any(isinstance(norm, FrozenBatchNorm2d) for norm in ours.modules()) == frozen
    assert ours.state_dict().keys() == model.state_dict().keys()
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        for a, b in zip(model.backbone(image).values(), ours.backbone(image).values(), strict=True):
            torch.testing.assert_close(b, a)
    classes = 2 if "keypoint" in builder else 91
    assert len(ours.info.class_names) == classes - 1
    assert (ours.info.class_names[0], ours.info.category_ids[0]) == ("person", 1)
    assert ours.rpn.anchor_generator.sizes == model.rpn.anchor_generator.sizes
    exported = torchvision.export(read_weights(tmp_path / file))
    model.load_state_dict(exported)


def test_published_weights_have_norms_without_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is known by its hash; weights that were fine-tuned from it need to be told."""
    torch.manual_seed(0)
    model = theirs.maskrcnn_resnet50_fpn(**NONE).eval()
    replace_norms(model.backbone, "frozen")
    path = tmp_path / "maskrcnn_resnet50_fpn_coco.pth"
    torch.save(model.state_dict(), path)
    assert {norm.eps for norm in fastmrcnn.load(path).modules() if isinstance(norm, FrozenBatchNorm2d)} == {1e-5}
    told = fastmrcnn.load(path, weights="COCO_V1", norm=None)
    assert {norm.eps for norm in told.modules() if isinstance(norm, FrozenBatchNorm2d)} == {0.0}
    monkeypatch.setattr("fastmrcnn.checkpoints.reading.digest", lambda path: "bf2d0c1e" + "0" * 56)
    ours = fastmrcnn.load(path, min_size=64, max_size=96)
    assert ours.info.config.weights == "COCO_V1"
    overwrite_eps(model, 0.0)
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        for a, b in zip(model.backbone(image).values(), ours.backbone(image).values(), strict=True):
            torch.testing.assert_close(b, a)


def test_another_number_of_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = theirs.maskrcnn_resnet50_fpn(**NONE)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.warns(
        UserWarning, match=r"of 3 classes, not 91: roi_heads.box_predictor.cls_score, .*bbox_pred, "
    ) as seen:
        ours = fastmrcnn.load(tmp_path / "a.pth", num_classes=3)
    assert str(seen[0].message).endswith("roi_heads.mask_predictor.mask_fcn_logits start anew")
    own, given = ours.state_dict(), model.state_dict()
    fresh = {name for name, value in own.items() if value.shape != given[name].shape}
    assert len(fresh) == 6
    assert all(torch.equal(own[name], given[name]) for name in own if name not in fresh)
    assert ours.info.class_names == ["class 1", "class 2"]


def test_of_another_network(tmp_path: Path) -> None:
    state = theirs.maskrcnn_resnet50_fpn(**NONE).state_dict()
    del state["roi_heads.mask_head.3.0.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a.pth: it is no maskrcnn_resnet50_fpn .* it lacks roi_heads.mask_head.3.0.wei"
    ):
        fastmrcnn.load(tmp_path / "a.pth")
    foreign = read_weights(save_detectron2(tmp_path))
    with pytest.raises(ValueError, match="conventions of detectron2 is none that torchvision has the results of"):
        torchvision.export(foreign)


def save_detectron2(folder: Path) -> Path:
    state = {name: torch.zeros(shape) for name, shape in detectron2_shapes(Kind(mask=False, classes=3)).items()}
    torch.save({"model": state, "iteration": 7}, folder / "d2.pth")
    return folder / "d2.pth"
