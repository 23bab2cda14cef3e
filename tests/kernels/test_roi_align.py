"""RoIAlign: the separable reference against torchvision, float64 and a direct double loop."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes, features
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from fastmrcnn import ops
from fastmrcnn_kernels import torchvision_ops
from fastmrcnn_kernels.reference.roi_align import assign_levels

RATIOS = [1, 2, 3, 0, -1]


def rois_of(draw: st.DrawFn, images: int, dtype: torch.dtype, *, aligned: bool, ratio: int) -> Tensor:
    found = draw(boxes(extent=80.0)).to(dtype)
    if aligned and ratio <= 0:  # torchvision itself fails on adaptive sampling of an inverted aligned box
        found = torch.cat((torch.minimum(found[:, :2], found[:, 2:]), torch.maximum(found[:, :2], found[:, 2:])), dim=1)
    if ratio <= 0:  # or on a grid of 1e12 samples
        found = found.clamp(-500, 500)
    index = torch.randint(0, images, (len(found), 1), generator=torch.Generator().manual_seed(len(found)))
    return torch.cat((index.to(dtype), found), dim=1)


@given(st.data(), st.sampled_from(RATIOS), st.booleans(), st.sampled_from([1.0, 0.25, 1 / 16]))
def test_reference_equals_torchvision(data: st.DataObject, ratio: int, aligned: bool, scale: float) -> None:
    maps = data.draw(features())
    rois = rois_of(data.draw, len(maps), torch.float64, aligned=aligned, ratio=ratio)
    size = data.draw(st.sampled_from([(1, 1), (2, 3), (7, 7), (5, 2)]))
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    found = ops.roi_align(ours, rois, size, scale, ratio, aligned, impl="reference")
    expected = torchvision.ops.roi_align(theirs, rois, size, scale, ratio, aligned)
    assert_exact_arithmetic(found, expected)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if len(rois):
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        assert_exact_arithmetic(ours.grad, theirs.grad, scale=len(rois))


@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from([2, 0]))
def test_both_implementations_keep_to_the_budget(data: st.DataObject, dtype: torch.dtype, ratio: int) -> None:
    maps = data.draw(features(dtype))
    rois = rois_of(data.draw, len(maps), torch.float32, aligned=False, ratio=ratio)
    oracle = ops.roi_align(maps.double(), rois.double(), 4, 0.25, ratio, impl="reference")
    reference = ops.roi_align(maps, rois, 4, 0.25, ratio, impl="reference")
    other = ops.roi_align(maps, rois, 4, 0.25, ratio, impl="torchvision")
    assert reference.dtype == other.dtype == dtype
    assert_within_budget(reference, other, oracle)
    assert_within_budget(other, reference, oracle)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 15, 11], [1, -3, 4, 9, 30], [-1, 0, 0, 9, 9]], dtype=torch.float64)
    for ratio in (2, 0):
        assert torch.autograd.gradcheck(lambda x, r=ratio: ops.roi_align(x, rois, 3, 0.4, r, impl="reference"), maps)


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
@pytest.mark.parametrize("ratio", [2, -1])
def test_padding_and_boxes_that_are_not_finite_give_zeros(impl: ops.Impl, ratio: int) -> None:
    maps = torch.randn(2, 3, 8, 8, requires_grad=True)
    nan, inf = torch.nan, torch.inf
    rois = torch.tensor(
        [[-1, 1, 1, 6, 6], [0, nan, 1, 6, 6], [0, nan, nan, nan, nan], [2, 1, 1, 6, 6], [-1, nan, inf, 0, 0]]
    )
    pooled = ops.roi_align(maps, rois, 3, 1.0, ratio, impl=impl)
    assert (pooled == 0).all()
    pooled.sum().backward()
    assert (maps.grad == 0).all()


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
def test_no_rois(impl: ops.Impl) -> None:
    assert ops.roi_align(torch.rand(1, 3, 4, 4), torch.zeros(0, 5), (2, 3), impl=impl).shape == (0, 3, 2, 3)


def bin_by_hand(cells: list[float], start: float, extent: float, bins: int, b: int) -> float:
    """Average of adaptive samples of bin `b` along one axis, one at a time."""
    grid = math.ceil(extent / bins)
    total = 0.0
    for s in range(grid):
        position = start + b * extent / bins + (s + 0.5) * extent / bins / grid
        if -1 <= position <= len(cells):
            position = min(max(position, 0), len(cells) - 1)
            low = min(int(position), len(cells) - 1)
            high = min(low + 1, len(cells) - 1)
            total += cells[low] * (1 - (position - low)) + cells[high] * (position - low)
    return total / grid


@pytest.mark.parametrize(("start", "end"), [(-3.0, 40_000.0), (-20_000.0, 20_000.0), (0.0, 37.3), (4.2, 4.9)])
def test_adaptive_sampling_by_hand(start: float, end: float) -> None:
    """The number of samples grows with the box, the work of the reference does not."""
    cells = [1.0, -2.0, 3.0, 0.5, 7.0, -1.0, 2.0, 4.0, -6.0]
    maps = torch.tensor(cells, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 1, -1, 4)
    rois = torch.tensor([[0, 1.0, start, 2.0, end]], dtype=torch.float64)
    found = ops.roi_align(maps, rois, (5, 1), 1.0, -1, impl="reference").flatten().tolist()
    extent = max(end - start, 1.0)
    assert found == pytest.approx([bin_by_hand(cells, start, extent, 5, b) for b in range(5)], rel=1e-9, abs=1e-12)


EDGES = [112.0**2, 224.0**2, 448.0**2]


@pytest.mark.parametrize("area", EDGES)
def test_levels_at_the_edges(area: float) -> None:
    """Bit-equal to torchvision where the level changes, and one unit in the last place to either side."""
    side = torch.tensor(area).sqrt()
    ups = [side]
    downs = [side]
    for _ in range(40):
        ups.append(torch.nextafter(ups[-1], torch.tensor(torch.inf)))
        downs.append(torch.nextafter(downs[-1], torch.tensor(0.0)))
    far = torch.stack(ups + downs)
    wide = torch.stack((torch.zeros_like(far), torch.zeros_like(far), far, far), dim=1)
    expected = LevelMapper(2, 5)([wide])
    assert len(expected.unique()) == 2
    assert torch.equal(assign_levels(wide, 4, 2, 224, 4), expected)


@given(boxes(extent=900.0))
def test_levels_equal_torchvision(found: Tensor) -> None:
    usable = found[((found[:, 2:] - found[:, :2]).prod(dim=1) >= 0)]
    assert torch.equal(assign_levels(usable, 4, 2, 224, 4), LevelMapper(2, 5)([usable]))


def pyramid(levels: int) -> dict[str, Tensor]:
    torch.manual_seed(levels)
    return {
        str(i): torch.randn(2, 3, 256 // 2 ** (i + 2), 320 // 2 ** (i + 2), dtype=torch.float64) for i in range(levels)
    }


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@given(data=st.data())
def test_multilevel_equals_torchvision(levels: int, data: st.DataObject) -> None:
    maps = pyramid(levels)
    per_image = [data.draw(boxes(extent=300.0)).double().clamp(-1e3, 1e3) for _ in range(2)]
    per_image = [torch.cat((b[:, :2], torch.maximum(b[:, :2], b[:, 2:])), dim=1) for b in per_image]
    theirs = torchvision.ops.MultiScaleRoIAlign(list(maps), 3, 2)
    expected = theirs(maps, per_image, [(256, 320), (200, 310)])
    found = ops.MultiScaleRoIAlign(list(maps), 3, 2)(maps, per_image, [(256, 320), (200, 310)])
    assert_exact_arithmetic(found, expected)
    scales = [2.0 ** -(i + 2) for i in range(levels)]
    reference = ops.multilevel_roi_align(list(maps.values()), per_image, 3, scales, impl="reference")
    assert_exact_arithmetic(reference, expected)


@given(found=boxes(20, extent=300.0, not_finite=True))
def test_selecting_and_masking_agree(found: Tensor) -> None:
    """The way of the CPU and the way without synchronisation."""
    rois = torch.cat((torch.arange(20)[:, None] % 3 - 1.0, found), dim=1)
    arguments = (
        list(pyramid(4).values()),
        rois,
        assign_levels(found, 4, 2, 224, 4),
        (3, 3),
        (1 / 4, 1 / 8, 1 / 16, 1 / 32),
    )
    selected = torchvision_ops.multilevel_roi_align(*arguments, 2, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision_ops, "on_host", lambda tensor: False)
        masked = torchvision_ops.multilevel_roi_align(*arguments, 2, False)
    assert torch.equal(selected, masked)


def test_given_levels() -> None:
    maps = list(pyramid(2).values())
    rois = torch.tensor([[0, 10.0, 10, 50, 50]] * 2, dtype=torch.float64)
    found = ops.multilevel_roi_align(maps, rois, 2, (1 / 4, 1 / 8), levels=torch.tensor([1, 0]))
    assert torch.equal(found[:1], ops.roi_align(maps[1], rois[:1], 2, 1 / 8, 2))
    assert torch.equal(found[1:], ops.roi_align(maps[0], rois[1:], 2, 1 / 4, 2))


def test_scales_are_those_of_each_call() -> None:
    pooler = ops.MultiScaleRoIAlign(["0"], 2, 2)
    assert isinstance(pooler, torchvision.ops.MultiScaleRoIAlign)
    maps, box = {"0": torch.rand(1, 1, 16, 16)}, [torch.tensor([[2.0, 2.0, 14.0, 14.0]])]
    pooler(maps, box, [(16, 16)])
    fresh = torchvision.ops.MultiScaleRoIAlign(["0"], 2, 2)
    torch.testing.assert_close(pooler(maps, box, [(64, 64)]), fresh(maps, box, [(64, 64)]))
