"""Ways from bytes of images to detections on the CPU: torchvision's, step by step to ours."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torchvision
from pycocotools import mask as pycocotools_mask
from torch import Tensor, nn
from torch.nn import functional

import fastmrcnn
from benchmarks.bench_masks import by_grid_sample
from benchmarks.detectors import calibrate, have_twins
from benchmarks.measure import device_name
from fastmrcnn.checkpoints import load_model
from fastmrcnn.data import Shapes, image_files, load_image
from fastmrcnn.engine.buckets import Bucket, as_buckets
from fastmrcnn.engine.device import DeviceRunner
from fastmrcnn.engine.prepare import prepare
from fastmrcnn.inference import Inference, MaskFormat
from fastmrcnn.ops import implementations

SMALL_DETECTOR = {"min_size": 96, "max_size": 128, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20}
"""Options of a detector that takes little time."""
Detections = list[dict[str, Any]]
Call = Callable[[], Detections]


class Setting(NamedTuple):
    """What is detected: `images`, bytes [3, H, W] on the CPU; and what masks become, None for no mask branch."""

    images: list[Tensor]
    masks: MaskFormat | None
    half: torch.dtype


def photos(folder: Path | None, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """An image of each of `sizes`, bytes [3, H, W]: photos of `folder`, resized, or generated ones."""
    if folder is None:
        images = [Shapes(1, image_size=size, seed=i)[0][0] for i, size in enumerate(sizes)]
    else:
        files = image_files(folder)
        whole = [load_image(files[i % len(files)])[None] for i in range(len(sizes))]
        resized = [
            functional.interpolate(image, size=size, mode="bilinear", antialias=True)[0]
            for image, size in zip(whole, sizes, strict=True)
        ]
        images = [image.clamp(0, 1) for image in resized]
    return [(image * 255).round().to(torch.uint8) for image in images]


def detectors(builder: str, checkpoint: Path | None, images: Sequence[Tensor], **options: Any) -> tuple[Any, Any]:
    """torchvision's detector and ours, of equal weights: those of a checkpoint of ours, or random ones that detect."""
    if checkpoint is not None:
        ours = load_model(checkpoint)[0]
        theirs = as_torchvision(ours)
    else:
        torch.manual_seed(0)
        options |= {"weights": None, "weights_backbone": None}
        theirs = getattr(torchvision.models.detection, builder)(**options).eval()
        calibrate(theirs, [image.float() / 255 for image in images])
        ours = fastmrcnn.accelerate(theirs)
    return theirs.to(device_name()).eval(), ours.to(device_name()).eval()


def contenders(theirs: Any, ours: Any, setting: Setting, *, compiled: bool = False) -> dict[str, Call]:
    """The waterfall: from torchvision as it is shipped to the engine, each a call that detects in all images."""
    if setting.masks is None:
        theirs, ours = without_masks(theirs), without_masks(ours)
    nhwc = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    found = {
        "torchvision": by_torchvision(theirs, setting),
        "torchvision AMP": by_torchvision(theirs, setting, autocast=True),
        "torchvision channels_last": by_torchvision(nhwc, setting),
        "torchvision AMP channels_last": by_torchvision(nhwc, setting, autocast=True),
    }
    if device_name() == "cuda":  # as the engine does it, for sizes that it knows
        tuned = with_fastest_algorithms(by_torchvision(nhwc, setting, autocast=True))
        found["torchvision AMP channels_last, cudnn.benchmark"] = tuned
    if setting.masks is not None:
        found["detectron2's pasting, AMP channels_last"] = by_torchvision(nhwc, setting, autocast=True, detectron2=True)
    if compiled:
        found["torchvision compiled, AMP channels_last"] = by_torchvision(inductor(nhwc), setting, autocast=True)
    if device_name() == "cpu":
        return found | {
            "fastmrcnn": by_us(ours, setting),
            "fastmrcnn engine float32": by_engine(ours, setting, torch.float32),
            f"fastmrcnn engine {name(setting.half)}": by_engine(ours, setting, setting.half),
        }
    return found | {
        "fastmrcnn without kernels": without_kernels(by_us(ours, setting)),
        "fastmrcnn": by_us(ours, setting),
        "fastmrcnn AMP": by_us(ours, setting, autocast=True),
        f"fastmrcnn fused {name(setting.half)}": by_runner(ours, setting),
        "fastmrcnn engine float32": by_engine(ours, setting, torch.float32),
        f"fastmrcnn engine {name(setting.half)}": by_engine(ours, setting, setting.half),
    }


def name(dtype: torch.dtype) -> str:
    """Of a dtype."""
    return str(dtype).removeprefix("torch.")


def without_masks(model: nn.Module) -> Any:
    """A copy of a detector that has no mask branch."""
    model = copy.deepcopy(model)
    heads: Any = model.roi_heads
    heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
    return model


def as_torchvision(model: Any) -> Any:
    """torchvision's detector that shares the parts of ours."""
    pairs = {
        fastmrcnn.MaskRCNN: torchvision.models.detection.MaskRCNN,
        fastmrcnn.KeypointRCNN: torchvision.models.detection.KeypointRCNN,
        fastmrcnn.FasterRCNN: torchvision.models.detection.FasterRCNN,
    }

    def continued(module: nn.Module, theirs: type) -> Any:
        result = object.__new__(theirs)
        result.__dict__ = {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(module).items()}
        return result

    detector = continued(model, next(theirs for ours, theirs in pairs.items() if isinstance(model, ours)))
    for part in ("rpn", "roi_heads", "transform"):
        module = getattr(model, part)
        theirs = next(base for base in type(module).__mro__ if base.__module__.startswith("torchvision."))
        setattr(detector, part, continued(module, theirs))
    return detector


