"""Engines on the device that is here: a GPU, where they are captured, or a CPU."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models.detection as torchvision_detection
from detectors import KINDS, pair
from strategies import DEVICE
from torch import Tensor, nn
from torchvision.ops import box_iou

import fastmrcnn
from benchmarks.detectors import agreement
from fastmrcnn import ops
from fastmrcnn.engine.engine import DTYPES
from fastmrcnn.engine.host import HostRunner
from fastmrcnn.engine.prepare import prepare
from fastmrcnn.inference import Result

FEW = {"rpn_post_nms_top_n_test": 30}
SIZES = [(480, 640), (640, 480)]


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    """Convolutions in float32, by the same algorithm every time."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def photo_bytes(photos: list[Tensor]) -> list[Tensor]:
    return [(photo * 255).round().to(torch.uint8) for photo in photos]


@pytest.fixture(scope="module")
def detector(photos: list[Tensor]) -> nn.Module:
    """With few detections, for what does not depend on their number."""
    return pair("maskrcnn_resnet50_fpn", photos[:1], **FEW, box_detections_per_img=10)[1].to(DEVICE)


def compiled(model: nn.Module, **options: Any) -> fastmrcnn.Engine:
    return fastmrcnn.compile(model, **{"image_sizes": SIZES, "dtype": torch.float32} | options)


@pytest.fixture(scope="module")
def engine(detector: nn.Module) -> fastmrcnn.Engine:
    return compiled(detector, batch_sizes=2)


