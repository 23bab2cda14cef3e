import gc
import json

import pytest
import torch
from PIL import Image
from torch import nn

import fastmrcnn.checkpoints
import fastmrcnn.evaluate
from fastmrcnn.checkpoints import ModelInfo
from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.coco_records import detections_to_coco
from fastmrcnn.data import Shapes
from fastmrcnn.evaluate import EvaluateConfig, evaluate, match_categories, run
from fastmrcnn.models.config import ModelConfig


class Echo(nn.Module):
    """A perfect detector: looks up what is in an image it was shown before."""

    def __init__(self, dataset, *, limit=None, fields=("boxes", "labels", "scores", "masks")):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.roi_heads = nn.Module()
        self.roi_heads.detections_per_img = limit
        self.fields = fields
        self.calls = []
        self.known = {}
        for i in range(len(dataset)):
            image, target = dataset[i]
            self.known[image.numpy().tobytes()] = target

    def forward(self, images):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls.append(len(images))
        return [self.answer(image) for image in images]

    def answer(self, image):
        target = self.known[image.numpy().tobytes()]
        count = len(target["labels"])
        full = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.linspace(0.9, 0.6, count),
            "masks": target["masks"][:, None].float(),
        }
        limit = self.roi_heads.detections_per_img
        return {name: full[name][:limit] for name in self.fields}


@pytest.fixture(scope="module")
def shapes():
    return Shapes(length=5, image_size=(64, 64), seed=0)


class Repeating:
    """Hands out the first image in place of the second, as a dataset does that passes over a corrupt file."""

    def __init__(self, dataset):
        self.dataset, self.coco, self.category_ids = dataset, dataset.coco, dataset.category_ids

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[0 if i == 1 else i]


def test_a_perfect_model_scores_one(shapes):
    metrics = evaluate(Echo(shapes), shapes, progress=False)
    assert list(metrics) == ["bbox", "segm"]
    assert metrics["bbox"].ap == pytest.approx(1)
    assert metrics["segm"].ap == pytest.approx(1)
    assert set(metrics["bbox"].per_class) == set(shapes.class_names)


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (3, 1)])
def test_batches_and_workers_change_nothing(shapes, tmp_path, batch_size, workers):
    model, options = Echo(shapes), {"batch_size": batch_size, "workers": workers}
    metrics = evaluate(model, shapes, progress=False, results_path=tmp_path / "a.json", **options)
    assert model.calls == {2: [2, 2, 1], 3: [3, 2]}[batch_size]
    assert metrics == evaluate(Echo(shapes), shapes, progress=False, results_path=tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_each_module_is_back_in_its_mode_even_after_an_error(shapes):
    model = Echo(shapes).train()
    model.frozen.eval()
    evaluate(model, shapes, progress=False)
    assert model.training
    assert not model.frozen.training
    model.known.clear()
    with pytest.raises(KeyError):
        evaluate(model, shapes, progress=False)
    assert model.training
    assert not model.frozen.training


def test_an_error_between_two_batches_leaves_the_model_as_it_was(shapes, monkeypatch):
    def fail(*args):
        raise RuntimeError("full")

    monkeypatch.setattr(fastmrcnn.evaluate, "detections_to_coco", fail)
    model = Echo(shapes, limit=1).train()
    with pytest.raises(RuntimeError, match="full") as kept:
        evaluate(model, shapes, progress=False)
    assert kept.tb is not None  # it holds the frames, and they the iterator over the model's outputs
    assert model.training
    assert model.roi_heads.detections_per_img == 1


def test_the_models_limit_is_raised_for_the_duration_only(shapes):
    model = Echo(shapes, limit=1)
    assert evaluate(model, shapes, progress=False)["bbox"].ap == pytest.approx(1)
    assert model.roi_heads.detections_per_img == 1
    assert evaluate(model, shapes, max_detections=1, progress=False)["bbox"].ap < 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_repeated_image_counts_once_and_a_missing_one_is_reported(shapes, tmp_path, batch_size):
    path = tmp_path / "results.json"
    with pytest.warns(UserWarning, match="1 images of the annotations"):
        metrics = evaluate(Echo(shapes), Repeating(shapes), batch_size=batch_size, results_path=path, progress=False)
    assert metrics["bbox"].ap == pytest.approx(1)
    results = json.loads(path.read_text())
    counts = [sum(r["image_id"] == i for r in results) for i in (shapes.image_ids[0], shapes.image_ids[1])]
    assert counts == [len(shapes[0][1]["labels"]), 0]


def test_a_box_detector_is_measured_on_boxes(shapes):
    assert list(evaluate(Echo(shapes, fields=("boxes", "labels", "scores")), shapes, progress=False)) == ["bbox"]
    assert list(evaluate(Echo(shapes), shapes, iou_types=["segm"], progress=False)) == ["segm"]


def test_a_model_that_finds_nothing_scores_zero(shapes):
    model = Echo(shapes)
    model.answer = lambda image: {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 64, 64),
    }
    metrics = evaluate(model, shapes, progress=False)
    assert {iou_type: numbers.ap for iou_type, numbers in metrics.items()} == {"bbox": 0, "segm": 0}


def test_results_file_gives_the_same_numbers(shapes, tmp_path):
    path = tmp_path / "new" / "results.json"
    metrics = evaluate(Echo(shapes), shapes, results_path=path, progress=False)
    assert evaluate_coco(shapes.coco, path, "segm") == metrics["segm"]
    with pytest.raises(IsADirectoryError):
        evaluate(Echo(shapes), shapes, results_path=tmp_path, progress=False)


