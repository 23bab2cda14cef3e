"""A program that knows nothing of ours has torchvision's results by it."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from detectors import targets_for
from tiny import IMAGES, tiny
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.ops import MultiScaleRoIAlign, nms

import fastmrcnn
from benchmarks.detectors import agreement
from fastmrcnn_kernels import torchvision_ops

OPS = ("roi_align", "multilevel_roi_align", "nms", "batched_nms", "paste_masks_in_image")

MAPS = {str(i): torch.rand(2, 4, 32 >> i, 48 >> i, generator=torch.Generator().manual_seed(i)) for i in range(3)}
START = torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(5)) * 100
EXTENT = torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(6)) ** 2 * 200 + 2
BOXES = list(torch.cat((START, START + EXTENT), dim=2))
SCORES = torch.rand(30, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(30) % 3
ROIS = torch.cat((torch.arange(2.0).repeat_interleave(30)[:, None], torch.cat(BOXES)), dim=1)
MASKS = torch.rand(30, 1, 14, 14, generator=torch.Generator().manual_seed(8))
SIZE = (128, 192)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of our operations has given a result."""
    count: Counter[str] = Counter()

    def spy(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            count[name] += 1
            return result

        return counted

    for name in OPS:
        monkeypatch.setattr(fastmrcnn.ops, name, spy(name, getattr(fastmrcnn.ops, name)))
    return count


TWO = ("0", "1")
EXACT = [image.double() for image in IMAGES]


def test_detections(calls: Counter[str]) -> None:
    """In float64, where rounding flips no decision."""
    model = tiny(maps=TWO).double()
    with torch.inference_mode():
        expected = model(EXACT)
        assert not calls
        with fastmrcnn.patch_torchvision():
            found = model(EXACT)
    assert calls.keys() >= {"multilevel_roi_align", "batched_nms", "paste_masks_in_image"}
    assert calls["multilevel_roi_align"] == 2  # of boxes and of masks, of both images at once
    assert sum(len(result["boxes"]) for result in expected) > 10
    assert agreement(expected, found) == 1
    assert type(model).__module__.startswith("torchvision.")


def test_training(calls: Counter[str]) -> None:
    model = tiny(maps=TWO, rpn_batch_size_per_image=100_000, box_batch_size_per_image=4_000).double().train()
    targets = targets_for(EXACT, [3, 2])

    def step() -> tuple[dict[str, Tensor], list[Tensor]]:
        model.zero_grad()
        losses = model(EXACT, targets)
        torch.stack(list(losses.values())).sum().backward()
        return losses, [p.grad.clone() for p in model.parameters()]

    expected = step()
    with fastmrcnn.patch_torchvision():
        found = step()
    assert calls["roi_align"] >= 2  # masks of each image as targets
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def run_all() -> dict[str, Any]:
    """All operations as torchvision's users call them."""
    maps = MAPS["0"].clone().requires_grad_()
    pooled = torchvision.ops.roi_align(maps, ROIS, (5, 3), spatial_scale=0.25, sampling_ratio=2, aligned=True)
    (pooled.view(60, -1) ** 2).sum().backward()
    module = torchvision.ops.RoIAlign(4, 0.25, -1)
    return {
        "roi_align": pooled.detach(),
        "gradient": maps.grad,
        "lists": torchvision.ops.roi_align(MAPS["0"], BOXES, 3, 0.25),
        "none in half": torchvision.ops.roi_align(MAPS["0"].half(), [b[:0].half() for b in BOXES], 3, 0.25),
        "module": module(MAPS["0"], ROIS),
        "empty": torchvision.ops.roi_align(MAPS["0"], ROIS[:0], 3),
        "pooler": MultiScaleRoIAlign(["0", "1", "2"], 3, 2)(MAPS, BOXES, [SIZE] * 2),
        "one map": MultiScaleRoIAlign(["1"], 3, 2)(MAPS, BOXES, [SIZE] * 2),
        "nms": torchvision.ops.nms(BOXES[0], SCORES, 0.3),
        "imported": nms(BOXES[0], SCORES, iou_threshold=0.3),
        "no boxes": torchvision.ops.nms(BOXES[0][:0], SCORES[:0], 0.3),
        "batched_nms": torchvision.ops.batched_nms(BOXES[0], SCORES, LABELS, 0.3),
        "labels of 32 bits": torchvision.ops.batched_nms(BOXES[0], SCORES, LABELS.int(), 0.3),
        "no batch": torchvision.ops.batched_nms(BOXES[0][:0], SCORES[:0], LABELS[:0], 0.3),
        "paste": torchvision_heads.paste_masks_in_image(MASKS, BOXES[0], SIZE),
        "padding": torchvision_heads.paste_masks_in_image(MASKS.double(), BOXES[0].double(), SIZE, padding=2),
        "no masks": torchvision_heads.paste_masks_in_image(MASKS[:0], BOXES[0][:0], SIZE),
    }


def test_operations(calls: Counter[str]) -> None:
    expected = run_all()
    with fastmrcnn.patch_torchvision():
        found = run_all()
    assert calls == {"roi_align": 6, "multilevel_roi_align": 1, "nms": 3, "batched_nms": 3, "paste_masks_in_image": 3}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert found[name].is_contiguous(), name


def test_poolers_that_exist(calls: Counter[str]) -> None:
    """They keep the scales that they have stored, as torchvision does; a new one stores what torchvision would."""
    old = MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
    old(MAPS, BOXES, [(64, 96)] * 2)
    own = MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
    own.scales, own.map_levels = [0.3, 0.2, 0.1], lambda boxes: torch.arange(60) % 3
    expected = [pooler(MAPS, BOXES, [SIZE] * 2) for pooler in (old, own)]
    assert old.scales == [0.5, 0.25, 0.125]
    with fastmrcnn.patch_torchvision():
        found = [pooler(MAPS, BOXES, [SIZE] * 2) for pooler in (old, own)]
        assert calls == {"multilevel_roi_align": 2}
        new = MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
        new(MAPS, BOXES, [SIZE] * 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(pooled.is_contiguous() for pooled in found)
    assert new.scales == [0.25, 0.125, 0.0625]


def test_without_torchvisions_detail(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Poolers go level by level where torchvision has no function for all."""
    patching = sys.modules["fastmrcnn.patching"]
    monkeypatch.delitem(patching.REPLACEMENTS, torchvision.ops.poolers._multiscale_roi_align)
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
    expected = pooler(MAPS, BOXES, [SIZE] * 2)
    with fastmrcnn.patch_torchvision():
        torch.testing.assert_close(pooler(MAPS, BOXES, [SIZE] * 2), expected, rtol=1e-5, atol=1e-6)
    assert calls == {"roi_align": 3}


Case = Callable[[], Any]

ONLY_TORCHVISION: dict[str, Case] = {
    "integer boxes": lambda: torchvision_heads.paste_masks_in_image(MASKS, BOXES[0].long(), SIZE),
    "integer masks": lambda: torchvision_heads.paste_masks_in_image((MASKS * 255).byte(), BOXES[0], SIZE),
    "oblong masks": lambda: torchvision_heads.paste_masks_in_image(MASKS[..., :9], BOXES[0], SIZE),
    "boxes in half": lambda: torchvision_heads.paste_masks_in_image(MASKS, BOXES[0].half(), SIZE),
    "fewer boxes": lambda: torchvision_heads.paste_masks_in_image(MASKS, BOXES[0][:7], SIZE),
    "differentiated masks": lambda: torchvision_heads.paste_masks_in_image(MASKS.requires_grad_(), BOXES[0], SIZE),
    "a size of numpy": lambda: torchvision.ops.roi_align(MAPS["0"], ROIS, LABELS.numpy()[2]),
    "a size of 0": lambda: torchvision.ops.roi_align(MAPS["0"], ROIS, 0),
    "mapped": lambda: torch.vmap(lambda x: torchvision.ops.roi_align(x, ROIS, 3))(MAPS["0"][None]),
    "meta": lambda: torchvision.ops.roi_align(MAPS["0"].to("meta"), ROIS.to("meta"), 3).shape,
    "subclass": lambda: torchvision.ops.nms(
        torchvision.tv_tensors.BoundingBoxes(BOXES[0], format="XYXY", canvas_size=SIZE), SCORES, 0.3
    ),
    "boxes learn": lambda: torchvision.ops.roi_align(MAPS["0"], ROIS.clone().requires_grad_(), 3).requires_grad,
    "fractional labels": lambda: torchvision.ops.batched_nms(BOXES[0], SCORES, LABELS / 2, 0.3),
    "flat": lambda: torchvision.ops.batched_nms(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0.3),
}


@pytest.mark.parametrize("case", ONLY_TORCHVISION)
def test_what_ours_does_not_take(case: str, calls: Counter[str]) -> None:
    """Each result, its type and whether it wants a gradient are torchvision's, to the bit."""
    run = ONLY_TORCHVISION[case]
    expected = run()
    with fastmrcnn.patch_torchvision():
        found = run()
    MASKS.requires_grad_(False)
    assert sum(calls.values()) == (case == "fractional labels")  # one call by torchvision's function
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.requires_grad == expected.requires_grad
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "run",
    [
        lambda: torchvision.ops.nms(BOXES[0].long(), SCORES, 0.3),
        lambda: torchvision.ops.nms(BOXES[0], SCORES[:3], 0.3),
        lambda: torchvision.ops.roi_align(MAPS["0"], ROIS[:, 1:], 3),
        lambda: torchvision.ops.roi_align(MAPS["0"], [], 3),
        lambda: torchvision.ops.roi_align(MAPS["0"]),
        lambda: torchvision_heads.paste_masks_in_image(MASKS, None, SIZE),
    ],
)
def test_errors_are_torchvisions(run: Case) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whichever it is
        run()
    with fastmrcnn.patch_torchvision(), pytest.raises(type(expected.value)) as found:
        run()
    assert str(found.value) == str(expected.value)


def test_ours_on_a_cpu_calls_torchvisions(calls: Counter[str]) -> None:
    """Or it would call itself for ever."""
    with fastmrcnn.patch_torchvision():
        for run in (torchvision.ops.roi_align, fastmrcnn.ops.roi_align):
            run(MAPS["0"], ROIS, 3)
        ours = fastmrcnn.ops.roi_align(MAPS["0"], ROIS, 3, impl="torchvision")
        kept = fastmrcnn.ops.nms(BOXES[0], SCORES, 0.3)
        groups = fastmrcnn.ops.batched_nms(BOXES[0], SCORES, LABELS, 0.3)
        pooled = fastmrcnn.ops.roi_pool(MAPS["0"], ROIS, 3, impl="torchvision")
    assert calls == {"roi_align": 3, "nms": 1, "batched_nms": 1}
    assert torch.equal(ours, torchvision.ops.roi_align(MAPS["0"], ROIS, 3))
    assert torch.equal(pooled, torchvision.ops.roi_pool(MAPS["0"], ROIS, 3))
    assert torch.equal(kept, torchvision.ops.nms(BOXES[0], SCORES, 0.3))
    assert torch.equal(groups, torchvision.ops.batched_nms(BOXES[0], SCORES, LABELS, 0.3))
    assert torchvision_ops._nms is torchvision.ops.nms


def test_our_detectors_in_a_patched_program() -> None:
    theirs = tiny(maps=TWO).double()
    with torch.inference_mode():
        expected = theirs(EXACT)
        with fastmrcnn.patch_torchvision():
            ours = fastmrcnn.accelerate(theirs)
            found = ours(EXACT)
            images, _ = ours.transform(EXACT)
            features = ours.backbone(images.tensors)
            proposals, _ = ours.rpn(images, features)
            parts, _ = ours.roi_heads(features, proposals, images.image_sizes)
    assert agreement(expected, found) == 1
    assert [len(result["boxes"]) for result in parts] == [len(result["boxes"]) for result in expected]


def test_scripted() -> None:
    """While patched torch.jit compiles torchvision's own functions, and after it the whole detector."""

    def suppress(boxes: Tensor, scores: Tensor) -> Tensor:
        return torchvision.ops.nms(boxes, scores, 0.3)

    expected = suppress(BOXES[0], SCORES)
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
    pooled = pooler(MAPS, BOXES, [SIZE] * 2)
    with fastmrcnn.patch_torchvision():
        scripted = torch.jit.script(suppress)
        scripted_pooler = torch.jit.script(pooler)
        traced = torch.jit.trace(suppress, (BOXES[0], SCORES))
    for compiled in (scripted, traced):
        assert torch.equal(compiled(BOXES[0], SCORES), expected)
    assert torch.equal(scripted_pooler(MAPS, BOXES, [SIZE] * 2), pooled)


@pytest.mark.parametrize("patched", [False, True])
def test_scripted_detector(patched: bool) -> None:
    model = tiny(maps=())
    model.backbone = model.backbone.layers[0]
    expected = model(IMAGES)
    with fastmrcnn.patch_torchvision() if patched else contextlib.nullcontext():
        scripted = torch.jit.script(model)
    _, found = scripted(IMAGES)
    assert agreement(expected, found) >= 0.98


def test_compiled(calls: Counter[str]) -> None:
    """torch.compile sees torchvision's functions, as it would without."""
    run = torch.compile(lambda x: torchvision.ops.roi_align(x, ROIS, 3) + 1, backend="eager", fullgraph=True)
    expected = torchvision.ops.roi_align(MAPS["0"], ROIS, 3) + 1
    with fastmrcnn.patch_torchvision():
        assert torch.equal(run(MAPS["0"]), expected)
    assert torch.equal(run(MAPS["0"]), expected)
    assert not calls


def test_symbolically_traced() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = torchvision.ops.RoIAlign(3, 0.25, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x, ROIS).flatten(1)

    expected = Model()(MAPS["0"])
    with fastmrcnn.patch_torchvision():
        traced = torch.fx.symbolic_trace(Model())
        torch.testing.assert_close(traced(MAPS["0"]), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(traced(MAPS["0"]), expected)
