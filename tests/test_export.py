"""Exported detectors, run by processes that do not have this library's model code."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from detections import as_dict, assert_same_detections
from strategies import DEVICE
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

import fastmrcnn
from benchmarks.detectors import calibrate, rescale
from fastmrcnn.checkpoints import ModelInfo, save_checkpoint
from fastmrcnn.cli import main
from fastmrcnn.export import DetectionStep, export, require_compiler
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.ops import MultiScaleRoIAlign, implementations

SIZE, BATCH = (80, 101), 2
RUN = """
import json, sys, torch, torchvision
{imports}
path, kind, images, output = sys.argv[1:]
images = torch.load(images)
if kind == "aoti":
    model = torch._inductor.aoti_load_package(path)
    about = model.get_metadata()["fastmrcnn"]
else:
    extra = {{"fastmrcnn.json": ""}}
    model = torch.export.load(path, extra_files=extra).module()
    about = extra["fastmrcnn.json"]
with torch.no_grad():
    found = model(images)
mine = sorted(name for name in sys.modules if name.partition(".")[0] == "fastmrcnn")
kernels = sorted(name for name in sys.modules if name.startswith("fastmrcnn_kernels"))
torch.save({{"found": found, "about": json.loads(about), "mine": mine, "kernels": kernels}}, output)
"""


class Body(nn.Module):
    """Two maps by two convolutions: the smallest backbone."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 7, 8, 3), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self.first(images).relu()
        return {"0": first, "1": self.second(first)}


