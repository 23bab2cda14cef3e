"""A step of training, ours and torchvision's, from equal weights; and whether both learn the same from a batch."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
import torchvision.models.detection as torchvision_detection
from torch import Tensor, nn

import fastmrcnn
from benchmarks.detectors import calibrate
from benchmarks.measure import device_name, without_tf32
from fastmrcnn.batches import LoadedBatch
from fastmrcnn.data import Shapes, TrainingItems, collate_loaded
from fastmrcnn.data.items import LoadedSample
from fastmrcnn.data.types import Target
from fastmrcnn.data.views import Resize
from fastmrcnn.models.builders import adopt_detector
from fastmrcnn.models.norms import replace_norms
from fastmrcnn.models.small import maskrcnn_resnet18_fpn
from fastmrcnn.models.surgery import keep_first_stages
from fastmrcnn.training.config import OptimConfig, Precision
from fastmrcnn.training.optim import build_optimizer
from fastmrcnn.training.step import DTYPES, Learner

OBJECTS = 8
EXHAUSTIVE = 10**6
BEFORE_SUPPRESSION, AFTER_SUPPRESSION = 100, 200
"""Proposals of a level and of an image, where all are trained on: fewer than usual, for memory's sake."""
ROUNDING = 0.01
"""By how much losses, and the norm of gradients, may differ in float32, relatively: where rounding decides otherwise
which of two overlapping proposals stays, or which one is the last of 200, means over 200 change by half a percent."""


class Contender(NamedTuple):
    """Whose step, and how it is run: "tuned" is channels_last, with one launch per update."""

    name: str
    role: str
    precision: Precision = "float32"

    def __str__(self) -> str:
        kind = "AMP" if self.name == "torchvision" and self.precision != "float32" else self.precision
        return f"{self.name} {kind}{' channels_last' if self.role == 'tuned' else ''}"


OURS = Contender("fastmrcnn", "ours")
SHIPPED = Contender("torchvision", "shipped")
TUNED = Contender("torchvision", "tuned")
AMP = Contender("torchvision", "tuned", "bfloat16")
CONTENDERS = [OURS, Contender("fastmrcnn", "ours", "bfloat16"), SHIPPED, TUNED, AMP]


class TorchvisionLearner:
    """torchvision's detector and what updates its weights, as its reference scripts do it, with `learn` for a step.

    Args:
        model: on its device, in training mode.
        optimizer: of its parameters.
        precision: of autocast.
        clip_norm: bound of the norm of gradients; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision = "float32",
        clip_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.precision, self.clip_norm = model, optimizer, precision, clip_norm
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")

    def learn(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Update the weights by float32 images [3, H, W] in 0 .. 1 and their targets; returns the losses."""
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            losses = self.model(list(images), list(targets))
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses


def as_torchvision(model: nn.Module) -> nn.Module:
    """torchvision's detector of the same network, options and weights as `model`, one of ours, which is not changed.

    Each part of ours continues as the class of torchvision that it derives from: both have the same state.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        theirs = next(c for c in type(module).__mro__ if not c.__module__.startswith("fastmrcnn"))
        if theirs is nn.Module:
            raise TypeError(f"{type(module).__name__} derives from no class of torchvision")
        module.__class__ = theirs
    return copied


def as_ours(model: nn.Module) -> fastmrcnn.MaskRCNN:
    """Our detector of the same network, options and weights as `model`, torchvision's, which is not changed."""
    return adopt_detector(copy.deepcopy(model), fastmrcnn.MaskRCNN)


def detector(images: Sequence[Tensor], *, small: bool = False) -> nn.Module:
    """torchvision's Mask R-CNN that leaves images at their size, its random weights spread like trained ones.

    ResNet-50 and FPN, with the frozen stages and norms of a pretrained backbone; or `small`, ResNet-18 and FPN, of
    which everything learns.
    """
    torch.manual_seed(0)
    size = {"min_size": min(images[0].shape[-2:]), "max_size": max(images[0].shape[-2:])}
    if small:
        model = as_torchvision(maskrcnn_resnet18_fpn(num_classes=91, **size))
    else:
        model = torchvision_detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **size)
    model.to(device_name()).eval()
    calibrate(model, [image.to(device_name()) for image in images])
    if not small:
        keep_first_stages(model.backbone.body, 3)
        replace_norms(model.backbone, "frozen")
    return model.train()


def dataset(images: int, size: tuple[int, int]) -> Shapes:
    """Images of `OBJECTS` objects each."""
    return Shapes(images, image_size=size, min_objects=OBJECTS, max_objects=OBJECTS)


class Ours:
    """Our step over one batch, again and again; the learning rate is 0, so that each is the same work."""

    def __init__(self, model: nn.Module, data: Shapes, precision: Precision = "float32") -> None:
        self.model = as_ours(model).to(memory_format=torch.channels_last)
        options = OptimConfig()
        optimizer = build_optimizer(self.model, options, 0.0)
        self.learner = Learner(self.model, optimizer, options, precision)
        transform = self.model.transform
        items = TrainingItems(data, 0, None, Resize(transform.min_size, transform.max_size))
        self.samples: list[LoadedSample] = [items[0, i, i] for i in range(len(data))]
        self.steps = 0

    def load(self) -> LoadedBatch:
        """The batch on the device, as loader and prefetcher bring it there."""
        batch = collate_loaded(self.samples)
        if device_name() == "cuda":
            batch = batch.pin_memory()
        return batch.to(torch.device(device_name()), non_blocking=True)

    def step(self, batch: LoadedBatch) -> dict[str, Tensor]:
        """Losses of a step, and the norm of its gradients."""
        self.steps += 1
        return self.learner.learn([batch], (0, self.steps))


