import json
import re
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import fastmrcnn.checkpoints
from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.data import DataError
from fastmrcnn.predict import PredictConfig, find_images, picture_paths, run


class Fake(nn.Module):
    """Finds two things in every image, the second with a low score; the label tells how red the image is."""

    def __init__(self):
        super().__init__()
        self.roi_heads = nn.Module()
        self.roi_heads.detections_per_img = 2
        self.calls = []

    def forward(self, images):
        assert not self.training
        self.calls.append(len(images))
        return [self.answer(image) for image in images]

    def answer(self, image):
        limit = self.roi_heads.detections_per_img
        masks = torch.zeros(2, 1, *image.shape[-2:])
        masks[0, 0, 5:15, 5:20] = 1
        masks[1, 0, 0:3, 0:3] = 1
        return {
            "boxes": torch.tensor([[5.0, 5, 20, 15], [0, 0, 3, 3]])[:limit],
            "labels": torch.tensor([2 if image[0].mean() > 0.5 else 1, 1])[:limit],
            "scores": torch.tensor([0.9, 0.1])[:limit],
            "masks": masks[:limit],
        }


@pytest.fixture
def model(monkeypatch):
    model = Fake()
    info = types.SimpleNamespace(class_names=["dark", "red"], category_ids=[1, 2])
    monkeypatch.setattr(fastmrcnn.checkpoints, "load_model", lambda path, device: (model, info), raising=False)
    return model


def save(path, colour=(0, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png", (255, 0, 0))
    save(tmp_path / "in" / "sub" / "a.jpg")
    return tmp_path / "in"


def config_for(tmp_path, *inputs, **options):
    options = {"device": "cpu", "output": tmp_path / "out", **options}
    return PredictConfig(inputs=[str(path) for path in inputs], checkpoint=Path("any.pth"), **options)


def read(path):
    return json.loads(path.read_text())


def test_pictures_and_results(tmp_path, folder, model, capsys):
    path = run(config_for(tmp_path, folder, batch_size=2))
    assert path == tmp_path / "out" / "results.json"
    written = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == ["a.png", "b.png", "results.json", "sub/a.png"]
    records = read(path)
    assert [(r["image_id"], r["file_name"], r["category_id"]) for r in records] == [
        (1, "a.png", 1),
        (1, "a.png", 1),
        (2, "b.png", 2),
        (2, "b.png", 1),
        (3, "sub/a.jpg", 1),
        (3, "sub/a.jpg", 1),
    ]
    assert records[0]["bbox"] == [5, 5, 15, 10]
    assert model.calls == [2, 1]
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert re.search(r"6 detections in 3 of 3 images, [\d.]+ images per second", printed)
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert max(picture.size) >= 512
        assert picture.getpixel((150, 150)) != (0, 0, 0)
        assert picture.getpixel((500, 300)) == (0, 0, 0)


def test_without_overlay_and_with_a_limit(tmp_path, folder, model):
    records = read(run(config_for(tmp_path, folder, overlay=False, max_detections=1)))
    assert [r["score"] for r in records] == pytest.approx([0.9] * 3)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]
    assert model.roi_heads.detections_per_img == 2


def test_with_and_without_overlay_the_records_are_the_same(tmp_path, folder, model):
    annotations = {"images": [], "categories": [{"id": 30, "name": "red"}], "annotations": []}
    annotations["images"] = [{"id": i, "file_name": name} for i, name in enumerate(["sub/a.jpg", "b.png", "a.png"])]
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    for options in ({}, {"annotations": tmp_path / "annotations.json"}):
        drawn, plain = (
            read(run(config_for(tmp_path, folder, overlay=overlay, output=tmp_path / str(overlay), **options)))
            for overlay in (True, False)
        )
        assert drawn == plain
        assert len(drawn) == (1 if options else 6)
        assert drawn[0]["segmentation"]["size"] == [30, 40]


def test_results_can_be_evaluated_with_ids_from_annotations(tmp_path, folder, model):
    coco = {
        "images": [
            {"id": 70 + i, "file_name": name, "height": 30, "width": 40}
            for i, name in enumerate(["sub/a.jpg", "b.png", "a.png"])
        ],
        "categories": [{"id": 30, "name": "red"}, {"id": 40, "name": "other"}],
        "annotations": [
            {"id": 1, "image_id": 71, "category_id": 30, "bbox": [5, 5, 15, 10], "area": 150, "iscrowd": 0}
        ],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    path = run(config_for(tmp_path, folder, annotations=tmp_path / "annotations.json"))
    # "dark" is no category of the file, "red" has another id there.
    assert [(r["image_id"], r["category_id"]) for r in read(path)] == [(71, 30)]
    assert evaluate_coco(coco, path, "bbox").ap == pytest.approx(1)
    coco["images"].pop()
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=r"no image with the file_name a\.png"):
        run(config_for(tmp_path, folder, annotations=tmp_path / "annotations.json"))


def test_an_unreadable_image_stops_the_run_and_keeps_what_was_done(tmp_path, folder, model):
    (folder / "c.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"c\.png"):
        run(config_for(tmp_path, folder, batch_size=8))
    assert {r["file_name"] for r in read(tmp_path / "out" / "results.json")} == {"a.png", "b.png"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "results.json"]


def test_unreadable_images_can_be_skipped(tmp_path, folder, model):
    (folder / "aa.png").write_bytes(b"not an image")
    (folder / "c.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 images could not be read.*aa\.png"):
        path = run(config_for(tmp_path, folder, on_error="skip"))
    assert [r["image_id"] for r in read(path)] == [1, 1, 3, 3, 5, 5]  # ids do not depend on what is readable


def test_names_that_would_collide(tmp_path, model):
    files = [save(tmp_path / d / name) for d, name in (("x", "a.png"), ("x", "A.jpg"), ("y", "a.png"), ("y", "a.jpg"))]
    run(config_for(tmp_path, *files, overlay=True))
    pictures = [p.name.lower() for p in (tmp_path / "out").glob("*.png")]
    assert sorted(pictures) == ["a.png", "a_2.png", "a_3.png", "a_4.png"]
    names = [Path("a_2.png"), Path("a.png"), Path("a.jpg"), Path("A.gif")]
    assert [p.name for p in picture_paths(names, tmp_path)] == ["a_2.png", "a.png", "a_3.png", "A_4.png"]


def test_an_input_is_never_overwritten(tmp_path, folder, model):
    before = (folder / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"another folder.*a\.png"):
        run(config_for(tmp_path, folder, output=folder))
    assert (folder / "a.png").read_bytes() == before


def test_images_are_found_once_and_earlier_pictures_are_no_input(tmp_path, folder):
    save(folder / "out" / "a.png")
    found = find_images([str(folder), str(folder / "a.png")], folder / "out")
    assert list(found.values()) == [Path("a.png"), Path("b.png"), Path("sub/a.jpg")]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([str(tmp_path / "nowhere")], tmp_path / "out")
    with pytest.raises(ValueError, match="no images"):
        find_images([], tmp_path / "out")