def images() -> Tensor:
    return torch.randint(0, 256, (BATCH, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> fastmrcnn.MaskRCNN:
    """All branches that there are, in a small network with random weights that finds something."""
    torch.manual_seed(0)
    maps, channels, classes = ["0", "1"], Body.out_channels, 4
    model = fastmrcnn.MaskRCNN(
        Body(),
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=MultiScaleRoIAlign(maps, 4, 2),
        box_head=TwoMLPHead(channels * 4 * 4, 16),
        box_predictor=FastRCNNPredictor(16, classes),
        mask_roi_pool=MultiScaleRoIAlign(maps, 7, 2),
        mask_head=MaskRCNNHeads(channels, (channels,), 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
        **{"min_size": 96, "max_size": 128, "box_detections_per_img": 10},
        **{"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30},
    ).eval()
    heads: Any = model.roi_heads
    heads.keypoint_roi_pool = MultiScaleRoIAlign(maps, 7, 2)
    heads.keypoint_head = KeypointRCNNHeads(channels, (channels,))
    heads.keypoint_predictor = KeypointRCNNPredictor(channels, 5)
    rpn, boxes = model.rpn.head, heads.box_predictor
    stages = [[(rpn.cls_logits, 2.0), (rpn.bbox_pred, 0.3)], [(boxes.cls_score, 2.5), (boxes.bbox_pred, 1.0)]]
    for layers in [*stages, [(heads.keypoint_predictor.kps_score_lowres, 2.0)]]:
        rescale(layers, lambda: model([image / 255 for image in images()]))
    return model.to(DEVICE)


def expected(model: Any, given: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model finds, and what it finds in float64."""
    with torch.no_grad():
        exact = DetectionStep(copy.deepcopy(model).double(), SIZE, BATCH)(given)
        return DetectionStep(model, SIZE, BATCH)(given), exact


def run_elsewhere(path: Path, kind: str, given: Tensor, imports: str = "") -> dict[str, Any]:
    """What the file says and finds, in a process of its own that finds `fastmrcnn_kernels` but not `fastmrcnn`."""
    torch.save(given, path.with_suffix(".images"))
    script = [
        RUN.format(imports=imports),
        str(path),
        kind,
        str(path.with_suffix(".images")),
        str(path.with_suffix(".found")),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(fastmrcnn.__file__).parents[1] / "kernels")}
    run = subprocess.run([sys.executable, "-c", *script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return torch.load(path.with_suffix(".found"))


def compiler() -> None:
    try:
        require_compiler()
    except OSError as error:
        pytest.skip(f"needs a C++ compiler, such as g++: {error}")


def test_step_is_the_model(model: Any) -> None:
    """To the bit, from bytes to pixels of the images."""
    given = images().to(DEVICE)
    with torch.no_grad():
        batch, _, sizes = model.transform.batch(list(given / 255), None)
        found = as_dict(model.transform.in_original_pixels(model.detect(batch), sizes, [SIZE] * BATCH))
        ours = DetectionStep(model, SIZE, BATCH)(given)
    assert found["count"].min() > 0
    assert list(ours) == ["boxes", "scores", "labels", "count", "masks", "keypoints"]
    assert all(torch.equal(ours[name], found[name]) for name in ours)


def test_package_runs_without_this_library(model: Any, tmp_path: Path) -> None:
    """A minute, for most of which a C++ compiler runs."""
    compiler()
    model = copy.deepcopy(model).cpu()
    path = export(model, tmp_path / "model.pt2", image_size=SIZE, batch_size=BATCH, class_names=["a", "b", "ç"])
    other = run_elsewhere(path, "aoti", images())
    assert other["mine"] == other["kernels"] == []
    assert_same_detections(other["found"], *expected(model, images()))
    about = other["about"]
    assert about["outputs"] == list(other["found"])
    assert (about["image_size"], about["batch_size"], about["channels"]) == (list(SIZE), BATCH, 3)
    assert (about["class_names"], about["device"]) == (["a", "b", "ç"], "cpu")
    assert about["versions"]["torch"] == torch.__version__


def test_package_with_kernels_needs_nothing_but_them(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute.  Without a GPU kernels are chosen for the CPU, and Triton interprets them there, too."""
    compiler()
    found = expected(model, images().to(DEVICE))
    if DEVICE == "cpu":

        def choose(op: str, impl: str, *arguments: Any, **options: Any) -> Any:
            chosen = "triton" if impl == "auto" and "triton" in implementations.IMPLEMENTATIONS[op] else impl
            return implementations.choose_kernel(op, chosen, *arguments, **options)

        for module in ("roi", "proposals", "detections", "suppression"):
            monkeypatch.setattr(import_module(f"fastmrcnn.ops.{module}"), "choose_kernel", choose)
    path = export(model, tmp_path / "model.pt2", image_size=SIZE, batch_size=BATCH)
    other = run_elsewhere(path, "aoti", images().to(DEVICE), "import fastmrcnn_kernels.library")
    assert other["mine"] == []
    assert "fastmrcnn_kernels.triton.roi_align" in other["kernels"]
    assert_same_detections(other["found"], *found)


SMALL = ModelConfig("maskrcnn_resnet18_fpn", min_size=96, max_size=128, proposals=30, detections_per_image=10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = build_model(SMALL, 4).eval()
    calibrate(model, [image / 255 for image in images()])
    info = ModelInfo(SMALL, ["cat", "dog", "cow"], [3, 5, 7])
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt", model, info)


def arguments(folder: Path, **options: object) -> list[str]:
    output = folder / "model.pt2"
    given = {
        "image_size": list(SIZE),
        "batch_size": BATCH,
        "output": output,
        "format": "pt2",
        "device": "cpu",
    } | options
    return ["export", *(f"--{name.replace('__', '.')}={value}" for name, value in given.items())]


def test_command_writes_a_program(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "model.pt2"
    main(arguments(path.parent, checkpoint=checkpoint))
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "2 images of 80 x 101 pixels per call, on cpu" in printed
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    assert {name.partition("/")[0] for name in ZipFile(path).namelist()} == {"archive"}
    other = run_elsewhere(path, "pt2", images())
    assert other["mine"] == other["kernels"] == []
    model, _ = fastmrcnn.checkpoints.load_model(checkpoint)
    assert_same_detections(other["found"], *expected(model, images()))
    assert (other["about"]["class_names"], other["about"]["category_ids"]) == (["cat", "dog", "cow"], [3, 5, 7])


def test_command_builds_a_network(tmp_path: Path) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    few = {"model__proposals": 20, "model__min_size": 64, "model__max_size": 64, "batch_size": 1}
    main(arguments(tmp_path, model__name=name, num_classes=4, **few))
    extra = {"fastmrcnn.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["fastmrcnn.json"])["outputs"] == ["boxes", "scores", "labels", "count"]
    with torch.no_grad():
        found = program.module()(images()[:1])
    assert [list(value.shape) for value in found.values()] == [[1, 60, 4], [1, 60], [1, 60], [1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, r"batch_size: expected at least 1, got 0"),
        ({"image_size": [0, 10]}, r"image_size: expected \(height, width\) of at least 1 pixel each, got \(0, 10\)"),
        ({"output": "model.so"}, r"path of the output: expected a name that ends with \.pt2, got model\.so"),
        ({"checkpoint": "nowhere.pt"}, r"checkpoint: there is no file nowhere\.pt"),
        ({"model__name": SMALL.name}, r"checkpoint, model: expected one of them, got both"),
        ({"checkpoint": "null"}, r"checkpoint, model: expected one of them, got neither"),
    ],
)
def test_errors_of_the_command(options: dict[str, Any], said: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^fastmrcnn export: {said}"):
        main(arguments(tmp_path, **{"checkpoint": checkpoint, **options}))
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_function(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(TypeError, match=r"model: expected a detector of fastmrcnn, got Linear; fastmrcnn\.accelerate"):
        export(nn.Linear(1, 1), path, image_size=SIZE)
    with pytest.raises(ValueError, match=r"format: expected aoti or pt2, got 'onnx'"):
        export(model, path, image_size=SIZE, format="onnx")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(IsADirectoryError):
        export(model, tmp_path / "folder.pt2", image_size=SIZE, format="pt2")


def test_without_a_compiler(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(OSError, match=r"format: aoti needs a C\+\+ compiler.*install g\+\+.*CXX.*format pt2"):
        export(model, tmp_path / "model.pt2", image_size=SIZE)


def test_nothing_changes_when_export_fails(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the old file nor the model, which is in training, but for the time that it is traced."""
    path = tmp_path / "model.pt2"
    path.write_text("old")
    model = copy.deepcopy(model).train()
    model.rpn.eval()
    modes = []

    def watched(step: DetectionStep, *arguments: Any) -> torch.export.ExportedProgram:
        modes.extend(module.training for module in step.model.modules())
        return trace(step, *arguments)

    def fail(program: object, file: Any, **options: object) -> None:
        file.write(b"new")
        raise OSError("no space left")

    trace = torch.export.export
    monkeypatch.setattr(torch.export, "export", watched)
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export(model, path, image_size=SIZE, format="pt2")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    assert modes
    assert not any(modes)
    assert model.training
    assert not model.rpn.training
