"""Targets of the mask head: from packed masks as they are stored, and from resized ones as torchvision needs them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from benchmarks.inputs import PHOTO, Pooling, leave_out, random_rois
from benchmarks.measure import device_name
from fastmrcnn import ops
from fastmrcnn_kernels import views

CELLS = 28
BOXES = 128
"""Per image: a quarter of the 512 that are sampled for the second stage."""


class Case(NamedTuple):
    """So many images with so many objects each, stored in a size, and seen by the network in another."""

    images: int
    objects: int
    stored: tuple[int, int]
    size: tuple[int, int]

    def __str__(self) -> str:
        stored, size = (f"{height}x{width}" for height, width in (self.stored, self.size))
        return f"{self.images} x {BOXES} boxes, {self.objects} masks of {stored} as {size}"


CASES = [
    Case(2, 20, (480, 800), PHOTO),
    Case(2, 20, PHOTO, PHOTO),
    Case(16, 20, (480, 800), PHOTO),
    Case(1, 200, (1024, 1024), (1024, 1024)),
]


class Inputs(NamedTuple):
    """Arguments of `ops.mask_targets`, but the size; and masks uint8 [G, h, w] of each image as the network sees it."""

    packed: tuple[Tensor, ...]
    resized: list[Tensor]


@cache
def inputs(case: Case) -> Inputs:
    """Objects are discs in boxes with sides of 16 to 640 pixels; the boxes to learn from are shifted by up to 15 %."""
    generator = torch.Generator().manual_seed(0)
    around = random_rois(Pooling(case.images, case.objects, CELLS, case.size))[:, 1:].cpu().view(case.images, -1, 4)
    matched = torch.randint(case.objects, (case.images, BOXES), generator=generator)
    found = around.gather(1, matched[..., None].expand(-1, -1, 4))
    extent = (found[..., 2:] - found[..., :2]).repeat(1, 1, 2)
    found = found + 0.3 * (torch.rand(found.shape, generator=generator) - 0.5) * extent
    limits = torch.tensor(case.size[::-1], dtype=torch.float32).repeat(2)

    stored = [discs(boxes, case).to(device_name()) for boxes in around]
    resized = [functional.interpolate(masks[:, None].float(), size=case.size)[:, 0].byte() for masks in stored]
    view = torch.tensor([views.whole(*case.stored, *case.size)] * case.images)
    rest = (view, torch.minimum(found.clamp(min=0), limits), matched, matched >= 0)
    return Inputs((*ops.pack_masks(stored), *(x.to(device_name()) for x in rest)), resized)


def discs(boxes: Tensor, case: Case) -> Tensor:
    """Masks, bool [G, *stored], of the ellipses inside of `boxes` [G, 4] of the size that the network sees."""
    y, x = ((torch.arange(n) + 0.5) * (seen / n) for n, seen in zip(case.stored, case.size, strict=True))
    centre, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    along_x, along_y = (((axis - centre[:, i, None]) / radius[:, i, None]) ** 2 for i, axis in enumerate((x, y)))
    return along_y[:, :, None] + along_x[:, None, :] < 1


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that `call` needs for a time, its result among them; None where the system does not tell."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset, libc = Path("/proc/self/status"), Path("/proc/self/clear_refs"), ctypes.CDLL(None)
    if not (reset.exists() and hasattr(libc, "malloc_trim")):
        return None

    def kilobytes(field: str) -> int:
        return int(re.findall(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)[0])

    libc.malloc_trim(0)  # freed memory that the process keeps could be used again without being counted
    reset.write_text("5")  # the peak is that from now on
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) * 1024


@pytest.mark.parametrize(("name", "role"), [("fastmrcnn", "ours"), ("torchvision", "shipped")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_targets(
    case: Case, name: str, role: str, timed: Callable[..., None], benchmark: BenchmarkFixture
) -> None:
    if case.images > 2:
        leave_out(f"targets of {case.images} images", case.size)
    packed, resized = inputs(case)
    _, _, _, boxes, matched, _ = packed

    def by_torchvision() -> Tensor:
        each = zip(resized, boxes, matched, strict=True)
        return torch.stack([project_masks_on_boxes(masks, found, index, CELLS) for masks, found, index in each])

    def by_us() -> Tensor:
        return ops.mask_targets(*packed, CELLS)

    def check(targets: Tensor) -> None:
        """By float64, some of them; positions of samples are rounded in float32."""
        some = slice(None, None, BOXES // 8)
        found, index, valid = (x[:, some] for x in packed[3:])
        exact = ops.mask_targets(*packed[:3], found.double(), index, valid, CELLS, impl="reference")
        assert exact.mean() > 0.1
        assert (targets[:, some] - exact).abs().max() < 1e-3

    call = by_us if role == "ours" else by_torchvision
    benchmark.extra_info["peak_bytes"] = peak_memory(call)
    timed(
        call,
        check,
        op="mask targets",
        case=str(case),
        contender=name,
        role=role,
        least_bytes=packed[0].nbytes + boxes.nbytes + 4 * case.images * BOXES * CELLS**2,
    )
