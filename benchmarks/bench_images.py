"""Images resized, normalised and batched: from bytes in one buffer, or as torchvision's transform has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from benchmarks.inputs import leave_out
from benchmarks.measure import device_name
from fastmrcnn import ops
from fastmrcnn_kernels.views import whole
from tests.tolerances import assert_within_budget

SIDES = (800, 1333)  # of the shorter side, and what the longer one may not exceed
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Case(NamedTuple):
    """So many images of this size."""

    images: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.images} x {self.size[0]}x{self.size[1]} to {SIDES[0]}"


CASES = [Case(2, (480, 640)), Case(8, (480, 640)), Case(8, (1080, 1920))]
CONTENDERS = [
    ("fastmrcnn from bytes", "ours", torch.float32),
    ("fastmrcnn from bytes", "ours", torch.float16),
    ("fastmrcnn from bytes", "ours", torch.bfloat16),
    ("torchvision from float32", "shipped", torch.float32),
    ("torchvision from bytes", "shipped", torch.float32),
    ("reference from bytes", "reference", torch.float32),
]


@cache
def photos(case: Case) -> list[Tensor]:
    """Images, uint8 [3, H, W], of random bytes."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, 256, (3, *case.size), dtype=torch.uint8, generator=generator) for _ in range(case.images)]
    return [image.to(device_name()) for image in found]


def by_torchvision(images: list[Tensor]) -> Tensor:
    """Its batch of float images."""
    return GeneralizedRCNNTransform(*SIDES, MEAN, STD).eval()(images)[0].tensors


@pytest.mark.parametrize(("name", "role", "dtype"), CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resize_images(case: Case, name: str, role: str, dtype: torch.dtype, timed: Callable[..., None]) -> None:
    leave_out("resize_images", case.size, dtype)
    if case.images > 2 and not torch.cuda.is_available():
        pytest.skip(f"left out, for want of a GPU: resize_images, {case}")
    images = photos(case)
    floats = [image.float() / 255 for image in images]
    expected = by_torchvision(floats)
    scale = min(SIDES[0] / min(case.size), SIDES[1] / max(case.size))
    view = whole(*case.size, *(int(side * scale) for side in case.size))
    pixels, offsets = ops.pack_images([image.cpu() for image in images])
    packed = [x.to(device_name()) for x in (pixels, offsets, torch.tensor([view] * case.images))]

    def by_us() -> Tensor:
        impl: ops.Impl = "reference" if role == "reference" else "auto"
        return ops.resize_images(*packed, (expected.shape[2], expected.shape[3]), MEAN, STD, dtype, impl=impl)

    def check(batch: Tensor) -> None:
        for i, image in enumerate(images):
            exact = by_torchvision([image.double() / 255])
            assert_within_budget(batch[i : i + 1], expected[i : i + 1].to(dtype), exact)

    calls = {
        "torchvision from float32": lambda: by_torchvision(floats),
        "torchvision from bytes": lambda: by_torchvision([image.float() / 255 for image in images]),
    }
    read = floats if name == "torchvision from float32" else images
    timed(
        calls.get(name, by_us),
        check,
        op="resize_images",
        case=str(case),
        contender=name if role == "shipped" else f"{name} {str(dtype).removeprefix('torch.')}",
        role=role,
        least_bytes=sum(image.nbytes for image in read) + expected.numel() * dtype.itemsize,
    )
