"""The training script: learns, stops when it should, and says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import config, losses, records, shapes
from torch import Tensor

from fastmrcnn.checkpoints import load_checkpoint, load_model
from fastmrcnn.data import DataError, Shapes
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.train import run, train
from fastmrcnn.training.config import AugmentConfig, DataConfig, LogConfig, OptimConfig


def test_writes_checkpoints_and_metrics(tmp_path: Path) -> None:
    best = train(config(tmp_path), shapes(), shapes(2, seed=1))
    assert best == tmp_path / "best.pt"
    epochs = records(tmp_path, "epoch")
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert set(epochs[0]["losses"]) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    assert set(epochs[1]["metrics"]) == {"bbox", "segm"}
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3, 4]
    model, info = load_model(best)
    assert info.class_names == ["circle", "rectangle", "triangle"]
    assert load_checkpoint(tmp_path / "last.pt")["training"]["progressed"]["epoch"] == 2
    assert load_checkpoint(best)["training"] is None
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 2


def test_overfits(tmp_path: Path) -> None:
    """Eight images are learned by heart: whatever is wrong between pixels and weights shows here.

    Of 128 pixels: in 64 the mask head's own targets, pasted, have an average precision of 0.88.
    """
    data = Shapes(8, image_size=(128, 128), max_objects=2, tinted=True)
    options = config(
        tmp_path,
        steps=150,
        batch_size=4,
        evaluate_every=1000,
        augment=AugmentConfig(flip=0.0),
        optim=OptimConfig(
            "adamw", 0.0015, lr_batch=0, weight_decay=0.0, warmup_steps=20, schedule="cosine", clip_norm=5
        ),
        log=LogConfig(every=50),
    )
    options.model.min_size = options.model.max_size = 128
    options.model.box_samples, options.model.norm = 32, "group"
    train(options, data, data)
    metrics = records(tmp_path, "epoch")[-1]["metrics"]
    assert metrics["bbox"]["AP"] > 0.9
    assert metrics["segm"]["AP"] > 0.9


def test_steps_instead_of_epochs(tmp_path: Path) -> None:
    train(config(tmp_path, steps=3), shapes(), shapes(2, seed=1))
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]
    assert [record["epoch"] for record in records(tmp_path, "epoch")] == [1, 2]
    train(config(tmp_path, steps=3, resume="auto"), shapes(), shapes(2, seed=1))
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]


def poisoned(step: int) -> Callable[..., dict[str, Tensor]]:
    """`GeneralizedRCNN.losses` of which number `step` are not finite."""
    original, calls = GeneralizedRCNN.losses, 0

    def losses(self: GeneralizedRCNN, *arguments: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        found = original(self, *arguments)
        return found | {"loss_mask": found["loss_mask"] * torch.nan} if calls >= step > 0 else found

    return losses


def test_a_loss_that_is_not_finite_names_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GeneralizedRCNN, "losses", poisoned(3))
    message = r"step 3: loss_mask, grad_norm not finite, images \d, \d.*Lower optim\.lr"
    with pytest.raises(FloatingPointError, match=message) as error:
        train(config(tmp_path, log=LogConfig(every=4)), shapes())
    assert "step 4" in str(error.value)  # read together, every four steps
    (third, _) = records(tmp_path, "skipped")
    assert third["image_ids"] == [int(word) for word in str(error.value).split("images ")[1].split(";")[0].split(", ")]


def test_steps_that_are_not_finite_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(GeneralizedRCNN, "losses", poisoned(4))
    train(config(tmp_path, log=LogConfig(every=4), on_nonfinite="skip"), shapes())
    assert "left out: step 4: loss_mask, grad_norm not finite" in capsys.readouterr().out
    assert records(tmp_path, "epoch")[-1]["skipped"] == 1
    for name, value in load_checkpoint(tmp_path / "last.pt")["model"].items():
        assert value.isfinite().all(), name
    monkeypatch.setattr(GeneralizedRCNN, "losses", poisoned(1))
    monkeypatch.setattr("fastmrcnn.train.MOST_LEFT_OUT", 2)
    with pytest.raises(FloatingPointError, match="step 2"):  # nothing is learned any more
        train(config(tmp_path / "all", log=LogConfig(every=1), on_nonfinite="skip"), shapes())


def test_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore of it.")

    monkeypatch.setattr(GeneralizedRCNN, "losses", too_much)
    message = r"2 images on 64 x 64 pixels with up to \d objects, in float32\. precision=bfloat16 .*batch_size.*1 GiB"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train(config(tmp_path), shapes())


def test_the_average_of_weights_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    options = config(tmp_path, optim=OptimConfig(lr=0.01, lr_batch=0, warmup_steps=2, ema=0.5))
    train(options, shapes(), shapes(2, seed=1))
    last, best = load_checkpoint(tmp_path / "last.pt"), load_checkpoint(tmp_path / "best.pt")
    average = last["training"]["learner"]["average"]["average"]
    name = "rpn.head.cls_logits.weight"
    assert not torch.equal(average[name], last["model"][name])
    if len(records(tmp_path, "epoch")) == 2 and last["training"]["best"]["waited"] == 0:
        assert torch.equal(best["model"][name], average[name])
    else:
        assert not torch.equal(best["model"][name], last["model"][name])


def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmrcnn.training.best.main_metric", lambda metrics: 0.5)
    train(config(tmp_path, epochs=9, patience=2), shapes(2), shapes(1, seed=1))
    assert [record["epoch"] for record in records(tmp_path, "epoch")] == [1, 2, 3]


def test_starting_from_weights_for_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class One(Shapes):
        """All shapes are of one class."""

        def __init__(self) -> None:
            super().__init__(2, image_size=(64, 64))
            self.num_classes, self.class_names, self.category_ids = 2, ["shape"], [1]

        def __getitem__(self, i: int) -> Any:
            image, target = super().__getitem__(i)
            return image, target | {"labels": torch.ones_like(target["labels"])}

    best = train(config(tmp_path / "three"), shapes(2))
    still = OptimConfig(lr=1e-12, lr_batch=0, warmup_steps=0)
    train(config(tmp_path / "one", init=best, optim=still, epochs=1), One())
    printed = capsys.readouterr().out
    assert "roi_heads.box_predictor" in printed
    assert "starts anew" in printed
    old, new = (load_checkpoint(tmp_path / run / "last.pt")["model"] for run in ("three", "one"))
    assert torch.allclose(old["rpn.head.cls_logits.weight"], new["rpn.head.cls_logits.weight"])
    assert len(new["roi_heads.box_predictor.cls_score.weight"]) == 2


def test_more_accumulated_batches_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accumulate=3: 4 images make 2 batches only"):
        train(config(tmp_path, optim=OptimConfig(accumulate=3)), shapes())


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    """Six shapes images as a folder of files."""
    data = shapes(6)
    for record, (image, _) in zip(data.coco["images"], data, strict=False):
        (tmp_path / "images").mkdir(exist_ok=True)
        array = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / "images" / record["file_name"])
    (tmp_path / "shapes.json").write_text(json.dumps(data.coco))
    return DataConfig(tmp_path / "images", tmp_path / "shapes.json", workers=0)


def test_keypoints_are_learned_and_measured(folder: DataConfig, tmp_path: Path) -> None:
    """The corners of boxes as keypoints, measured by their similarity (OKS)."""
    assert folder.train_annotations is not None
    coco = json.loads(folder.train_annotations.read_text())
    for category in coco["categories"]:
        category["keypoints"] = ["top left", "bottom right"]
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation |= {"keypoints": [x, y, 2, x + width, y + height, 1], "num_keypoints": 2}
    folder.train_annotations.write_text(json.dumps(coco))
    folder.val_annotations = folder.train_annotations
    options = config(tmp_path / "run", data=folder, steps=1)
    options.model = replace(
        options.model,
        name="keypointrcnn_resnet50_fpn",
        box_samples=4,
        proposals=10,
        detections_per_image=2,
        anchor_sizes=None,
    )
    best = run(options)
    assert losses(tmp_path / "run")[0][1]["loss_keypoint"] > 0
    (epoch,) = records(tmp_path / "run", "epoch")
    assert set(epoch["metrics"]) == {"bbox", "keypoints"}
    assert 0 <= epoch["metrics"]["keypoints"]["AP"] <= 1
    model, info = load_model(best)
    assert info.num_keypoints == 2
    assert model.roi_heads.keypoint_predictor.kps_score_lowres.out_channels == 2


def test_an_earlier_run_is_not_overwritten(folder: DataConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(config(output, data=folder, epochs=1))
    before = (output / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"output: .*last\.pt is of an earlier run: go on with it by resume=auto"):
        run(config(output, data=folder, epochs=1))
    assert (output / "last.pt").read_bytes() == before
    run(config(output, data=folder, epochs=2, resume="auto"))
    assert [record["epoch"] for record in records(output, "epoch")] == [1, 2]


def test_an_image_that_becomes_unreadable(folder: DataConfig, tmp_path: Path) -> None:
    image = next(folder.train_images.iterdir())
    image.write_bytes(image.read_bytes()[:100])
    with pytest.warns(UserWarning, match="not a readable image"):
        run(config(tmp_path / "on", data=folder, epochs=1))
    assert [step for step, _ in losses(tmp_path / "on")] == [1, 2, 3]
    folder.on_unreadable = "raise"
    with pytest.raises(DataError, match=image.name):
        run(config(tmp_path / "off", data=folder, epochs=1))
