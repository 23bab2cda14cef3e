"""Masks of detections to images, and to COCO's run-length encoding, without and with such images in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.inputs import PHOTO, Pooling, random_rois
from benchmarks.measure import device_name
from fastmrcnn import ops

CELLS = 28
LARGE = (4000, 6000)
CHUNK = 1 << 30  # bytes that detectron2 lets its grid and masks have at a time


class Case(NamedTuple):
    """So many masks in an image of this size."""

    masks: int
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.masks} masks, {self.size[0]}x{self.size[1]}"


CASES = [Case(masks, size) for size in ((480, 640), PHOTO, LARGE) for masks in (1, 10, 100, 300)]
AT_MOST = 1 << 29
"""Pixels of all masks that a CPU is given, and pycocotools anywhere: it would take minutes for more."""


def leave_out_large(case: Case, contender: str, bytes_per_pixel: float) -> None:
    """Skip what a CPU takes too long for, and what the memory of a GPU does not hold."""
    pixels = case.masks * case.size[0] * case.size[1]
    if not torch.cuda.is_available():
        if pixels > AT_MOST:
            pytest.skip(f"left out, for want of a GPU: {case}")
    elif pixels * bytes_per_pixel > 0.9 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"left out, for want of memory: {pixels * bytes_per_pixel / 1e9:.0f} GB of {contender}, {case}")


@cache
def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Masks [D, 28, 28], wobbly discs, and boxes [D, 4]: sides of 16 to 640 pixels of a photo, or in scale."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, CELLS)
    angle, radius = torch.atan2(axis[:, None], axis), torch.hypot(axis[:, None], axis)
    lobes, shift = (
        torch.randint(2, 6, (case.masks, 1, 1), generator=generator),
        torch.rand(case.masks, 1, 1, generator=generator),
    )
    edge = 0.8 + 0.15 * torch.sin(lobes * (angle + 6 * shift))
    boxes = random_rois(Pooling(1, case.masks, CELLS))[:, 1:]
    scale = torch.tensor([case.size[1] / PHOTO[1], case.size[0] / PHOTO[0]]).repeat(2)
    return torch.sigmoid(20 * (edge - radius)).to(device_name()), boxes * scale.to(boxes)


def by_grid_sample(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at the centres of all pixels, as detectron2 samples them on a GPU, so many at a time as fit `CHUNK`."""
    y, x = (torch.arange(side, device=masks.device) + 0.5 for side in size)
    pasted = torch.empty(len(masks), *size, dtype=torch.bool, device=masks.device)
    at_a_time = max(1, CHUNK // (12 * size[0] * size[1]))
    for first in range(0, len(masks), at_a_time):
        part = slice(first, first + at_a_time)
        x1, y1, x2, y2 = boxes[part, :, None].unbind(1)
        gx, gy = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(gx[:, None, :], gy[:, :, None]), dim=-1)
        pasted[part] = functional.grid_sample(masks[part, None], grid, align_corners=False)[:, 0] >= 0.5
    return pasted


def by_torchvision(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return paste_masks_in_image(masks[:, None], boxes, size)[:, 0]


@pytest.mark.parametrize(
    ("name", "role", "semantics"),
    [
        ("fastmrcnn soft", "ours", "torchvision"),
        ("fastmrcnn bool", "variant", "torchvision"),  # of what torchvision does not make: no match for it
        ("fastmrcnn bits", "variant", "torchvision"),
        ("torchvision", "shipped", "torchvision"),
        ("fastmrcnn bool", "ours", "detectron2"),
        ("grid_sample", "shipped", "detectron2"),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_paste(case: Case, name: str, role: str, semantics: Any, timed: Callable[..., None]) -> None:
    out: Any = {"torchvision": "soft", "grid_sample": "bool"}.get(name) or name.split()[1]
    bytes_per_pixel = {"soft": 4, "bool": 1, "bits": 1 / 8}[out]
    # torchvision has all masks twice, as a list and stacked.
    leave_out_large(case, name, 8 if name == "torchvision" else bytes_per_pixel)
    masks, boxes = inputs(case)

    def by_us() -> Tensor:
        return ops.paste_masks(masks, boxes, case.size, out=out, semantics=semantics)

    def check(pasted: Tensor) -> None:
        """By float64, a few at a time; within what float32 cannot tell, pixels may differ."""
        for d in range(0, case.masks, max(1, case.masks // 10)):
            wide = masks[d : d + 1].double(), boxes[d : d + 1].double()
            found = ops.unpack_bits(pasted[d], case.size[1]) if out == "bits" else pasted[d]
            exact = ops.paste_masks(*wide, case.size, semantics=semantics, impl="reference")[0]
            assert exact.max() > 0.5
            if out == "soft":
                assert (found - exact).abs().max() < 1e-3
            else:
                assert torch.equal(found[(exact - 0.5).abs() > 1e-3], (exact > 0.5)[(exact - 0.5).abs() > 1e-3])

    calls = {
        "torchvision": lambda: by_torchvision(masks, boxes, case.size),
        "grid_sample": lambda: by_grid_sample(masks, boxes, case.size),
    }
    timed(
        calls.get(name, by_us),
        check,
        op="paste" if semantics == "torchvision" else "paste of detectron2",
        case=str(case),
        contender=name,
        role=role,
        least_bytes=round(case.masks * case.size[0] * case.size[1] * bytes_per_pixel) + masks.nbytes,
    )


@pytest.mark.parametrize(("name", "role"), [("fastmrcnn", "ours"), ("torchvision + pycocotools", "shipped")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rle(case: Case, name: str, role: str, timed: Callable[..., None]) -> None:
    if case.masks * case.size[0] * case.size[1] > AT_MOST:
        pytest.skip(f"left out, minutes for pycocotools: {case}")
    leave_out_large(case, name, 0 if role == "ours" else 8)
    masks, boxes = inputs(case)

    def by_pycocotools(part: slice = slice(None)) -> list[dict[str, Any]]:
        """As in torchvision's reference evaluation: soft masks on the CPU, and one after the other."""
        pixels = (by_torchvision(masks[part], boxes[part], case.size).cpu() > 0.5).numpy()
        return [pycocotools_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in pixels]

    # A few at a time, since ours may be measured where there is no memory for theirs.
    expected = [rle for first in range(0, case.masks, 10) for rle in by_pycocotools(slice(first, first + 10))]

    def check(rles: list[dict[str, Any]]) -> None:
        """The same runs, but for pixels whose value is as good as the threshold."""
        overlap = pycocotools_mask.iou(rles, expected, [0] * len(expected)).diagonal()
        assert overlap.min() > 0.99, f"masks overlap by {overlap.min()}"

    timed(
        by_pycocotools if role == "shipped" else lambda: ops.encode_masks(masks, boxes, case.size).rles,
        check,
        op="rle",
        case=str(case),
        contender=name,
        role=role,
        least_bytes=masks.nbytes + sum(len(x["counts"]) for x in expected),
    )
