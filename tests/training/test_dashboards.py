import importlib.machinery
import importlib.util
import json
import sys
import time
import types
from io import BytesIO

import numpy as np
import pytest
import torch
from coco_problems import random_problem
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray
from test_evaluate import Echo
from test_run_records import SPEED, reading

from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.data import Shapes
from fastmrcnn.training.config import LogConfig
from fastmrcnn.training.dashboards import check_log, pr_curve, validation_pictures
from fastmrcnn.training.records import Records
from fastmrcnn.visualize import comparison

PICTURES = {"pictures/7": Image.new("RGB", (40, 30), "red"), "pictures/9": Image.new("RGB", (20, 10), "blue")}
CONFIG = {"optim": {"lr": 0.1}, "output": "runs"}


@pytest.fixture(scope="module")
def metrics():
    problem = random_problem(2)
    return {iou_type: evaluate_coco(*problem, iou_type) for iou_type in ("bbox", "segm")}


def run(folder, config, steps, metrics, resume_step=0):
    with Records(folder, config, CONFIG, resume_step) as records:
        assert records.pictures == 4
        for step in steps:
            records.add([reading(step)])
            records.write_train(1, 1 / step, SPEED)
            if step % 2 == 0:
                records.write_epoch(step // 2, 1 / step, 60.0, metrics, PICTURES)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def scalars(found, tag):
    return {event.step: event.value for event in found.Scalars(tag)}


def test_tensorboard_shows_all_numbers_pictures_and_curves(tmp_path, metrics):
    records = run(tmp_path, LogConfig(tensorboard=True), range(1, 5), metrics)
    found = events(tmp_path)
    train = {record["step"]: record for record in records if record["kind"] == "train"}
    for tag, name in (("optimizer/lr", "lr"), ("optimizer/grad_norm", "grad_norm"), ("speed/data_wait", "data_wait")):
        assert scalars(found, tag) == pytest.approx({step: record[name] for step, record in train.items()})
    losses = {step: record["losses"] for step, record in train.items()}
    assert scalars(found, "loss/mask") == pytest.approx({step: of["loss_mask"] for step, of in losses.items()})
    assert scalars(found, "loss/total") == pytest.approx({step: sum(of.values()) for step, of in losses.items()})
    assert sorted(scalars(found, "epoch_loss/box_reg")) == [2, 4]
    for iou_type, numbers in metrics.items():
        assert scalars(found, f"ap/{iou_type}/AP50") == pytest.approx({2: numbers.ap50, 4: numbers.ap50})
    for tag, picture in PICTURES.items():
        shown = [Image.open(BytesIO(event.encoded_image_string)) for event in found.Images(tag)]
        assert [np.asarray(image).tolist() for image in shown] == [np.asarray(picture).tolist()] * 2
    (curves, _) = found.Images("precision_recall/curves")
    assert curves.width > curves.height > 500  # two panels side by side
    for iou_type, numbers in metrics.items():
        for name, ap in (("AP", numbers.ap), ("AP50", numbers.ap50), ("AP75", numbers.ap75)):
            (event, _) = found.Tensors(f"precision_recall/{iou_type}/{name}")
            rows = make_ndarray(event.tensor_proto)
            assert rows.shape == (6, 101)
            assert rows[4].mean() == pytest.approx(ap, abs=1e-6)
    (text,) = found.Tensors("config/text_summary")
    assert '"lr": 0.1' in text.tensor_proto.string_val[0].decode()


def test_tensorboard_hides_what_was_written_after_the_checkpoint(tmp_path, metrics):
    config = LogConfig(tensorboard=True)
    run(tmp_path, config, range(1, 5), metrics)
    run(tmp_path, config, (3, 5), metrics, resume_step=2)
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/mask")] == [1, 2, 3, 5]
    assert [event.step for event in found.Images("pictures/7")] == [2]
    run(tmp_path, config, (5,), metrics)
    assert [event.step for event in events(tmp_path).Scalars("loss/mask")] == [5]


def test_what_is_logged_is_there_when_the_run_is_killed(tmp_path, monkeypatch):
    write = RecordWriter.write

    def write_slowly(self, data):
        time.sleep(0.02)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_slowly)
    records = Records(tmp_path, LogConfig(tensorboard=True), CONFIG)
    records.add([reading(1)])
    records.write_train(1, 0.1, SPEED)
    assert scalars(events(tmp_path), "optimizer/lr") == pytest.approx({1: 0.1})
    records.close()


def test_curve():
    # Of four objects: recall 0 and 0.5 at precision 1 and 0.5, recall 1 is never reached.
    curve = pr_curve(np.array([1.0, 0.5, 0.0]), 4)
    assert curve.tolist() == [[0, 2, 1], [0, 2, 0], [0, 0, 0], [4, 2, 3], [0, 0.5, 1], [1, 0.5, 0]]


