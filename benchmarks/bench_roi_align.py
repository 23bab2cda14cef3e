"""Multi-level RoIAlign on the pyramid of a photo, each library called as its own model calls it.

torchvision's `MultiScaleRoIAlign` gets a list of boxes per image; ours gets RoIs with an image index.  Under AMP
torchvision converts 16-bit features to float32 and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.inputs import CHANNELS, SCALES, SMALL, Pooling, cells_read, leave_out, pyramid, random_rois
from benchmarks.measure import device_name
from fastmrcnn import ops
from fastmrcnn_kernels import torchvision_ops
from fastmrcnn_kernels.reference.roi_align import assign_levels
from tests.tolerances import assert_within_budget

FORWARD = [Pooling(n, *pooled) for pooled in ((1000, 7), (100, 14), (512, 7), (128, 14)) for n in (1, 2, 8)]
BACKWARD = [Pooling(n, *pooled) for pooled in ((512, 7), (128, 14)) for n in (1, 2, 8)]
SMALLER = [Pooling(1, 100, 7, SMALL), Pooling(1, 20, 14, SMALL)]


class Contender(NamedTuple):
    """Who pools, from features of which type and memory layout."""

    name: str
    role: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    amp: bool = False

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last and self.role in ("shipped", "tuned") else ""
        return f"{self.name} {'AMP' if self.amp else str(self.dtype).removeprefix('torch.')}{layout}"

    def pooling(self, maps: Sequence[Tensor], rois: Tensor, case: Pooling) -> Callable[[], Tensor]:
        """Function that pools: [N * R, 256, bins, bins]."""
        if self.role in ("ours", "reference"):
            impl: ops.Impl = "reference" if self.role == "reference" else "auto"
            return lambda: ops.multilevel_roi_align(maps, rois, case.bins, SCALES, impl=impl)
        features = {str(i): x for i, x in enumerate(maps)}
        pooler = torchvision.ops.MultiScaleRoIAlign(list(features), case.bins, 2)
        boxes, sizes = list(rois[:, 1:].split(case.rois)), [case.size] * case.images

        def run() -> Tensor:
            with torch.autocast(device_name(), enabled=self.amp, dtype=torch.float16):
                return pooler(features, boxes, sizes)

        return run


CONTENDERS = [
    Contender("fastmrcnn", "ours"),
    Contender("fastmrcnn", "ours", torch.float16),
    Contender("fastmrcnn", "ours", torch.bfloat16),
    Contender("torchvision", "shipped", channels_last=False),
    Contender("torchvision", "tuned"),
    Contender("torchvision", "tuned", torch.float16, channels_last=False, amp=True),
    Contender("torchvision", "tuned", torch.float16, amp=True),
    Contender("reference", "reference"),
]


def inputs(case: Pooling, contender: Contender) -> tuple[list[Tensor], Tensor]:
    """Features and RoIs; skips what this machine has no use for."""
    leave_out("roi_align", case.size, contender.dtype)
    if contender.role == "reference" and case.images > 2:
        pytest.skip("left out, seconds per call: the reference of roi_align on 8 images")
    maps = pyramid(case, contender.dtype)
    return maps if contender.channels_last else [x.contiguous() for x in maps], random_rois(case)


def pooled_by_torchvision(maps: Sequence[Tensor], rois: Tensor, case: Pooling, dtype: torch.dtype) -> Tensor:
    """RoI features in `dtype`, float32 or float64, with the levels that float32 gives."""
    levels = assign_levels(rois[:, 1:], len(maps), 2, 224, 4)
    wide = [x.to(dtype) for x in maps]
    return torchvision_ops.multilevel_roi_align(wide, rois.to(dtype), levels, (case.bins, case.bins), SCALES, 2, False)


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("case", FORWARD + SMALLER, ids=str)
def test_roi_align_forward(case: Pooling, contender: Contender, timed: Callable[..., None]) -> None:
    maps, rois = inputs(case, contender)

    def check(found: Tensor) -> None:
        reference, exact = (pooled_by_torchvision(maps, rois, case, d) for d in (torch.float32, torch.float64))
        assert_within_budget(found, reference.to(found.dtype), exact)

    values = (cells_read(maps, rois, case.bins) + len(rois) * case.bins**2) * CHANNELS
    timed(
        contender.pooling(maps, rois, case),
        check,
        op="roi_align forward",
        case=str(case),
        contender=str(contender),
        role=contender.role,
        least_bytes=values * contender.dtype.itemsize + rois.nbytes,
    )


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("case", BACKWARD + SMALLER, ids=str)
def test_roi_align_backward(case: Pooling, contender: Contender, timed: Callable[..., None]) -> None:
    maps, rois = inputs(case, contender)
    leaves = [x.requires_grad_() for x in maps]
    pooled = contender.pooling(leaves, rois, case)()
    generator = torch.Generator(device_name()).manual_seed(1)
    weight = torch.randn(pooled.shape, generator=generator, device=device_name()).to(pooled.dtype)
    weight = weight.contiguous(
        memory_format=torch.channels_last if contender.channels_last else torch.contiguous_format
    )

    def gradients_by_torchvision(dtype: torch.dtype) -> Sequence[Tensor]:
        wide = [x.detach().to(dtype).requires_grad_() for x in maps]
        return torch.autograd.grad(pooled_by_torchvision(wide, rois, case, dtype), wide, weight.to(dtype))

    def check(found: Sequence[Tensor]) -> None:
        references, exact = map(gradients_by_torchvision, (torch.float32, torch.float64))
        for one, other, oracle in zip(found, references, exact, strict=True):
            assert_within_budget(one, other.to(one.dtype), oracle)

    values = sum(x.numel() for x in maps) + pooled.numel()
    timed(
        lambda: torch.autograd.grad(pooled, leaves, weight, retain_graph=True),
        check,
        op="roi_align backward",
        case=str(case),
        contender=str(contender),
        role=contender.role,
        least_bytes=values * contender.dtype.itemsize + rois.nbytes,
    )
