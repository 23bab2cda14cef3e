"""What engines on a GPU capture: images are found what is in them alone, without a question to the device.

On a CPU it is run as it is, but as if the tensors were elsewhere: in fixed shapes, by the reference operations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from detectors import pair
from engines import elsewhere, fake_cuda_model
from tiny import tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastmrcnn
from benchmarks.detectors import agreement
from fastmrcnn.batches import DetectionBatch, ImageBatch
from fastmrcnn.engine import Engine
from fastmrcnn.engine.buckets import as_buckets, canvas_of
from fastmrcnn.engine.device import DeviceRunner, culprit
from fastmrcnn.engine.host import HostRunner
from fastmrcnn.engine.layers import Canvases, ClearBeyond, FusedConv2d
from fastmrcnn.engine.padding import keep_apart
from fastmrcnn.engine.prepare import prepare
from fastmrcnn.engine.step import Found, Step

SMALL = {"rpn_post_nms_top_n_test": 30, "box_detections_per_img": 8, "min_size": 96, "max_size": 160}
SIZES = [(480, 704), (704, 480)]


def as_bytes(photos: Sequence[Tensor]) -> list[Tensor]:
    """Photos and parts of them: of all shapes, one that fills its canvas, one that is not wide."""
    whole = [(photo * 255).round().to(torch.uint8) for photo in photos]
    parts = [whole[0][:, :300, :330], whole[1][:, :250, :250].contiguous(), whole[2][:, :400, :240]]
    return [*whole, *parts, whole[0][:, :96, :160].contiguous()]


def device_engine(
    model: Any, batches: list[int], dtype: torch.dtype, sizes: Any = SIZES, masks: Any = "soft"
) -> Engine:
    """An engine like those on a GPU, on this machine."""
    buckets = as_buckets(model.transform, sizes)
    runner = DeviceRunner(prepare(model, dtype), buckets, batches, dtype, masks, 0.5)
    return Engine(runner, model.transform, buckets, batches, dtype, masks)


@pytest.fixture(scope="module")
def detector(photos: list[Tensor]) -> nn.Module:
    return pair("maskrcnn_resnet50_fpn", photos, **SMALL)[1]


def test_images_are_found_what_is_in_them_alone(photos: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a canvas of any size, beside any images: in float64, to a millionth, what the detector finds in each."""
    model = pair("maskrcnn_resnet50_fpn", photos, **SMALL)[1].double()
    images = as_bytes(photos)
    host = HostRunner(prepare(model, torch.float64), torch.float64, "soft", 0.5)
    expected = [host.begin([image], None)()[0] for image in images]
    engine = device_engine(model, [1, 4], torch.float64)
    canvases = {canvas_of(model.transform, (image.shape[-2], image.shape[-1])) for image in images}
    assert len(canvases) > 3, canvases
    assert canvases - {bucket.canvas for bucket in engine.buckets}
    elsewhere(monkeypatch)
    for found in (engine(images), [*expected[:3], engine(images[3:4])[0], engine(images[4:5])[0], *expected[5:]]):
        for a, b in zip(expected, found, strict=True):
            assert len(a["boxes"]) > 0
            for key in a:
                torch.testing.assert_close(b[key], a[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("sides", [[(160, 160), (96, 128), (32, 96)], [(32, 192), (32, 96), (32, 32)]])
def test_proposals_are_of_anchors_on_the_canvas(
    sides: list[tuple[int, int]], detector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are fewer than are wanted, and where a map's side is no power of two of the canvas's."""
    generator = torch.Generator().manual_seed(0)
    canvases = torch.tensor(sides)
    levels = [[tuple(-(-side // step) for side in canvas) for step in (4, 8, 16, 32, 64)] for canvas in sides]
    logits = [torch.randn(3, 3, *side, generator=generator) for side in levels[0]]
    deltas = [torch.randn(3, 12, *side, generator=generator) * 0.3 for side in levels[0]]
    elsewhere(monkeypatch)
    rpn = copy.deepcopy(detector.rpn)
    rpn._post_nms_top_n["testing"] = 2000
    sizes = canvases - torch.tensor([[3, 5]])
    images = ImageBatch(torch.zeros(3, 3, *sides[0]), sizes, canvases)
    together = rpn.propose(images, [x.clone() for x in logits], deltas)
    for i, canvas in enumerate(canvases.tolist()):
        parts = [
            [x[i : i + 1, :, :h, :w] for x, (h, w) in zip(maps, levels[i], strict=True)] for maps in (logits, deltas)
        ]
        alone = rpn.propose(ImageBatch(torch.zeros(1, 3, *canvas), sizes[i : i + 1]), *parts)
        count = int(alone.count)
        assert 0 < count < 2000
        assert int(together.count[i]) == count
        assert torch.equal(together.boxes[i, :count], alone.boxes[0, :count])


def test_keypoints(photos: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where peaks of a heatmap are equal either may be taken: their heights are compared, float32 in torchvision."""
    _, model = pair("keypointrcnn_resnet50_fpn", photos[:1], **SMALL | {"box_detections_per_img": 4})
    images = as_bytes(photos)[3:5]
    expected = HostRunner(prepare(model.double(), torch.float64), torch.float64, None, 0.5).begin(images, None)()
    engine = device_engine(model, [2], torch.float64)
    elsewhere(monkeypatch)
    for a, b in zip(expected, engine(images), strict=True):
        assert list(a) == list(b)
        for key in ("boxes", "labels", "scores", "keypoints_scores"):
            torch.testing.assert_close(b[key].float(), a[key].float(), rtol=1e-5, atol=1e-5, msg=key)


def test_padding_does_matter(detector: nn.Module, photos: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail: torchvision's detectors, and ours without canvases, see the padding."""
    image = as_bytes(photos)[3]
    alone = HostRunner(prepare(detector, torch.float32), torch.float32, "soft", 0.5).begin([image], None)()
    engine = device_engine(detector, [1], torch.float32)
    elsewhere(monkeypatch)
    assert agreement(alone, engine([image])) >= 0.98
    monkeypatch.setattr(Canvases, "clear_beyond", lambda self, maps, value=0.0: maps)
    assert agreement(alone, engine([image])) < 0.9


@pytest.mark.parametrize("masks", ["soft", "bool", "bits", "rle", None])
def test_mask_formats(masks: Any, detector: nn.Module, photos: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    images = as_bytes(photos)[:2]
    expected = HostRunner(prepare(detector, torch.float32), torch.float32, masks, 0.5).begin(images, None)()
    engine = device_engine(detector, [2], torch.float32, masks=masks)
    elsewhere(monkeypatch)
    for a, b in zip(expected, engine(images), strict=True):
        assert list(a) == list(b)
        if isinstance(a.get("masks"), Tensor):
            assert a["masks"].shape == b["masks"].shape
            assert a["masks"].dtype == b["masks"].dtype


def as_graph(step: Step) -> Callable[[], Found]:
    """A function that does as `step`, and overwrites what it has returned, as a CUDA graph does."""
    found = step()

    @torch.inference_mode()
    def replay() -> Found:
        again = step().detections
        for field in fields(DetectionBatch):
            if (memory := getattr(found.detections, field.name)) is not None:
                memory.copy_(getattr(again, field.name))
        return found

    return replay


def test_results_outlive_the_next_run(
    detector: nn.Module, photos: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = device_engine(detector, [1], torch.float32, masks="bool")
    elsewhere(monkeypatch)
    programs: Any = engine._runner.programs
    programs |= {key: (step, as_graph(step)) for key, (step, _) in programs.items()}
    images = as_bytes(photos)
    expected = [engine([image])[0] for image in images[:2]]
    first = engine.begin(images[:1])
    second = engine.begin(images[1:2])
    for finish, result in ((second, expected[1]), (first, expected[0])):
        assert all(torch.equal(value, result[key]) for key, value in finish()[0].items())


def test_what_depends_on_padding(photos: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Squeeze and excitation sees all of a map: no image is padded further then, and who has another is told."""
    _, model = pair("fasterrcnn_mobilenet_v3_large_fpn", photos[:1], **SMALL)
    engine = device_engine(model, [1], torch.float32)
    assert any("AdaptiveAvgPool2d" in name for name in engine._runner.depends_on_padding)
    elsewhere(monkeypatch)
    with pytest.raises(ValueError, match=r"100 x 300 pixels .*AdaptiveAvgPool2d\) depend\. Add it to image_sizes"):
        engine([torch.zeros(3, 100, 300, dtype=torch.uint8)])
    image = torch.randint(256, (3, 480, 704), dtype=torch.uint8)
    alone = HostRunner(prepare(model, torch.float32), torch.float32, None, 0.5).begin([image], None)()
    assert agreement(alone, engine([image])) >= 0.98


class Blurred(nn.Module):
    """A backbone that pads by itself, and is none that could be traced."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.inner = backbone

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) if float(x.abs().sum()) >= 0 else None


def test_backbones_that_are_not_understood(detector: Any) -> None:
    model = prepare(detector, torch.float32)
    model.backbone = Blurred(model.backbone)
    assert keep_apart(model, Canvases()) == ["backbone (Blurred)"]


def test_canvases_that_are_no_multiples() -> None:
    """Then a cell may be a part of one."""
    model = prepare(tiny(fastmrcnn.MaskRCNN, size_divisible=16), torch.float32)
    assert keep_apart(model, Canvases())[-1] == "transform.size_divisible is 16, of which 32 is no divisor"


def test_who_clears(detector: Any) -> None:
    model, canvases = prepare(detector, torch.float32), Canvases()
    assert keep_apart(model, canvases) == []
    layers = [m for part in (model.backbone, model.rpn.head) for m in part.modules() if isinstance(m, FusedConv2d)]
    assert all(layer.canvases is canvases for layer in layers)
    assert [m.value for m in model.modules() if isinstance(m, ClearBeyond)] == [-torch.inf]
    assert not any(m.canvases for m in model.roi_heads.modules() if isinstance(m, FusedConv2d))


@pytest.mark.parametrize(
    ("builder", "dtype", "batch"),
    [
        ("maskrcnn_resnet50_fpn", torch.float16, 1),
        ("maskrcnn_resnet50_fpn", torch.float32, 4),
        ("maskrcnn_resnet50_fpn_v2", torch.float16, 4),
        ("fasterrcnn_mobilenet_v3_large_fpn", torch.float16, 4),
    ],
)
def test_no_synchronisation(builder: str, dtype: torch.dtype, batch: int) -> None:
    """From the bytes in the buffer to encoded masks: on fake tensors a value that is read is an error."""
    options = {"weights": None, "weights_backbone": None, "box_detections_per_img": 10}
    model = getattr(fastmrcnn, builder)(**options).eval()
    prepared = prepare(model, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        fake_cuda_model(prepared)
        canvases = Canvases()
        keep_apart(prepared, canvases)
        bucket = as_buckets(model.transform, (480, 640))[0]
        found = Step(prepared, canvases, bucket, batch, dtype, 0.5)()
    assert found.detections.boxes.shape == (batch, 10, 4)
    assert found.detections.boxes.device.type == "cuda"
    assert (found.encoding is not None) == ("mask" in builder)


class Asking(nn.Module):
    """A head that asks for a value."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_what_cannot_be_captured_is_named() -> None:
    model = fastmrcnn.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    model.roi_heads.box_head = Asking(model.roi_heads.box_head)
    prepared = prepare(model, torch.float16)
    assert not any(m._forward_hooks for m in prepared.modules())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        fake_cuda_model(prepared)
        step = Step(prepared, Canvases(), as_buckets(model.transform, (480, 640))[0], 1, torch.float16, None)
        with pytest.raises(DataDependentOutputException):
            step()
        said = culprit(step)
    assert said is not None
    assert said.startswith("roi_heads.box_head (Asking) asks for what only the device knows")
    assert not any(m._forward_hooks for m in prepared.modules())


def test_canvases_do_not_change_what_fills_them(detector: Any, photos: list[Tensor]) -> None:
    """Where all images fill the batch, canvases change no bit."""
    batch, _, _ = detector.transform.batch(photos[:1], None)
    model, canvases = prepare(detector, torch.float32), Canvases()
    keep_apart(model, canvases)
    with torch.inference_mode():
        plain = model.features(batch)
        canvases.images = ImageBatch(batch.tensors, batch.sizes, torch.tensor([batch.tensors.shape[-2:]]))
        kept = model.features(batch)
    assert all(torch.equal(kept[name], maps) for name, maps in plain.items())
