"""RoIPool on the one map of a backbone without a pyramid, 16 pixels per cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.inputs import SMALL, Pooling, leave_out, pyramid, random_rois
from benchmarks.measure import device_name
from fastmrcnn import ops
from tests.tolerances import assert_within_budget

CASES = [Pooling(n, 512, 7) for n in (1, 2, 8)] + [Pooling(1, 100, 7, SMALL)]
SCALE = 1 / 16
CONTENDERS = [
    ("fastmrcnn", "ours", torch.float32),
    ("fastmrcnn", "ours", torch.float16),
    ("fastmrcnn", "ours", torch.bfloat16),
    ("torchvision", "shipped", torch.float32),
    ("torchvision", "tuned", torch.float16),
    ("reference", "reference", torch.float32),
]


def pooling(role: str, features: Tensor, rois: Tensor, bins: int) -> Callable[[], Tensor]:
    """Function that pools; torchvision's 16-bit form as AMP runs it, which converts to float32 and back."""
    if role in ("ours", "reference"):
        impl: ops.Impl = "reference" if role == "reference" else "auto"
        return lambda: ops.roi_pool(features, rois, bins, SCALE, impl=impl)

    def run() -> Tensor:
        with torch.autocast(device_name(), enabled=role == "tuned", dtype=torch.float16):
            return torchvision.ops.roi_pool(features, rois, bins, SCALE)

    return run


@pytest.mark.parametrize(("name", "role", "dtype"), CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_roi_pool(
    direction: str, case: Pooling, name: str, role: str, dtype: torch.dtype, timed: Callable[..., None]
) -> None:
    leave_out("roi_pool", case.size, dtype)
    (features,), rois = pyramid(case, dtype, [SCALE]), random_rois(case)
    if name == "torchvision":
        features = features.contiguous()
    features.requires_grad_(direction == "backward")
    forward = pooling(role, features, rois, case.bins)
    pooled = forward()
    values = features.numel() + pooled.numel()
    wide = features.detach().float().requires_grad_()
    expected, position = torch.ops.torchvision.roi_pool(wide, rois, SCALE, case.bins, case.bins)

    def check_maxima(found: Tensor) -> None:
        assert torch.equal(found.float(), expected)

    def check_gradient(found: Sequence[Tensor]) -> None:
        exact = torch.zeros_like(features, dtype=torch.float64, memory_format=torch.contiguous_format)
        for image, its in enumerate(exact):
            here = rois[:, 0] == image
            cells, sent = (x[here].transpose(0, 1).flatten(1) for x in (position.long(), weight.double()))
            its.flatten(1).scatter_add_(1, cells.clamp(min=0), torch.where(cells >= 0, sent, 0))
        other = torch.autograd.grad(expected, wide, weight.float())[0]
        assert_within_budget(found[0], other.to(dtype), exact)

    weight = torch.randn_like(pooled)

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(pooled, features, weight, retain_graph=True)

    timed(
        forward if direction == "forward" else backward,
        check_maxima if direction == "forward" else check_gradient,
        op=f"roi_pool {direction}",
        case=str(case),
        contender=f"{name} {'AMP' if role == 'tuned' else str(dtype).removeprefix('torch.')}",
        role=role,
        least_bytes=values * dtype.itemsize + pooled.numel() * 4 + rois.nbytes,  # positions are 4 bytes each
    )
