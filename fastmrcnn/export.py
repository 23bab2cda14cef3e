"""Detectors as files that run without this library's model code: AOTInductor packages and `torch.export` programs.

What is exported is one function, from bytes of images of one size to detections in their pixels.  On the CPU it is made
of PyTorch's and torchvision's operators, and a process that runs it needs no more than those:

    import json, torch, torchvision

    detector = torch._inductor.aoti_load_package("model.pt2")
    about = json.loads(detector.get_metadata()["fastmrcnn"])
    found = detector(images)  # uint8 [batch_size, channels, H, W]
    found["boxes"][0, : found["count"][0]]

A package reads its input as if it were contiguous and of the right size, and looks only where the environment variable
AOTI_RUNTIME_CHECK_INPUTS is 1.  A program, `format="pt2"`, always looks, and is read by
`torch.export.load("model.pt2", extra_files=extra).module()`, where `extra` is `{"fastmrcnn.json": ""}`.  On a GPU both
call the kernels, which `import fastmrcnn_kernels.library` makes known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from fastmrcnn.batches import DetectionBatch, ImageBatch
from fastmrcnn.checkpoints import load_model
from fastmrcnn.files import write_atomically
from fastmrcnn.inference import default_device, eval_mode
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import BytesPreprocess, resized_size, scaled

__all__ = ["DetectionStep", "ExportConfig", "export", "run"]

Format = Literal["aoti", "pt2"]

METADATA = "fastmrcnn"
"""Under this key of an AOTInductor package, and in a file of this name and .json in a program, is what it is."""


@dataclass
class ExportConfig:
    """Which model becomes a file, and for which images.

    Args:
        image_size: height and width of the images that it will be given, in pixels.
        checkpoint: model to export; or a network by model.
        model: network to export without a checkpoint, for example --model.name maskrcnn_resnet50_fpn --model.weights
            DEFAULT for torchvision's weights; without weights they are random.
        num_classes: classes of the model, with the background; a checkpoint knows its own.
        output: file to write; its name ends with .pt2.
        format: aoti is a package compiled by AOTInductor, for machines with the same kind of CPU or GPU, and needs a
            C++ compiler; pt2 is a program of torch.export, which runs operator by operator or can be compiled there.
        batch_size: images per call.
        device: where it will run, such as cuda or cpu; by default cuda if there is one.
    """

    image_size: tuple[int, int]
    checkpoint: Path | None = None
    model: ModelConfig | None = None
    num_classes: int = 91
    output: Path = Path("model.pt2")
    format: Format = "aoti"
    batch_size: int = 1
    device: str | None = None


class DetectionStep(nn.Module):
    """From bytes of images of one size to detections in their pixels, in fixed shapes.

    Args:
        model: a detector in evaluation mode, on the device where it will run.
        image_size: (height, width) of the images, in pixels.
        batch_size: images per call, N.
    """

    mean: Tensor
    std: Tensor
    sizes: Tensor
    ratios: Tensor

    def __init__(self, model: GeneralizedRCNN, image_size: tuple[int, int], batch_size: int) -> None:
        super().__init__()
        self.model = model
        transform, weight = model.transform, next(model.parameters())
        self.resized = resized_size(transform, image_size)
        self.padding = [-side % transform.size_divisible for side in self.resized]
        self.dtype = weight.dtype
        exact = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.register_buffer("mean", torch.tensor(transform.image_mean, **exact)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.image_std, **exact)[:, None, None])
        self.register_buffer("sizes", torch.tensor([self.resized] * batch_size, device=weight.device))
        self.register_buffer("ratios", torch.tensor(image_size, device=weight.device).float() / self.sizes.float())
        # Moved now: what is made while tracing is no tensor, and would stay in the model.
        model.rpn.base_anchors(weight.device)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detections in `images`, uint8 [N, C, H, W].

        The arithmetic is that of the model on `images / 255`, masks not pasted.

        Returns:
            `boxes` [N, D, 4], `scores`, `labels` [N, D] and `count` [N], and by the branches of the model `masks`
            [N, D, M, M] and `keypoints` [N, D, keypoints, 4], as in `DetectionBatch`, but in the pixels of `images`.
        """
        values = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        values = functional.interpolate(values, size=self.resized, mode="bilinear", align_corners=False)
        values = functional.pad(values, (0, self.padding[1], 0, self.padding[0])).to(self.dtype)
        batch = ImageBatch(values.contiguous(memory_format=torch.channels_last), self.sizes)
        found = self.model.detect(batch)
        found = scaled(found, self.ratios.to(found.boxes.dtype))
        tensors = {field.name: getattr(found, field.name) for field in fields(DetectionBatch)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def export(
    model: GeneralizedRCNN,
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int],
    batch_size: int = 1,
    format: Format = "aoti",
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
) -> Path:
    """Write a detector as a file that runs without its code, where the model is: on its device, with its dtype.

    The file holds a `DetectionStep`, and text in JSON that says what goes in and what comes out: `image_size`,
    `batch_size`, `channels`, `outputs` (in the order in which C++ gets them), `class_names`, `category_ids`, `device`,
    and `versions` of what made it.

    Args:
        model: a detector; it stays as it is.
        path: the file, whose name ends with .pt2.  A file that is there is replaced once the new one is complete.
        image_size: (height, width) of the images, in pixels.
        batch_size: images per call.
        format: `"aoti"`, compiled by AOTInductor for this kind of CPU or GPU, or `"pt2"`, a program of `torch.export`.
        class_names: label `l` is `class_names[l - 1]`; to be put into the file.
        category_ids: likewise, the category id of each label.

    Returns:
        `path`.

    Raises:
        TypeError: `model` is no detector of this library.
        ValueError: an argument is out of range, or the file's name ends with something else.
        OSError: there is no C++ compiler, which `"aoti"` needs; or the file cannot be written.
    """
    path, size = Path(path), tuple(image_size)
    if not isinstance(model, GeneralizedRCNN):
        raise TypeError(
            f"model: expected a detector of fastmrcnn, got {type(model).__name__}; fastmrcnn.accelerate makes one of "
            "torchvision's"
        )
    if isinstance(model.transform, BytesPreprocess):
        raise ValueError("model: its conventions resize images as bytes, which exported programs do not do")
    if format not in get_args(Format):
        raise ValueError(f"format: expected {' or '.join(get_args(Format))}, got {format!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size: expected (height, width) of at least 1 pixel each, got {image_size}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if path.suffix != ".pt2":
        raise ValueError(f"path of the output: expected a name that ends with .pt2, got {path}")
    if format == "aoti":
        require_compiler()

    def write(temporary: Path) -> None:
        program, about = trace(model, size, batch_size)
        text = json.dumps(about | {"class_names": list(class_names), "category_ids": list(category_ids)})
        # To a file that is open, or its temporary name would be that of a folder in the archive.
        with open(temporary, "wb") as file:
            if format == "pt2":
                torch.export.save(program, file, extra_files={f"{METADATA}.json": text})
            else:
                options = {"aot_inductor.metadata": {METADATA: text}}
                torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)

    return write_atomically(path, write)


