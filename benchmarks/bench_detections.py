"""From the outputs of a box head to detections, of the 91 classes of COCO and the 1,204 of LVIS."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from benchmarks.detectors import agreement
from benchmarks.inputs import PHOTO, SMALL, leave_out, scored_boxes
from benchmarks.measure import device_name
from fastmrcnn import ops

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
Detections = list[dict[str, Tensor]]


class Case(NamedTuple):
    """A batch of images, classes with the background, and whether proposals are about few places or anywhere."""

    images: int
    classes: int
    clustered: bool
    proposals: int = 1000

    def __str__(self) -> str:
        where = "clustered" if self.clustered else "sparse"
        return f"{self.images} x {self.proposals} proposals, {self.classes} classes, {where}"


CASES = [Case(n, classes, c) for n in (1, 2, 8) for classes in (91, 1204) for c in (False, True)]
CASES += [Case(1, 91, True, 200)]
CONTENDERS = [
    ("fastmrcnn", "ours", torch.float32),
    ("fastmrcnn", "ours", torch.float16),
    ("torchvision", "shipped", torch.float32),
]


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K, C], deltas [N, K, C, 4] and proposals [N, K, 4]: most are background, others of a few classes."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.images, case.proposals)
    logits = torch.randn(*shape, case.classes, generator=generator)
    logits[..., 0] += 6
    likely = torch.randint(1, case.classes, (*shape, 3), generator=generator)
    boost = 8 * (torch.rand(*shape, 1, generator=generator) < 0.3) * torch.rand(*shape, 3, generator=generator)
    logits.scatter_add_(2, likely, boost)
    deltas = torch.randn(*shape, case.classes, 4, generator=generator)
    boxes = scored_boxes(case.images * case.proposals, clustered=case.clustered)[0].view(*shape, 4)
    low, high = torch.zeros(4), torch.tensor(PHOTO).flip(0).repeat(2).float()
    clipped = torch.minimum(torch.maximum(boxes, low.to(boxes)), high.to(boxes))
    return logits.to(device_name(), dtype), deltas.to(device_name(), dtype), clipped


@pytest.mark.parametrize(("name", "role", "dtype"), CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_detections(case: Case, name: str, role: str, dtype: torch.dtype, timed: Callable[..., None]) -> None:
    leave_out("detections", SMALL if case.proposals < 1000 else PHOTO, dtype)
    logits, deltas, proposals = inputs(case, dtype)
    counts = torch.full((case.images,), case.proposals, device=device_name())
    sizes = torch.tensor([PHOTO] * case.images, device=device_name())
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.05, 0.5, 100)

    def by_torchvision(logits: Tensor, deltas: Tensor) -> Detections:
        found = heads.postprocess_detections(
            logits.flatten(0, 1), deltas.flatten(0, 1).flatten(1), list(proposals), [PHOTO] * case.images
        )
        return [dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*found, strict=True)]

    def by_us() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.select_detections(logits, deltas, proposals, counts, sizes)

    expected = by_torchvision(logits.float(), deltas.float())

    def check(found: tuple[Tensor, Tensor, Tensor, Tensor] | Detections) -> None:
        if isinstance(found, tuple):
            numbers = found[3].tolist()
            found = [
                {"boxes": b[:n], "scores": s[:n], "labels": x[:n]}
                for b, s, x, n in zip(*found[:3], numbers, strict=True)
            ]
        assert sum(len(x["boxes"]) for x in expected) > 0
        agreed = agreement(expected, found)
        assert agreed >= 0.98, f"only {agreed:.1%} of the detections agree"

    timed(
        by_us if role == "ours" else lambda: by_torchvision(logits, deltas),
        check,
        op="detections",
        case=str(case),
        contender=f"{name} {str(dtype).removeprefix('torch.')}",
        role=role,
        least_bytes=logits.nbytes + proposals.nbytes + case.images * 100 * 28,
    )
