"""Any number of images in, results in their order out."""

from __future__ import annotations

import itertools
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastmrcnn
import fastmrcnn.checkpoints
from fastmrcnn.data import DataError
from fastmrcnn.inputs import alike, as_tensor, padding
from fastmrcnn.predictor import Prediction, Predictor


class Fake(nn.Module):
    """Finds two things in every image; the second score is the image's mean, the second label its width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.BatchNorm2d(3)
        self.roi_heads = nn.Module()
        self.roi_heads.detections_per_img = 2
        self.calls: list[list[tuple[int, ...]]] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls.append([tuple(image.shape[1:]) for image in images])
        return [self.answer(image) for image in images]

    def answer(self, image: Tensor) -> dict[str, Tensor]:
        masks = torch.zeros(2, 1, *image.shape[-2:])
        masks[0, 0, 1:, 1:] = 0.6
        masks[1, 0, 0, :3] = 0.9
        result = {
            "boxes": torch.tensor([[1.0, 1, 9, 9], [0, 0, 3, 1]]),
            "labels": torch.tensor([1, image.shape[-1]]),
            "scores": torch.stack((torch.tensor(0.9), image.mean().cpu())),
            "masks": masks,
        }
        return {name: value[: self.roi_heads.detections_per_img] for name, value in result.items()}


def picture(height: int = 10, width: int = 12, value: float = 0.5) -> Tensor:
    return torch.full((3, height, width), value)


def save(path: Path, value: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def values(results: Any) -> list[float]:
    return [round(float(result["scores"][1]), 3) for result in results]


def test_every_kind_of_input_is_the_same_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    pil = Image.fromarray(pixels)
    inputs = [
        path,
        str(path),
        pil,
        pixels,
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        np.dstack([pixels, pixels[..., :1]]),
        pixels[:, ::-1][:, ::-1],
        torch.from_numpy(pixels).permute(2, 0, 1),
        expected,
        expected.double(),
    ]
    predictor = Predictor(Fake())
    for number, prediction in enumerate(predictor.stream(inputs)):
        assert prediction.source is inputs[number]
        assert prediction.image is not None
        torch.testing.assert_close(prediction.image, expected.to(prediction.image.dtype), rtol=1e-6, atol=0)
        one = predictor(inputs[number])
        assert isinstance(one, dict)
        assert one["labels"].tolist() == [1, 30]
    gray = [pixels[..., 0], pixels[..., :1], expected[:1], pil.getchannel(0)]
    for prediction in predictor.stream(gray):
        assert prediction.image is not None
        torch.testing.assert_close(prediction.image, expected[:1].repeat(3, 1, 1), rtol=1e-6, atol=0)


def test_one_gives_one_and_several_give_a_list() -> None:
    predictor = Predictor(Fake(), batch_size=2)
    images = [picture(value=v / 10) for v in range(5)]
    assert values([predictor(images[3])]) == [0.3]
    for several in (images, tuple(images), iter(images), torch.stack(images), (image for image in images)):
        assert values(predictor(several)) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert values(predictor(np.stack([image.permute(1, 2, 0).numpy() for image in images])))[4] == 0.4
    assert predictor([]) == []
    assert len(predictor(images[:1])) == 1
    (prediction,) = predictor.stream(images[0])
    assert prediction.source is images[0]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (5, TypeError, r"inputs\[2\]: expected a path, .* got int"),
        (None, TypeError, r"got NoneType"),
        (torch.zeros(3, 3), ValueError, r"inputs\[2\]: expected a tensor \[3, H, W\].*got \[3, 3\]"),
        (torch.zeros(2, 9, 9), ValueError, r"got \[2, 9, 9\]"),
        (torch.zeros(3, 0, 9), ValueError, r"got \[3, 0, 9\]"),
        (torch.zeros(3, 9, 9, dtype=torch.int64), TypeError, r"expected uint8, uint16 or floating .* got torch.int64"),
        (np.zeros((3, 9, 9), np.uint8), ValueError, r"expected an array \[H, W, 3\].*got \[3, 9, 9\]"),
        (np.zeros((9, 9, 3), np.int32), TypeError, r"got int32"),
        (Image.fromarray(np.full((9, 9), -5, np.int32)), DataError, r"inputs\[2\]: values -5 to -5"),
        (np.full((9, 9), 255.0), ValueError, r"values in 0 .. 1, got 255 to 255"),
        (torch.full((3, 9, 9), float("nan")), ValueError, r"got nan to nan"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_is_no_image_is_named_once_all_before_it_are_done(
    wrong: Any, error: type[Exception], message: str, on_error: Any
) -> None:
    stream = Predictor(Fake(), batch_size=4, on_error=on_error).stream([picture(), picture(), wrong, picture()])
    assert [next(stream).error for _ in range(2)] == [None, None]
    with pytest.raises(error, match=message):
        next(stream)


def test_bad_options_are_refused() -> None:
    options: list[dict[str, Any]] = [
        {"masks": "png"},
        {"on_error": "ignore"},
        {"batch_size": 0},
        {"workers": -1},
        {"max_detections": 0},
        {"mask_threshold": 1},
    ]
    for option in options:
        with pytest.raises(ValueError, match=next(iter(option))):
            Predictor(Fake(), **option)
    with pytest.raises(TypeError, match=r"model must be .* got int"):
        Predictor(cast(Any, 5))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        Predictor("nowhere.pt")
    with pytest.raises(TypeError, match="inputs: expected a path"):
        Predictor(Fake())(cast(Any, 5))


def test_from_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    info = types.SimpleNamespace(class_names=["a", "b"], category_ids=[7, 9])
    asked = []

    def load_model(path: Any, device: Any) -> Any:
        asked.append((path, device))
        return Fake().to(device), info

    monkeypatch.setattr(fastmrcnn.checkpoints, "load_model", load_model)
    for predictor in (Predictor("m.pt", device="cpu"), Predictor.from_checkpoint("m.pt", device="cpu", batch_size=2)):
        assert predictor.class_names == ["a", "b"]
        assert predictor.category_ids == [7, 9]
        assert len(predictor([picture()] * 3)) == 3
    assert asked == [("m.pt", torch.device("cpu"))] * 2
    assert Predictor("m.pt", device="cpu", class_names=["x"]).class_names == ["x"]


def test_equal_sizes_fill_batches() -> None:
    model = Fake()
    Predictor(model, batch_size=3)([picture()] * 8)
    assert [len(call) for call in model.calls] == [3, 3, 2]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_alike_sizes_go_into_a_batch_and_results_keep_the_order(tmp_path: Path, workers: int) -> None:
    sizes = [(40, 30), (30, 40), (40, 30), (41, 30), (30, 40), (30, 40), (30, 41), (40, 30), (40, 30)]
    paths = [save(tmp_path / f"{i}.png", 20 * i, size) for i, size in enumerate(sizes)]
    model = Fake()
    results = list(Predictor(model, batch_size=2, workers=workers).stream(paths))
    assert [prediction.source for prediction in results] == paths
    assert values(p.result for p in results) == [round(20 * i / 255, 3) for i in range(len(paths))]
    assert [int(p.result["labels"][1]) for p in results if p.result] == [width for width, _ in sizes]
    assert all(padding(call) < 0.05 for call in model.calls)
    assert [len(call) for call in model.calls] == [2, 2, 2, 2, 1]


def test_alike() -> None:
    assert alike([(10, 20), (20, 10), (10, 20), (10, 19)], 2) == [0, 2]
    assert alike([(10, 20), (20, 10), (10, 19)], 2) == [0, 2]
    assert alike([(10, 20), (20, 10)], 2) == [0]  # 800 pixels for 400
    assert alike([(10, 10)] * 5, 3) == [0, 1, 2]
    assert alike([(10, 10)], 3) == [0]
    # Sizes are those that the model will see.
    model = fastmrcnn.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96)
    assert fastmrcnn.inference.resized(model, picture(480, 640)) == (64, 85)
    assert fastmrcnn.inference.resized(model, picture(300, 900)) == (32, 96)
    assert fastmrcnn.inference.resized(Fake(), picture(300, 900)) == (300, 900)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (1, 2), (4, 0), (4, 2)])
def test_an_endless_stream_is_read_a_little_ahead(batch_size: int, workers: int) -> None:
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        for taken in itertools.count(1):
            yield picture(value=taken % 10 / 10)

    stream = Predictor(Fake(), batch_size=batch_size, workers=workers).stream(endless())
    for number, prediction in enumerate(itertools.islice(stream, 50), start=1):
        assert values([prediction.result]) == [number % 10 / 10]
        assert taken - number <= 4 * batch_size + batch_size + 2 * workers
        assert workers or batch_size > 1 or taken == number  # so that each frame of a camera is done at once
    stream.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("fastmrcnn-read") and not wait(thread)
    ]


def wait(thread: threading.Thread) -> bool:
    thread.join(5)
    return not thread.is_alive()


def test_files_are_read_while_the_model_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path / f"{i}.png") for i in range(6)]
    fourth_is_read = threading.Event()
    load = fastmrcnn.inputs.load_image

    def noted(path: Any, **options: Any) -> Tensor:
        if path == paths[3]:
            fourth_is_read.set()
        return load(path, **options)

    monkeypatch.setattr(fastmrcnn.inputs, "load_image", noted)
    stream = Predictor(Fake(), workers=2).stream(paths)
    next(stream)
    assert fourth_is_read.wait(10)


def test_unreadable_files(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", 50 * i) for i in range(4)]
    paths[1].write_bytes(b"not an image")
    paths[3] = tmp_path / "none.png"
    done: list[Prediction] = []
    with pytest.raises(DataError, match=r"1\.png"):
        done.extend(Predictor(Fake(), batch_size=4).stream(paths))
    for on_way in Predictor(Fake(), batch_size=4).stream(paths[:1] + paths[2:3]):
        done.append(on_way)
    assert [p.source for p in done] == [paths[0], paths[0], paths[2]]
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        Predictor(Fake())(paths[3])
    skipping = Predictor(Fake(), batch_size=2, on_error="skip")
    with pytest.warns(UserWarning, match=r"2 images could not be read.*1\.png"):
        found = list(skipping.stream(paths))
    assert [p.result is None for p in found] == [False, True, False, True]
    assert [p.source for p in found] == paths
    assert isinstance(found[1].error, DataError)
    assert found[2].error is None
    with pytest.warns(UserWarning, match="2 images"):
        assert [result is None for result in skipping(paths)] == [False, True, False, True]


def test_inputs_that_fail_themselves() -> None:
    def broken() -> Iterator[Tensor]:
        yield picture()
        raise RuntimeError("camera gone")

    stream = Predictor(Fake(), batch_size=4, on_error="skip").stream(broken())
    assert next(stream).error is None
    with pytest.raises(RuntimeError, match="camera gone"):
        next(stream)


def test_the_model_is_as_before_between_results() -> None:
    model = Fake().train()
    model.frozen.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prediction in Predictor(model, max_detections=1).stream([picture()] * 2):
            assert prediction.result is not None
            assert len(prediction.result["scores"]) == 1
            assert model.roi_heads.detections_per_img == 2
            assert model.training
            assert not model.frozen.training
            assert not torch.is_inference_mode_enabled()


def test_progress_bar_counts_images(capsys: pytest.CaptureFixture[str]) -> None:
    list(Predictor(Fake()).stream(iter([picture()] * 3), progress="frames", total=3))
    printed = capsys.readouterr().err
    assert "frames: 100%" in printed
    assert "3/3" in printed
    assert "image/s" in printed
    Predictor(Fake())([picture()] * 2, progress=True)
    assert "predict: 100%" in capsys.readouterr().err
    Predictor(Fake())([picture()] * 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("dtype", "white", "size"), [(np.uint8, 255, (3, 10, 12)), (np.float32, 1, (3, 10, 12))])
def test_arrays_may_change_after_they_are_handed_over(dtype: Any, white: int, size: Any) -> None:
    frame = np.zeros(size, dtype).transpose(1, 2, 0)

    def video() -> Iterator[Any]:
        for value in range(6):
            frame[:] = white * value / 5
            yield frame

    assert values(Predictor(Fake(), batch_size=2)(video())) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert as_tensor(frame, "x").max() == 1