def trace(
    model: GeneralizedRCNN, image_size: tuple[int, int], batch_size: int
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program of a detector's `DetectionStep`, and what goes in and comes out."""
    from fastmrcnn import __version__

    with torch.no_grad(), eval_mode(model):
        step = DetectionStep(model, image_size, batch_size)
        channels, device = len(step.mean), step.mean.device
        images = torch.zeros(batch_size, channels, *image_size, dtype=torch.uint8, device=device)
        program = torch.export.export(step, (images,))
    spec = program.call_spec.out_spec
    versions = {"fastmrcnn": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    return program, {
        "image_size": list(image_size),
        "batch_size": batch_size,
        "channels": channels,
        "outputs": list(spec.context),
        "device": device.type,
        "versions": versions,
    }


def require_compiler() -> None:
    """Raise OSError, which says what to do, unless there is the C++ compiler that AOTInductor calls."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise FileNotFoundError(
            "format: aoti needs a C++ compiler, and none was found: install g++, name one by the environment variable "
            "CXX, or choose format pt2"
        ) from error


def run(config: ExportConfig) -> Path:
    """Export as configured, print what was written, and return its path.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no compiler.
        ValueError: neither or both of checkpoint and model are given, or an option is out of range.
    """
    if (config.checkpoint is None) == (config.model is None):
        given = "neither" if config.model is None else "both"
        raise ValueError(f"checkpoint, model: expected one of them, got {given}")
    device = default_device() if config.device is None else torch.device(config.device)
    class_names: list[str] = []
    category_ids: list[int] = []
    if config.checkpoint is not None:
        model, info = load_model(config.checkpoint, device)
        class_names, category_ids = info.class_names, info.category_ids
    else:
        assert config.model is not None
        model = build_model(config.model, config.num_classes).to(device)
    path = export(
        model,
        config.output,
        image_size=config.image_size,
        batch_size=config.batch_size,
        format=config.format,
        class_names=class_names,
        category_ids=category_ids,
    )
    height, width = config.image_size
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    print(f"{path}: {size}, for {config.batch_size} images of {height} x {width} pixels per call, on {device.type}")
    return path
