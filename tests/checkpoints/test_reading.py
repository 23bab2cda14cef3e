"""Files of any kind: recognised by what is in them, refused with a reason, and nothing in them is executed."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import struct
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.foreign_files import Kind, detectron2_shapes

import fastmrcnn
from fastmrcnn.checkpoints import ModelInfo, load_model, load_weights, save_checkpoint
from fastmrcnn.checkpoints.hdf5 import SIGNATURE
from fastmrcnn.checkpoints.native import load_strictly, save_safetensors
from fastmrcnn.checkpoints.reading import read_weights
from fastmrcnn.cli import main
from fastmrcnn.convert import convert
from fastmrcnn.models.config import ModelConfig, build_model

CONFIG = ModelConfig("maskrcnn_resnet18_fpn", min_size=64, max_size=64, detections_per_image=7)
INFO = ModelInfo(CONFIG, ["cell", "debris"], [3, 7])


class Hostile:
    """What runs a command when a pickle of it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Rebuilt:
    """What is read as the result of a call."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture(scope="module")
def model() -> fastmrcnn.MaskRCNN:
    torch.manual_seed(0)
    built = build_model(CONFIG, 3)
    assert isinstance(built, fastmrcnn.MaskRCNN)
    return built.eval()


@pytest.fixture
def converted(model: fastmrcnn.MaskRCNN, tmp_path: Path) -> Path:
    return save_safetensors(tmp_path / "model.safetensors", model.state_dict(), INFO)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_converted_files_need_no_flags(model: fastmrcnn.MaskRCNN, converted: Path) -> None:
    ours, info = load_model(converted)
    assert info == INFO
    assert not ours.training
    assert equal(ours.state_dict(), model.state_dict())
    image = torch.rand(3, 64, 64)
    with torch.inference_mode():
        assert equal(ours([image])[0], model([image])[0])
    predictor = fastmrcnn.Predictor(converted, device="cpu")
    assert (predictor.class_names, predictor.category_ids) == (INFO.class_names, INFO.category_ids)
    predictor = fastmrcnn.Predictor(fastmrcnn.load(converted))
    assert (predictor.class_names, predictor.category_ids) == (INFO.class_names, INFO.category_ids)
    other = save_checkpoint(converted.parent / "a.pt", model, INFO)
    assert converted.stat().st_mode == other.stat().st_mode


def test_conversion_of_our_own_checkpoints(model: fastmrcnn.MaskRCNN, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "best.pt", model, INFO)
    assert convert(path, tmp_path / "best.safetensors").info == INFO
    assert load_model(tmp_path / "best.safetensors")[1] == INFO


def test_tensors_that_a_file_shares_are_not_the_models(model: fastmrcnn.MaskRCNN, tmp_path: Path) -> None:
    """Two layers may have been saved as views of the same numbers."""
    state = model.state_dict()
    fc = "roi_heads.box_predictor"
    state[f"{fc}.cls_score.bias"] = state[f"{fc}.bbox_pred.bias"][:3]
    torch.save({"format": "fastmrcnn-1", "model": state, "info": asdict(INFO), "training": None}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert equal(load_model(tmp_path / "a.safetensors")[0].state_dict(), state)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To our format and back to the library's: the same file of weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = detectron2_shapes(Kind(mask=False, classes=3))
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({"model": state | {"pixel_mean": torch.tensor([103.53, 116.28, 123.675])}}, tmp_path / "model_final.pth")
    main(["convert", str(tmp_path / "model_final.pth"), str(tmp_path / "a.safetensors")])
    printed = capsys.readouterr().out
    assert "fasterrcnn_resnet50_fpn of detectron2, 3 classes (class 1, class 2, class 3)" in printed
    assert "without a part in results: pixel_mean" in printed
    main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "back.pth"), "--format", "detectron2"])
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "back.pkl"), "--format", "detectron2"])
    content = pickle.loads((tmp_path / "back.pkl").read_bytes())
    assert content["__author__"] == "fastmrcnn"
    assert all(np.array_equal(content["model"][name], state[name].numpy()) for name in state)
    with pytest.raises(SystemExit, match=r"fastmrcnn convert: checkpoint: there is no file .*nothing\.pth"):
        main(["convert", str(tmp_path / "nothing.pth"), str(tmp_path / "a.safetensors")])
    with pytest.raises(SystemExit, match="is none that torchvision has the results of"):
        main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "c.pth"), "--format", "torchvision"])
    assert not (tmp_path / "c.pth").exists()


def test_options(converted: Path) -> None:
    assert fastmrcnn.load(converted, detections_per_image=3).roi_heads.detections_per_img == 3
    with pytest.raises(ValueError, match=r"^detections: there is no such option; there are anchor_sizes, box_samples"):
        fastmrcnn.load(converted, detections=3)
    with pytest.raises(ValueError, match="source='keras': expected one of auto, fastmrcnn"):
        fastmrcnn.load(converted, source="keras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes=1: expected the background"):
        fastmrcnn.load(converted, num_classes=1)
    with pytest.raises(FileNotFoundError, match=r"checkpoint: there is no file .*nothing\.pkl"):
        fastmrcnn.load(converted.parent / "nothing.pkl")


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    info = ModelInfo(ModelConfig("maskrcnn_resnet50_c4", conventions="detectron2"), ["cell"], [1])
    first, second = build_model(info.config, 2), build_model(info.config, 2)
    path = save_safetensors(tmp_path / "c4.safetensors", first.state_dict(), info)
    assert path.stat().st_size < 1.02 * 4 * sum(p.numel() for p in {*first.parameters(), *first.buffers()})
    load_strictly(second, read_weights(path).state)
    assert equal(first.state_dict(), second.state_dict())
    state = read_weights(path).state
    del state["roi_heads.box_predictor.cls_score.bias"]
    with pytest.raises(ValueError, match=r"cls_score\.bias and 0 more"):
        load_strictly(second, state)


def test_start_from_another_library(model: fastmrcnn.MaskRCNN, tmp_path: Path) -> None:
    """`--init` takes what `load` does, and says so where conventions differ."""
    shapes = detectron2_shapes(Kind(mask=False, classes=3))
    torch.save({"model": {name: torch.full(shape, 0.5) for name, shape in shapes.items()}}, tmp_path / "a.pth")
    same = build_model(ModelConfig("fasterrcnn_resnet50_fpn", conventions="detectron2"), 6)
    same.info = ModelInfo(ModelConfig("fasterrcnn_resnet50_fpn", conventions="detectron2"))
    report = load_weights(same, tmp_path / "a.pth")
    assert set(report.anew) == {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}
    other = build_model(ModelConfig("fasterrcnn_resnet50_fpn", norm="frozen"), 6)
    other.info = ModelInfo(ModelConfig("fasterrcnn_resnet50_fpn"))
    with pytest.warns(UserWarning, match=r"conventions of detectron2; this one has those of torchvision"):
        load_weights(other, tmp_path / "a.pth")
    assert other.backbone.fpn.inner_blocks[0][0].weight.unique().tolist() == [0.5]


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that want something to run, or to be large."""
    marker = folder / "executed"
    hostile = Hostile(marker)

    def write(name: str, data: bytes) -> tuple[str, Path]:
        (folder / name).write_bytes(data)
        return name, folder / name

    yield write("command.pkl", pickle.dumps({"model": {"weight": hostile}, "__author__": "x"}))
    torch.save({"model": {"a": torch.zeros(2)}, "meta": hostile}, folder / "command.pth")
    yield "command.pth", folder / "command.pth"
    torch.save({"meta": hostile}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    yield "legacy.pth", folder / "legacy.pth"
    yield write("eval.pkl", b'cbuiltins\neval\n(S\'__import__("os").system("touch %s")\'\ntR.' % str(marker).encode())
    yield write("import.pkl", b"cmmengine.evil\nrun\n(S'touch %s'\ntR." % str(marker).encode())
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    yield write("large.safetensors", struct.pack("<Q", len(text)) + text)
    yield write("header.safetensors", struct.pack("<Q", 1 << 40) + b"{" + bytes(100))
    yield write("cut.safetensors", struct.pack("<Q", 50) + b'{"a":')
    yield write("numbers.pkl", pickle.dumps(np.zeros(3))[:40])
    yield write("text.pth", b"not a checkpoint at all")
    yield write("empty.pth", b"")
    yield write("other.pth", pickle.dumps({"model": {"weight": np.zeros(3)}}))
    claims = (torch.UntypedStorage(16), 0, (1 << 40,), (1,), False, OrderedDict())
    torch.save({"model": {"a": Rebuilt(torch._utils._rebuild_tensor_v2, claims)}}, folder / "large.pth")
    yield "large.pth", folder / "large.pth"
    with zipfile.ZipFile(folder / "path.pth", "w") as archive:
        archive.writestr("../../escaped/data.pkl", pickle.dumps(hostile))
        archive.writestr("../../escaped/version", "3")
    yield "path.pth", folder / "path.pth"
    torch.save({"model": {"a": torch.zeros(1000)}}, folder / "whole.pth")
    yield write("cut.pth", (folder / "whole.pth").read_bytes()[:1500])
    yield "whole.pth", folder / "whole.pth"


@pytest.mark.parametrize("position", range(16))
def test_hostile_and_damaged_files(position: int, tmp_path: Path) -> None:
    name, path = list(files(tmp_path))[position]
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(ValueError, match=rf"^checkpoint: .*{name}"):
        fastmrcnn.load(path)
    assert sorted(tmp_path.parent.rglob("*")) == before  # nothing has been executed, or written elsewhere


def test_all_files_are_tried(tmp_path: Path) -> None:
    assert len(list(files(tmp_path))) == 16


def test_packages_that_are_not_there(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(SIGNATURE)
    for name, path in (("safetensors", converted), ("h5py", tmp_path / "a.h5")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"install {name}: pip install 'fastmrcnn\[convert\]'"):
            fastmrcnn.load(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"to write safetensors install them: pip install 'fastmrcnn\[convert\]'"):
        save_safetensors(tmp_path / "b.safetensors", {}, INFO)


def test_metadata_that_are_not_ours(model: fastmrcnn.MaskRCNN, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = asdict(ModelInfo(ModelConfig("functools"), ["cell"], [1]))  # type: ignore[arg-type]
    for i, text in enumerate(("{", "{}", "[]", json.dumps(other))):
        metadata = {"format": "fastmrcnn-1", "info": text}
        save_file({"a": torch.zeros(2)}, tmp_path / f"{i}.safetensors", metadata)
        with pytest.raises(ValueError, match=r"^checkpoint: .*\.safetensors"):
            fastmrcnn.load(tmp_path / f"{i}.safetensors")


@pytest.fixture
def server(converted: Path) -> Iterator[str]:
    """Files of the folder, over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None: ...

    folder = str(converted.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_urls(server: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded once, if the hash is stated, and right."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    whole = hashlib.sha256(converted.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="has no hash to check the file by; add #sha256="):
        fastmrcnn.load(f"{server}/model.safetensors")
    with pytest.raises(ValueError, match="is not the file it should be"):
        fastmrcnn.load(f"{server}/model.safetensors#sha256={'0' * 64}")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    assert fastmrcnn.load(f"{server}/model.safetensors#sha256={whole}").info == INFO
    named = converted.rename(converted.with_name(f"model-{whole[:8]}.safetensors"))
    assert fastmrcnn.load(f"{server}/{named.name}").info == INFO
    named.unlink()
    assert fastmrcnn.load(f"{server}/{named.name}").info == INFO  # the one that is kept
    kept = next((tmp_path / "hub" / "checkpoints").glob(f"*{named.name}"))
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(OSError, match="could not be downloaded"):
        fastmrcnn.load(f"{server}/{named.name}")  # but not if it is damaged
