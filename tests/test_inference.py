"""A batch of images on its way through a detector: results, masks in every format, and nothing waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.transform import resize_boxes, resize_keypoints

import fastmrcnn
import fastmrcnn.checkpoints
from benchmarks.detectors import calibrate
from fastmrcnn import DetectionBatch, ops
from fastmrcnn.inference import Inference
from fastmrcnn.models.preprocess import Preprocess
from fastmrcnn.models.small import maskrcnn_resnet18_fpn
from fastmrcnn.predictor import Predictor


def decoded(segmentation: Any, size: tuple[int, int]) -> Tensor:
    if isinstance(segmentation, list) and not segmentation:
        return torch.zeros(size, dtype=torch.bool)
    rle = (
        coco_mask.merge(coco_mask.frPyObjects(segmentation, *size)) if isinstance(segmentation, list) else segmentation
    )
    return torch.from_numpy(np.array(coco_mask.decode(rle))).bool()


class Wrapped(nn.Module):
    """A detector that is none of ours, and finds the same."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.transform = inner, inner.transform

    def forward(self, images: list[Tensor]) -> Any:
        return self.inner(images)


SMALL: dict[str, Any] = {"min_size": 96, "max_size": 128, "box_detections_per_img": 12}


@pytest.fixture(scope="module")
def ours(photos: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = maskrcnn_resnet18_fpn(num_classes=4, **SMALL).eval()
    calibrate(model, photos[:2])
    return model


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("score_threshold", [0.0, "median", 2.0])
def test_results_are_those_of_the_model_in_every_format(
    ours: nn.Module, photos: list[Tensor], batch_size: int, score_threshold: Any
) -> None:
    images = [photos[0], photos[0].flip(2)]
    for model in (ours, Wrapped(ours)):
        with torch.inference_mode():
            if batch_size == 2:
                expected = model(images)
            else:
                expected = [model([image])[0] for image in images]
        if score_threshold == "median":
            score_threshold = float(expected[0]["scores"].median())
        options: dict[str, Any] = {"batch_size": batch_size, "score_threshold": score_threshold, "mask_threshold": 0.4}
        kept = [result["scores"] >= score_threshold for result in expected]
        assert all(len(k) == 12 for k in kept)
        for masks in ("soft", "bool", "rle", "polygons", None):
            found = Predictor(model, masks=masks, **options)(images)
            for mine, whole, k in zip(found, expected, kept, strict=True):
                assert mine.keys() == whole.keys() - ({"masks"} if masks is None else set())
                for name in ("boxes", "labels", "scores"):
                    assert torch.equal(mine[name], whole[name][k]), name
                    assert not mine[name].is_inference()
                inside = whole["masks"][k] > 0.4
                if masks == "soft":
                    assert torch.equal(mine["masks"], whole["masks"][k])
                elif masks == "bool":
                    assert torch.equal(mine["masks"], inside)
                elif masks is not None:
                    assert len(mine["masks"]) == len(inside)
                    for segmentation, mask in zip(mine["masks"], inside[:, 0], strict=True):
                        assert torch.equal(decoded(segmentation, mask.shape), mask)


def test_keypoints(photos: list[Tensor]) -> None:
    torch.manual_seed(0)
    options = SMALL | {"min_size": 64, "box_detections_per_img": 3, "rpn_post_nms_top_n_test": 30}
    inner = fastmrcnn.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).eval()
    calibrate(inner, photos[:1])
    with torch.inference_mode():
        (expected,) = inner(photos[:1])
    assert len(expected["keypoints_scores"]) == 3
    for model in (inner, Wrapped(inner)):
        found = Predictor(model)(photos[0])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_our_model_is_called_where_calling_it_does_more(ours: nn.Module, photos: list[Tensor]) -> None:
    calls = []
    hook = ours.register_forward_hook(lambda *_: calls.append(1))
    try:
        Predictor(ours)(photos[0])
    finally:
        hook.remove()
    Predictor(ours)(photos[0])
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_original_pixels_are_torchvisions_to_the_bit(dtype: torch.dtype) -> None:
    sizes, original = [(800, 1066), (750, 1333), (96, 128)], [(427, 569), (1080, 1919), (7, 11)]
    boxes, keypoints = 800 * torch.rand(3, 5, 4, dtype=dtype), 800 * torch.rand(3, 5, 17, 4, dtype=dtype)
    labels = torch.ones(3, 5, dtype=torch.int64)
    batch = DetectionBatch(boxes, torch.rand(3, 5), labels, torch.full((3,), 5), None, keypoints)
    found = Preprocess(800, 1333, [0.5], [0.5]).in_original_pixels(batch, sizes, original)
    assert found.keypoints is not None
    for i in range(3):
        assert torch.equal(found.boxes[i], resize_boxes(boxes[i], sizes[i], original[i]))
        assert torch.equal(found.keypoints[i, ..., :3], resize_keypoints(keypoints[i, ..., :3], sizes[i], original[i]))
        assert torch.equal(found.keypoints[i, ..., 3], keypoints[i, ..., 3])


class Copies(TorchDispatchMode):
    """Copies from one device to another that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        if name.startswith("aten::to."):  # in inference mode it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if name == "aten::_to_copy" and result.device != args[0].device and not kwargs.get("non_blocking"):
            self.waiting.append(f"{args[0].device} to {result.device}")
        return result


@pytest.mark.parametrize("masks", [None, "rle"])
@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_a_launch_does_not_wait(builder: str, masks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors a value that is read is an error; a copy that waits is noted."""
    encoded: list[Any] = []

    def begin_encoding(masks: Tensor, boxes: Tensor, sizes: Any, **options: Any) -> Any:
        encoded.append((masks.device.type, boxes.shape, sizes, options["count"].device.type))
        return begin(masks, boxes, sizes, **options)

    begin = ops.begin_encoding
    monkeypatch.setattr(ops, "begin_encoding", begin_encoding)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = getattr(fastmrcnn, builder)(weights=None, weights_backbone=None, rpn_post_nms_top_n_test=20).eval()
        images = [torch.rand(3, 96, 128), torch.rand(3, 90, 110)]
        inference = Inference(model, masks, score_threshold=0.3)
        inference.begin(images)  # what is made once, such as anchors
        with Copies() as copies:
            inference.begin(images)
    assert copies.waiting == []
    if masks and "mask" in builder:
        assert encoded[-1] == ("cuda", torch.Size([2, 100, 4]), [(96, 128), (90, 110)], "cuda")
    assert bool(encoded) == (masks == "rle" and "mask" in builder)