def test_after_an_error_there_is_no_results_file(shapes, tmp_path):
    model = Echo(shapes)
    del model.known[shapes[3][0].numpy().tobytes()]
    with pytest.raises(KeyError):
        evaluate(model, shapes, results_path=tmp_path / "results.json", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", [True, False])
def test_the_faster_backend_gives_equal_numbers(shapes, tmp_path, written):
    model = Echo(shapes, limit=2)
    path = tmp_path / "results.json" if written else None
    options = {"max_detections": 2, "progress": False}
    faster = evaluate(model, Repeating(shapes), backend="faster_coco_eval", results_path=path, **options)
    exact = evaluate(model, Repeating(shapes), **options)
    assert list(faster) == list(exact) == ["bbox", "segm"]
    for iou_type, numbers in faster.items():
        assert 0 < numbers.ap < 1
        assert numbers.stats == pytest.approx(exact[iou_type].stats, abs=1e-15)
        assert numbers.table() == exact[iou_type].table()
    assert len(list(tmp_path.iterdir())) == written
    with pytest.raises(ValueError, match="backend must be one of"):
        evaluate(model, shapes, backend="C++", **options)


def test_records_of_an_image_are_dropped_once_it_is_measured(shapes, monkeypatch):
    alive = []

    def count_then_convert(*args):
        gc.collect()
        alive.append(sum(isinstance(o, dict) and "score" in o and "segmentation" in o for o in gc.get_objects()))
        return detections_to_coco(*args)

    monkeypatch.setattr(fastmrcnn.evaluate, "detections_to_coco", count_then_convert)
    evaluate(Echo(shapes), shapes, progress=False)
    most = max(len(shapes[i][1]["labels"]) for i in range(len(shapes)))
    assert len(alive) == len(shapes)
    assert max(alive) - alive[0] <= most


def test_no_images_at_all():
    metrics = evaluate(Echo([]), Shapes(length=0), progress=False)
    assert all(numbers.ap == -1 for numbers in metrics.values())


def test_match_categories():
    categories = [{"id": 5, "name": "dog"}, {"id": 1, "name": "cat"}]
    assert match_categories(["cat", "cow", "dog"], [1, 2, 3], categories) == [1, None, 5]
    assert match_categories(["class 1", "class 2"], [5, 6], categories) == [5, None]
    with pytest.raises(ValueError, match=r"share no category.*cow.*dog"):
        match_categories(["cow"], [2], categories)


@pytest.fixture
def files(shapes, tmp_path, monkeypatch):
    """The shapes as a folder of PNGs with annotations, and a checkpoint loader that knows them."""
    (tmp_path / "images").mkdir()
    coco = json.loads(json.dumps(shapes.coco))
    for i, record in enumerate(coco["images"]):
        record["file_name"] = f"{i}.png"
        pixels = (shapes[i][0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / record["file_name"])
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    model = Echo(shapes)
    model.known = {
        (torch.frombuffer(bytearray(key), dtype=torch.float32) * 255).round().to(torch.uint8).numpy().tobytes(): target
        for key, target in model.known.items()
    }
    model.answer = lambda image: Echo.answer(model, (image * 255).round().to(torch.uint8))
    # The model's labels are in another order than the file's categories, which must be matched by name.
    names = shapes.class_names[::-1]
    for target in model.known.values():
        target["labels"] = len(names) + 1 - target["labels"]
    info = ModelInfo(ModelConfig(), names, [1, 2, 3])
    monkeypatch.setattr(fastmrcnn.checkpoints, "load_model", lambda path, device: (model, info), raising=False)
    return tmp_path


def test_run_a_checkpoint_then_its_results(files, capsys):
    config = EvaluateConfig(
        annotations=files / "annotations.json",
        images=files / "images",
        checkpoint=files / "any.pth",
        workers=0,
        device="cpu",
        output=files / "results.json",
    )
    metrics = run(config)
    assert metrics["segm"].ap == pytest.approx(1)
    printed = capsys.readouterr().out
    assert metrics["bbox"].table() in printed
    assert metrics["segm"].class_table() in printed
    again = EvaluateConfig(annotations=files / "annotations.json", results=files / "results.json")
    assert run(again) == metrics
    capsys.readouterr()
    again.backend, again.plot = "faster_coco_eval", files / "curves.svg"
    assert run(again)["segm"].table() == metrics["segm"].table()
    assert f"precision-recall curves: {again.plot}" in capsys.readouterr().out
    assert "Masks (segm)" in again.plot.read_text()
    config.max_detections = 1
    config.iou_types = ["bbox"]
    assert list(run(config)) == ["bbox"]
    assert run(config)["bbox"].ap < 1


def test_run_refuses_what_it_cannot_do(files):
    annotations = files / "annotations.json"
    with pytest.raises(ValueError, match="either a checkpoint"):
        run(EvaluateConfig(annotations=annotations))
    with pytest.raises(ValueError, match="either a checkpoint"):
        run(EvaluateConfig(annotations=annotations, checkpoint=annotations, results=annotations))
    with pytest.raises(ValueError, match="needs images"):
        run(EvaluateConfig(annotations=annotations, checkpoint=annotations))
    with pytest.raises(FileNotFoundError, match="none"):
        run(EvaluateConfig(annotations=annotations, results=files / "none.json"))
    (files / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"bad\.json: COCO results must be a list"):
        run(EvaluateConfig(annotations=annotations, results=files / "bad.json"))
    with pytest.raises(ValueError, match=r"bad\.json: COCO annotations"):
        run(EvaluateConfig(annotations=files / "bad.json", results=annotations))
    with pytest.raises(ValueError, match=r"\.png or an \.svg"):
        run(EvaluateConfig(annotations=annotations, results=files / "none.json", plot=files / "curves.pdf"))
    with pytest.raises(ValueError, match="backend must be one of"):
        run(EvaluateConfig(annotations=annotations, results=files / "none.json", backend="C++"))