def eager(model: nn.Module, images: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Result]:
    """What a model finds in each image alone."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        results = [model([image.to(device, dtype) / 255])[0] for image in images]
    return [{key: value.cpu() for key, value in result.items()} for result in results]


@pytest.mark.parametrize("builder", KINDS)
def test_same_detections(builder: str, photos: list[Tensor], photo_bytes: list[Tensor]) -> None:
    """In float64 all are equal to a millionth; in float32 nearly all, since rounding may flip a decision."""
    _, model = pair(builder, photos, **FEW, box_detections_per_img=10)
    expected = eager(model.to(DEVICE), photo_bytes)
    found = compiled(model)(photo_bytes)
    assert agreement(expected, found) >= 0.98
    for a, b in zip(expected, found, strict=True):
        assert list(a) == list(b)
        assert all(a[key].dtype == b[key].dtype and a[key].shape[1:] == b[key].shape[1:] for key in a)
    model.cpu().double()
    runner = HostRunner(prepare(model, torch.float64), torch.float64, "soft", 0.5)
    exact, found_exact = eager(model, photo_bytes[:1], torch.float64)[0], runner.begin(photo_bytes[:1], None)()[0]
    assert len(exact["boxes"]) > 0
    for key in exact:
        torch.testing.assert_close(found_exact[key], exact[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES[DEVICE] if dtype != torch.float32])
def test_16_bits(dtype: torch.dtype, photo_bytes: list[Tensor], detector: nn.Module) -> None:
    """As near to float32 as a model of random weights comes under autocast."""
    engine = compiled(detector, dtype=dtype)
    assert engine.dtype == dtype
    expected = eager(detector, photo_bytes)
    with torch.autocast(DEVICE, dtype):
        autocast = eager(detector, photo_bytes)
    found = engine(photo_bytes)

    def similar(results: list[Result]) -> float:
        overlaps = [box_iou(a["boxes"], b["boxes"]).amax(dim=1) for a, b in zip(expected, results, strict=True)]
        return torch.cat(overlaps).mean().item()

    assert similar(found) > 0.95 * similar(autocast)
    assert all(result["scores"].dtype == result["boxes"].dtype == torch.float32 for result in found)


def test_the_model_is_left_alone(detector: nn.Module, photo_bytes: list[Tensor]) -> None:
    model = copy.deepcopy(detector).train()
    model.roi_heads.score_thresh = 0.2
    before = copy.deepcopy(model)
    engine = compiled(model)
    for (name, old), new in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), before.parameters(), strict=True))
    expected = engine(photo_bytes[:1])
    assert expected[0]["scores"].min() > 0.2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.roi_heads.score_thresh = 0.9
    model.transform.min_size, model.transform.image_mean = (64,), [0.0]
    assert torch.equal(engine(photo_bytes[:1])[0]["boxes"], expected[0]["boxes"])


def test_torchvision_detectors(photos: list[Tensor], photo_bytes: list[Tensor]) -> None:
    theirs, _ = pair("maskrcnn_resnet50_fpn", photos[:1], **FEW)
    expected = eager(theirs.to(DEVICE), photo_bytes[:1])
    assert agreement(expected, compiled(theirs)(photo_bytes[:1])) >= 0.98
    with pytest.raises(TypeError, match="RetinaNet"):
        compiled(torchvision_detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None))


@pytest.mark.parametrize("masks", ["soft", "bool", "bits", "rle", "polygons", None])
def test_mask_formats(masks: Any, detector: nn.Module, engine: fastmrcnn.Engine, photo_bytes: list[Tensor]) -> None:
    image = photo_bytes[:1]
    soft = engine(image)[0]
    found = compiled(detector, batch_sizes=2, masks=masks, mask_threshold=0.4)(image)[0]
    assert torch.equal(found["boxes"], soft["boxes"])
    inside = soft["masks"][:, 0] > 0.4
    if masks is None:
        assert "masks" not in found
    elif masks == "soft":
        assert torch.equal(found["masks"], soft["masks"])
    elif masks == "bool":
        assert torch.equal(found["masks"][:, 0], inside)
    elif masks == "bits":
        assert torch.equal(ops.unpack_bits(found["masks"], inside.shape[2]), inside)
    elif masks == "rle":
        assert torch.equal(ops.decode(found["masks"]), inside)
    else:
        assert len(found["masks"]) == len(inside)
        assert [len(polygons) > 0 for polygons in found["masks"]] == inside.flatten(1).any(dim=1).tolist()


def test_any_number_of_images(engine: fastmrcnn.Engine, photo_bytes: list[Tensor]) -> None:
    alone = [engine([image])[0] for image in photo_bytes]
    together = engine([photo_bytes[i] for i in (2, 0, 1, 0, 2)])
    for i, result in zip((2, 0, 1, 0, 2), together, strict=True):
        assert all(torch.equal(result[key], alone[i][key]) for key in result)
    assert engine([]) == []
    batch = torch.stack([photo_bytes[0], photo_bytes[0].flip(2)])
    assert torch.equal(engine(batch)[0]["boxes"], alone[0]["boxes"])
    finish = engine.begin(photo_bytes[:1])
    engine(photo_bytes[1:2])
    assert torch.equal(finish()[0]["boxes"], alone[0]["boxes"])


def test_layouts_of_images(engine: fastmrcnn.Engine, photo_bytes: list[Tensor]) -> None:
    image = photo_bytes[0]
    expected = engine([image])[0]
    wide = torch.cat((image, image), dim=2)[:, :, : image.shape[2]]
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for same in (interleaved, wide, image.flip(0).flip(0), image.to(DEVICE), interleaved.to(DEVICE)):
        before = same.clone()
        found = engine([same])[0]
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert torch.equal(same, before)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"images: expected a list .* got \[3, 8, 8\]"),
        (7, TypeError, "images: expected a list of uint8 tensors"),
        ([torch.zeros(3, 8, 8)], TypeError, r"images\[1\]: expected bytes, torch.uint8 in 0 .. 255, got torch.float32"),
        ([torch.zeros(4, 8, 8, dtype=torch.uint8)], ValueError, r"images\[1\]: expected \[3, H, W\].*\[4, 8, 8\]"),
        ([torch.zeros(8, 8, dtype=torch.uint8)], ValueError, r"images\[1\]: expected \[3, H, W\]"),
        ([torch.zeros(3, 0, 8, dtype=torch.uint8)], ValueError, r"images\[1\]: .* 1 or more, got \[3, 0, 8\]"),
        ([np.zeros((8, 8, 3), np.uint8)], TypeError, r"images\[1\].*torch.from_numpy\(array\).permute\(2, 0, 1\)"),
        ([torch.zeros(3, 481, 640, dtype=torch.uint8)], ValueError, "481 x 640 .* fits none .* Add it to image_sizes"),
        ([torch.zeros(3, 480, 400, dtype=torch.uint8)], ValueError, "480 x 400 .* resized 288 x 224.* fits none"),
    ],
)
def test_bad_images(
    images: Any, error: type[Exception], message: str, detector: nn.Module, photo_bytes: list[Tensor]
) -> None:
    """They are refused before any image of the call is run."""
    run: list[Tensor] = []
    engine = compiled(detector, image_sizes=(480, 640))
    engine._runner.begin = lambda some, bucket: run.extend(some)
    with pytest.raises(error, match=message):
        engine([photo_bytes[1], *images] if isinstance(images, list) else images)
    assert not run


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_sizes": []}, ValueError, r"image_sizes=\[\]: expected \(height, width\)"),
        ({"image_sizes": [(480, 0)]}, ValueError, "image_sizes"),
        ({"image_sizes": 480}, ValueError, "image_sizes=480"),
        ({"batch_sizes": 0}, ValueError, "batch_sizes=0"),
        ({"batch_sizes": [1, -1]}, ValueError, "batch_sizes"),
        ({"dtype": torch.float64}, ValueError, f"dtype=torch.float64: on '{DEVICE}' expected one of torch.float"),
        ({"masks": "png"}, ValueError, "masks='png': expected one of soft, bool"),
        ({"mask_threshold": 1.0}, ValueError, "mask_threshold=1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str, detector: nn.Module) -> None:
    with pytest.raises(error, match=message):
        compiled(detector, **options)


def test_engines_on_threads(detector: nn.Module, engine: fastmrcnn.Engine, photo_bytes: list[Tensor]) -> None:
    """Two engines on two threads, and one engine on both."""
    other = compiled(detector, masks="rle")
    expected = [engine([image])[0] for image in photo_bytes], [other([image])[0] for image in photo_bytes]
    wrong: list[str] = []

    def work(which: int, order: list[int]) -> None:
        for i in order:
            found = (engine, other)[which]([photo_bytes[i]])[0]
            for key, value in expected[which][i].items():
                same = torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value
                if not same:
                    wrong.append(key)

    jobs = [(0, [0, 1, 2]), (1, [2, 1, 0]), (0, [1, 1, 0])]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_memory_is_kept(photos: list[Tensor]) -> None:
    """Of calls: after some, no tensor is left that was not there before, and no memory of a GPU."""
    _, model = pair("fasterrcnn_mobilenet_v3_large_320_fpn", photos[:1], min_size=32, max_size=64)
    engine = compiled(model.to(DEVICE), image_sizes=(48, 64))
    image = torch.randint(256, (3, 48, 64), dtype=torch.uint8)

    def kept() -> tuple[int, int]:
        gc.collect()
        memory = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        return sum(isinstance(x, Tensor) for x in gc.get_objects()), memory

    for _ in range(3):
        engine([image])
    before = kept()
    for _ in range(30 if DEVICE == "cpu" else 10_000):
        engine([image])
    assert kept() == before


def test_what_others_do_with_memory(engine: fastmrcnn.Engine, photo_bytes: list[Tensor]) -> None:
    """An engine survives that the cache of memory is emptied, and used by others."""
    expected = engine(photo_bytes)
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7, device=DEVICE) for _ in range(30)]
    for result, again in zip(expected, engine(photo_bytes), strict=True):
        assert all(torch.equal(again[key], result[key]) for key in result)
    assert all((other == 7).all() for other in others)


def test_description(engine: fastmrcnn.Engine) -> None:
    text = repr(engine)
    assert text == "Engine(images of 480 x 640, 640 x 480; batches of [2]; torch.float32; masks='soft')"