def by_torchvision(model: nn.Module, setting: Setting, *, autocast: bool = False, detectron2: bool = False) -> Call:
    """torchvision's model as people call it, and what they do with its masks."""
    device = device_name()

    def run() -> Detections:
        images = [image.to(device).float() / 255 for image in setting.images]
        with torch.inference_mode(), autocasting(setting, autocast), pasting_of_detectron2(detectron2):
            results = model(images)
        for result in results:
            if "masks" in result and setting.masks in ("bool", "rle"):
                result["masks"] = result["masks"] > 0.5
        found = [{key: value.cpu() for key, value in result.items()} for result in results]
        if setting.masks == "rle":
            for result in found:
                masks = result["masks"][:, 0].numpy().astype(np.uint8)
                result["masks"] = [pycocotools_mask.encode(np.asfortranarray(mask)) for mask in masks]
        return found

    return run


def by_us(model: nn.Module, setting: Setting, *, autocast: bool = False) -> Call:
    """Our model, not compiled."""
    inference, device = Inference(model, setting.masks), device_name()

    def run() -> Detections:
        images = [image.to(device).float() / 255 for image in setting.images]
        with autocasting(setting, autocast):
            return inference.begin(images)()

    return run


def by_engine(model: nn.Module, setting: Setting, dtype: torch.dtype) -> Call:
    """Our model, compiled for the sizes of the images by the first call."""
    sizes = sorted({(image.shape[1], image.shape[2]) for image in setting.images})
    # Images of different sizes run one by one: none is worth the padding of another's.
    batches = len(setting.images) if len(sizes) == 1 else 1

    @cache
    def engine(tf32: bool) -> fastmrcnn.Engine:
        """It keeps to what it was made with."""
        return fastmrcnn.compile(model, image_sizes=sizes, batch_sizes=batches, dtype=dtype, masks=setting.masks)

    depends = device_name() == "cuda" and dtype == torch.float32
    return lambda: engine(depends and torch.backends.cudnn.allow_tf32)(setting.images)


def by_runner(model: Any, setting: Setting) -> Call:
    """What the engine captures, launched operation by operation; images go into the bucket of the largest."""
    each = as_buckets(model.transform, sorted({(image.shape[1], image.shape[2]) for image in setting.images}))
    image, canvas = (tuple(map(max, zip(*sizes, strict=True))) for sizes in zip(*each, strict=True))
    bucket, batch = Bucket(image, canvas), len(setting.images)

    @cache
    def runner() -> DeviceRunner:
        prepared = prepare(model, setting.half, with_masks=setting.masks is not None)
        return DeviceRunner(prepared, [bucket], [batch], setting.half, setting.masks, 0.5, graphs=False)

    return lambda: runner().begin(setting.images, bucket)()


def autocasting(setting: Setting, enabled: bool) -> torch.autocast:
    """Automatic mixed precision, or none."""
    return torch.autocast(device_name(), setting.half, enabled=enabled)


@contextlib.contextmanager
def pasting_of_detectron2(enabled: bool) -> Iterator[None]:
    """torchvision's detectors paste masks as detectron2 does it, with a grid of samples for each."""

    def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], padding: int = 1) -> Tensor:
        return by_grid_sample(masks[:, 0].float(), boxes, size)[:, None]

    target = "torchvision.models.detection.transform.paste_masks_in_image"
    with mock.patch(target, paste) if enabled else contextlib.nullcontext():
        yield


def with_fastest_algorithms(call: Call) -> Call:
    """`call` with those algorithms of cuDNN that have been found to be the fastest for its sizes."""

    def run() -> Detections:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return call()
        finally:
            torch.backends.cudnn.benchmark = before

    return run


def without_kernels(call: Call) -> Call:
    """`call` by the reference operations, as on a machine without Triton."""

    def run() -> Detections:
        with mock.patch.object(implementations, "_HAS_TRITON", False):
            return call()

    return run


def inductor(model: Any) -> Any:
    """A copy of torchvision's detector whose networks are compiled; the code between them has graph breaks."""
    model = copy.deepcopy(model)
    model.backbone = torch.compile(model.backbone)
    model.rpn.head = torch.compile(model.rpn.head)
    model.roi_heads.box_head = torch.compile(model.roi_heads.box_head, dynamic=True)
    if model.roi_heads.has_mask():
        model.roi_heads.mask_head = torch.compile(model.roi_heads.mask_head, dynamic=True)
    return model


def agreements(expected: Detections, found: Detections) -> dict[str, float]:
    """Of detections scored above 0.5 in float32, shares that have twins, strictly and within what 16 bits blur."""
    shares = {}
    for key, limits in (("strictly", {}), ("nearly", {"iou": 0.9, "score": 0.05, "mask": 0.05})):
        twins = []
        for a, b in zip(expected, found, strict=True):
            sure = a["scores"] > 0.5
            comparable = {k for k in a if isinstance(a[k], Tensor) and isinstance(b.get(k), Tensor)}
            some = {k: v[sure] for k, v in a.items() if k in comparable}
            twins.append(have_twins(some, {k: v for k, v in b.items() if k in comparable}, **limits))
        every = torch.cat(twins)
        shares[key] = round(every.double().mean().item(), 4) if len(every) else 1.0
    return shares