def on_device(
    images: Sequence[Tensor], targets: Sequence[Target], device: torch.device | str
) -> tuple[list[Tensor], list[Target]]:
    """Images and all tensors of targets on `device`, copied as in the reference scripts; if pinned, without a wait."""
    return applied(lambda x: x.to(device, non_blocking=x.is_pinned()), images, targets)


def applied(
    change: Callable[[Tensor], Tensor], images: Sequence[Tensor], targets: Sequence[Target]
) -> tuple[list[Tensor], list[Target]]:
    """All tensors of a batch, changed."""
    moved = [{name: change(x) if isinstance(x, Tensor) else x for name, x in target.items()} for target in targets]
    return list(map(change, images)), moved


class Theirs:
    """torchvision's step over one batch, again and again; the learning rate is 0, so that each is the same work."""

    def __init__(self, model: nn.Module, data: Shapes, precision: Precision = "float32", tuned: bool = False) -> None:
        layout = torch.channels_last if tuned else torch.contiguous_format
        self.model = copy.deepcopy(model).to(memory_format=layout)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=tuned or None)
        self.learner = TorchvisionLearner(self.model, optimizer, precision)
        self.batch = applied(lambda x: x, *zip(*(data[i] for i in range(len(data))), strict=True))
        if tuned and device_name() == "cuda":
            self.batch = applied(Tensor.pin_memory, *self.batch)  # as a loader's thread does

    def load(self) -> tuple[list[Tensor], list[Target]]:
        """The batch on the device."""
        return on_device(*self.batch, device_name())

    def step(self, batch: tuple[list[Tensor], list[Target]]) -> dict[str, Tensor]:
        """Losses of a step."""
        return self.learner.learn(*batch)


Run = Ours | Theirs


def run_of(contender: Contender, model: nn.Module, data: Shapes) -> Run:
    """What `contender` does, from the weights of `model`, torchvision's."""
    if contender.role == "ours":
        return Ours(model, data, contender.precision)
    return Theirs(model, data, contender.precision, contender.role == "tuned")


@contextlib.contextmanager
def exhaustive(model: nn.Module) -> Iterator[None]:
    """Within it `model` trains on all anchors and on all proposals, of which there are fewer: nothing is random."""
    rpn, heads = model.rpn, model.roi_heads
    with (
        mock.patch.dict(rpn._pre_nms_top_n, training=BEFORE_SUPPRESSION),
        mock.patch.dict(rpn._post_nms_top_n, training=AFTER_SUPPRESSION),
        mock.patch.object(rpn.fg_bg_sampler, "batch_size_per_image", EXHAUSTIVE),
        mock.patch.object(heads.fg_bg_sampler, "batch_size_per_image", EXHAUSTIVE),
    ):
        yield


def outcome(run: Run) -> dict[str, float]:
    """Losses and the norm of gradients of a step that samples everything, without TF32."""
    with exhaustive(run.model), without_tf32():
        values = run.step(run.load())
    if isinstance(run, Theirs):  # they are there until the next step
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        values["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
    return {name: value.item() for name, value in values.items()}


class Expected(NamedTuple):
    """What is learned from a batch, and within which relative error of each number."""

    values: dict[str, float]
    allowed: float


def expected(model: nn.Module, data: Shapes, precision: Precision = "float32") -> Expected:
    """What torchvision's `model` learns from `data` in float32, and by how much `precision` may change that.

    In 16 bits by twice what it changes with torchvision's own, under autocast.
    """
    values = outcome(run_of(SHIPPED, model, data))
    for name, value in values.items():
        assert 0 < value < 1e4, f"{name}: {value} is no trained model's, and would hide differences"
    if precision == "float32":
        return Expected(values, ROUNDING)
    assert precision == AMP.precision
    return Expected(values, ROUNDING + 2 * largest_error(outcome(run_of(AMP, model, data)), values)[0])


def largest_error(found: dict[str, float], values: dict[str, float]) -> tuple[float, str]:
    """The largest relative error of a number, and its name."""
    assert found.keys() == values.keys(), f"{sorted(found)} instead of {sorted(values)}"
    return max((abs(found[name] / value - 1), name) for name, value in values.items())


def assert_learns_the_same(run: Run, wanted: Expected) -> None:
    """Raise AssertionError if `run` learns anything else."""
    found = outcome(run)
    assert all(map(math.isfinite, found.values())), found
    error, name = largest_error(found, wanted.values)
    text = f"{name} {found[name]:.6g} instead of {wanted.values[name]:.6g}"
    assert error <= wanted.allowed, f"{text}: {error:.2%} where {wanted.allowed:.2%} is allowed"
