"""The command line, as a user types it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn

from fastmrcnn.cli import COMMANDS, main
from fastmrcnn.data import Shapes
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.summary import summarize
from fastmrcnn.training.config import DataConfig, TrainConfig
from fastmrcnn.training.recipes import RECIPES


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A COCO-format folder of four generated images."""
    data = Shapes(4, image_size=(64, 64))
    coco = json.loads(json.dumps(data.coco))
    for i, record in enumerate(coco["images"]):
        record["file_name"] = f"{i}.png"
        pixels = (data[i][0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "shapes.json").write_text(json.dumps(coco))
    return tmp_path


SMALL_MODEL = """
model:
  name: maskrcnn_resnet18_fpn
  min_size: 64
  max_size: 64
  anchor_sizes: [8, 16, 32, 64, 128]
  proposals: 50
  box_samples: 16
"""


def test_train_evaluate_predict(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data:\n  train_images: {shapes}\n  train_annotations: {shapes}/shapes.json\n"
        f"  val_images: {shapes}\n  val_annotations: {shapes}/shapes.json\n  workers: 0\n"
        f"{SMALL_MODEL}epochs: 5\nbatch_size: 2\ndevice: cpu\n"
    )
    out = tmp_path / "run"
    main(["train", "--config", str(config), "--epochs", "1", "--output", str(out)])
    assert "epoch 1: bbox AP" in capsys.readouterr().out
    assert (out / "best.pt").exists()
    main(["train", "--config", str(out / "config.json"), "--output", str(tmp_path / "again")])
    records = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert {record["epoch"] for record in records} == {1}  # as the first run had

    main(
        [
            "evaluate",
            "--checkpoint",
            str(out / "best.pt"),
            "--images",
            str(shapes),
            "--annotations",
            str(shapes / "shapes.json"),
            "--workers",
            "0",
            "--output",
            str(out / "results.json"),
            "--max_detections",
            "50",
        ]
    )
    printed = capsys.readouterr().out
    assert printed.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets= 50 ]") == 2
    assert isinstance(json.loads((out / "results.json").read_text()), list)

    main(
        [
            "predict",
            "--inputs",
            f"[{shapes / '0.png'}]",
            "--checkpoint",
            str(out / "best.pt"),
            "--output",
            str(out / "pictures"),
        ]
    )
    assert (out / "pictures" / "0.png").exists()
    assert isinstance(json.loads((out / "pictures" / "results.json").read_text()), list)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_field(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    names = [i for i, line in enumerate(lines) if line.startswith("  --") and "--config" not in line]
    assert names
    for i in names:  # an option's own line or the next one says what it means, not just its type
        text = " ".join(lines[i : i + 2])
        assert len(text.split("(type")[0].split()) > 3, lines[i]


DATA = ["--data.train_images", "photos", "--data.train_annotations", "photos.json"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What would have been trained."""
    configs: list[TrainConfig] = []
    monkeypatch.setitem(COMMANDS, "train", (TrainConfig, configs.append, "train"))
    return configs


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_gives_defaults(name: str, trained: list[TrainConfig]) -> None:
    main(["train", "--recipe", name, *DATA])
    main(["train", *DATA, f"--recipe={name}"])
    assert trained == [RECIPES[name](DataConfig(Path("photos"), Path("photos.json")))] * 2


def test_options_override_the_recipe(trained: list[TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim:\n  lr: 0.5\n  gamma: 0.25\nepochs: 3\n")
    main(["train", "--config", str(tmp_path / "run.yaml"), "--optim.gamma", "0.75", *DATA, "--recipe", "lsj"])
    (config,) = trained
    assert (config.optim.lr, config.optim.gamma, config.epochs) == (0.5, 0.75, 3)
    assert (config.optim.lr_batch, config.augment.jitter) == (64, 1024)


def test_configuration_of_a_run_can_be_used_again(trained: list[TrainConfig], tmp_path: Path) -> None:
    """As `config.json` has it, whatever recipe it came from, and whatever recipe is given beside it."""
    main(["train", "--recipe", "lsj", *DATA])
    options: dict[str, Any] = json.loads(json.dumps(asdict(trained[0]), default=str))
    (tmp_path / "config.json").write_text(json.dumps(options))
    main(["train", "--config", str(tmp_path / "config.json")])
    main(["train", "--recipe", "small", "--config", str(tmp_path / "config.json")])
    assert trained[1] == trained[2] == trained[0]


def test_recipe_is_printed_as_a_configuration(trained: list[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "paper", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "steps: 160000" in printed
    assert "train_images: null" in printed
    assert "recipe" not in printed


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["train", "--recipe", "papers"], 2), (["train", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
        said = "".join(capsys.readouterr())
        assert all(name in said for name in RECIPES)


def test_a_recipe_is_of_training_and_of_the_command_line(
    trained: list[TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("recipe: paper\n")
    for arguments, said in (
        (["evaluate", "--recipe", "paper"], "--recipe"),
        (["train", "--config", str(tmp_path / "run.yaml"), *DATA], "recipe"),
        (["train", "--recipe", "paper"], "train_images"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert not trained


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"fastmrcnn evaluate: .*nowhere\.json"):
        main(["evaluate", "--results", str(tmp_path / "nowhere.json"), "--annotations", str(tmp_path / "nowhere.json")])


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--no_such_option", "1"])
    assert stop.value.code == 2
    assert "no_such_option" in capsys.readouterr().err


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", "--depth", "1"])
    printed = capsys.readouterr().out
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in printed
    assert (
        "538.39" in printed
    )  # GFLOP at 800x1344, 1000 proposals and 100 detections: the sum of ResNet-50, FPN, RPN and heads


def test_operations_of_a_known_layer() -> None:
    model = build_model(ModelConfig("maskrcnn_resnet18_fpn"), 2)
    layers = {layer.name: layer for layer in summarize(model, (64, 64), depth=3)}
    assert layers["backbone.body.conv1"].flops == 2 * 3 * 64 * 7 * 7 * 32 * 32
    assert layers["backbone.body.conv1"].parameters == 3 * 64 * 7 * 7
    assert layers[""].flops == sum(layers[name].flops for name in ("backbone", "rpn", "roi_heads"))
