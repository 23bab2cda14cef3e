"""Weights to start from: what fits is taken over, all else is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from fastmrcnn.checkpoints import ModelInfo, load_weights, save_checkpoint
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN


def built(num_classes: int, seed: int = 0, **options: Any) -> GeneralizedRCNN:
    torch.manual_seed(seed)
    return build_model(ModelConfig("maskrcnn_resnet18_fpn", min_size=64, max_size=64, **options), num_classes)


@pytest.fixture
def source() -> GeneralizedRCNN:
    return built(5)


@pytest.fixture
def file(source: GeneralizedRCNN, tmp_path: Path) -> Path:
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_all_of_the_same_network(source: GeneralizedRCNN, file: Path) -> None:
    model = built(5, seed=1)
    report = load_weights(model, file)
    assert str(report) == f"{len(model.state_dict())} parameters and buffers from {file}"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_layers_for_other_classes_start_anew(source: GeneralizedRCNN, tmp_path: Path) -> None:
    info = ModelInfo(ModelConfig("maskrcnn_resnet18_fpn"), list("abcd"), [1, 2, 3, 4])
    path = save_checkpoint(tmp_path / "best.pt", source, info)
    model, untouched = built(3, seed=1), built(3, seed=1)
    lines = str(load_weights(model, path)).splitlines()
    assert lines[1:] == [
        "roi_heads.box_predictor.cls_score: 5 classes in the file, 3 here: starts anew",
        "roi_heads.box_predictor.bbox_pred: shape [20, 256] in the file, [12, 256] here: starts anew",
        "roi_heads.mask_predictor.mask_fcn_logits: shape [5, 64, 1, 1] in the file, [3, 64, 1, 1] here: starts anew",
    ]
    for name, value in model.state_dict().items():
        anew = name.rpartition(".")[0].endswith(("cls_score", "bbox_pred", "mask_fcn_logits")) and "rpn" not in name
        assert torch.equal(value, (untouched if anew else source).state_dict()[name]), name


def test_what_is_missing_and_what_is_too_much(source: GeneralizedRCNN, tmp_path: Path) -> None:
    state = source.state_dict()
    for name in ("rpn.head.cls_logits.weight", "rpn.head.cls_logits.bias"):
        del state[name]
    state |= {f"extra.{name}": torch.zeros(1) for name in ("weight", "bias")}
    torch.save(state, tmp_path / "weights.pth")
    report = load_weights(built(5, seed=1), tmp_path / "weights.pth")
    assert report.anew == {"rpn.head.cls_logits": "weight, bias not in the file"}
    assert report.unexpected == {"extra": ["weight", "bias"]}
    assert (
        "rpn.head.cls_logits: weight, bias not in the file: starts anew\nextra: weight, bias: not in the model"
        in str(report)
    )


def test_many_layers_are_counted(source: GeneralizedRCNN, tmp_path: Path) -> None:
    state = {name: value for name, value in source.state_dict().items() if "backbone" not in name}
    torch.save(state, tmp_path / "weights.pth")
    report = load_weights(built(5, seed=1), tmp_path / "weights.pth")
    assert len(report.anew) > 40
    lines = str(report).splitlines()
    assert lines[-1] == f"... and {len(report.anew) - 10} more"
    assert len(lines) == 12


def test_other_shapes_are_named_before_what_is_missing(tmp_path: Path) -> None:
    torch.save(built(5, norm="group").state_dict(), tmp_path / "weights.pth")
    report = load_weights(built(3), tmp_path / "weights.pth")
    assert next(iter(report.anew)) == "roi_heads.box_predictor.cls_score"
    assert report.anew["backbone.body.bn1"] == "running_mean, running_var not in the file"


@pytest.mark.parametrize(("given", "own"), [("frozen", "batch"), ("batch", "frozen"), ("sync", None)])
def test_norms_of_another_kind(given: Any, own: Any, tmp_path: Path) -> None:
    source, model = built(5, norm=given), built(5, seed=1, norm=own)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    report = load_weights(model, tmp_path / "weights.pth")
    assert not report.anew
    assert not report.unexpected
    for part in (source, model):
        part.eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for expected, found in zip(source.backbone(x).values(), model.backbone(x).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_names_that_torchvision_no_longer_uses(source: GeneralizedRCNN, tmp_path: Path) -> None:
    """Its oldest files have them."""
    renamed = {}
    for name, value in source.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(2):
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        renamed[name] = value
    assert "roi_heads.mask_head.mask_fcn2.bias" in renamed
    torch.save(renamed, tmp_path / "weights.pth")
    report = load_weights(built(5, seed=1), tmp_path / "weights.pth")
    assert report.loaded == len(renamed)
    assert not report.unexpected


def test_images_with_other_channels(source: GeneralizedRCNN, file: Path) -> None:
    model = built(5, seed=1, channels=1)
    report = load_weights(model, file)
    assert report.changed == {"backbone.body.conv1": "3 channels in the file, spread over 1 here"}
    found, given = (m.get_parameter("backbone.body.conv1.weight") for m in (model, source))
    torch.testing.assert_close(found, given.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("content", [resnet18().state_dict(), {}], ids=["backbone", "empty"])
def test_nothing_fits(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    model, untouched = built(3), built(3)
    with pytest.raises(ValueError, match=r"init: nothing in .*weights\.pth fits the model; it has (conv1|no weights)"):
        load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(2)]])
def test_no_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="is neither a checkpoint of fastmrcnn nor a state_dict"):
        load_weights(built(3), tmp_path / "weights.pth")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_weights(built(3), tmp_path / "nowhere.pth")