def test_without_objects_there_is_no_curve(tmp_path):
    truth, results = random_problem(2)
    empty = {"bbox": evaluate_coco({**truth, "annotations": []}, results, "bbox")}
    run(tmp_path, LogConfig(tensorboard=True), (2,), empty)
    tags = events(tmp_path).Tags()
    assert tags["tensors"] == ["config/text_summary"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("a")]
    assert len(tags["images"]) == 3


class FakeWandb(types.ModuleType):
    """Keeps what it is asked to log, with W&B's names."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
        self.runs = []
        self.errors = types.SimpleNamespace(UsageError=type("UsageError", (Exception,), {}))

    def init(self, **options):
        if options["project"] == "nobody's":
            raise self.errors.UsageError("No API key.")
        self.runs.append(types.SimpleNamespace(options=options, logged=[], id=options["id"] or f"id{len(self.runs)}"))
        new = self.runs[-1]
        new.log = lambda values, step: new.logged.append((step, values))
        new.finish = lambda exit_code: setattr(new, "exit_code", exit_code)
        return new

    def Image(self, picture):
        return ("image", picture.size)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_same_and_goes_on_with_its_run(tmp_path, metrics, wandb):
    config = LogConfig(wandb="cells", tensorboard=True)
    folder = tmp_path / "mine"
    run(folder, config, range(1, 3), metrics)
    (first,) = wandb.runs
    given = {"project": "cells", "name": "mine", "dir": str(folder), "config": CONFIG, "id": None, "resume": None}
    assert first.options == given
    assert [step for step, _ in first.logged] == [1, 2, 2, 2]
    found = events(folder)
    for step, values in first.logged[:3]:
        for tag, value in values.items():
            assert scalars(found, tag)[step] == pytest.approx(value)
    pictures = first.logged[3][1]
    assert set(pictures) == {"precision_recall/curves", *PICTURES}
    assert pictures["pictures/7"] == ("image", (40, 30))
    assert first.exit_code == 0
    with pytest.raises(KeyError), Records(folder, config, CONFIG, resume_step=2):
        raise KeyError
    Records(folder, config, CONFIG).close()
    assert [(later.options["id"], later.options["resume"]) for later in wandb.runs[1:]] == [
        ("id0", "allow"),
        (None, None),
    ]
    assert [later.exit_code for later in wandb.runs[1:]] == [1, 0]
    Records(folder, config, CONFIG, resume_step=2).close()
    assert wandb.runs[3].options["id"] == "id2"


def test_wandb_without_an_account(tmp_path, wandb):
    with pytest.raises(ValueError, match=r"log\.wandb: No API key\. With WANDB_MODE=offline"):
        Records(tmp_path, LogConfig(wandb="nobody's"), CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "missing", "message"),
    [
        (
            LogConfig(tensorboard=True),
            "tensorboard",
            r'log\.tensorboard .* tensorboard: pip install "fastmrcnn\[train\]"',
        ),
        (
            LogConfig(tensorboard=True),
            "matplotlib",
            r'log\.tensorboard .* matplotlib: pip install "fastmrcnn\[train\]"',
        ),
        (LogConfig(wandb="cells"), "wandb", r'log\.wandb .* wandb: pip install "fastmrcnn\[wandb\]"'),
        (LogConfig(wandb="cells"), "matplotlib", r'log\.wandb .* matplotlib: pip install "fastmrcnn\[wandb\]"'),
    ],
)
def test_what_is_not_installed_is_said_before_anything_is_written(
    config, missing, message, tmp_path, monkeypatch, wandb
):
    check_log(config)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else there(name))
    with pytest.raises(ValueError, match=message):
        Records(tmp_path, config, CONFIG)
    assert not list(tmp_path.iterdir())
    check_log(LogConfig())


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="needs the package wandb"):
        check_log(LogConfig(wandb="cells"))


def test_validation_pictures_are_of_images_throughout_the_dataset():
    shapes = Shapes(length=5, image_size=(64, 48), seed=0)
    model = Echo(shapes).train()
    found = validation_pictures(model, shapes, 2)
    ids = shapes.image_ids
    assert list(found) == [f"pictures/{ids[0]}", f"pictures/{ids[2]}"]
    assert model.training
    image, target = shapes[2]
    perfect = {**target, "scores": torch.linspace(0.9, 0.6, len(target["labels"]))}
    expected = comparison([image], [perfect], [target], shapes.class_names)
    assert np.array_equal(found[f"pictures/{ids[2]}"], expected)
    model.calls.clear()
    assert len(validation_pictures(model, shapes, 9)) == sum(model.calls) == 5
    assert validation_pictures(model, shapes, 0) == {}


def test_pictures_are_of_a_moderate_size():
    shapes = Shapes(length=1, image_size=(300, 1200), seed=0)
    (picture,) = validation_pictures(Echo(shapes), shapes, 1).values()
    assert 1280 <= picture.width < 1400
    assert picture.height < 300
