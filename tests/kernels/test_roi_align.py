"""RoIAlign: the separable reference against torchvision, float64 and a direct double loop."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes, features, ordered, rois
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor
from torch.nn import functional
from torchvision.ops.poolers import LevelMapper

from fastmrcnn import ops
from fastmrcnn_kernels import torchvision_ops
from fastmrcnn_kernels.reference.roi_align import assign_levels

RATIOS = [1, 2, 3, 0, -1]
ON_HOST: list[ops.Impl] = ["reference", "torchvision", "torch"]


def rois_for_torchvision(draw: st.DrawFn, images: int, *, aligned: bool, ratio: int) -> Tensor:
    """Any RoIs, but where the number of samples follows the box: not inverted where aligned, and not 1e12 of them.

    torchvision's own operation crashes on the former and does not finish the latter.
    """
    adaptive = ratio <= 0
    return draw(rois(images, limit=500.0 if adaptive else torch.inf, inverted=not (aligned and adaptive)))


def pool_present(maps: Tensor, rois: Tensor, *arguments: object) -> Tensor:
    """torchvision's `roi_align` of the RoIs that name an image, zeros for the others."""
    present = rois[:, 0] >= 0
    pooled = torchvision.ops.roi_align(maps, rois[present], *arguments)
    return pooled.new_zeros(len(rois), *pooled.shape[1:]).index_put((present.nonzero().flatten(),), pooled)


@given(st.data(), st.sampled_from(RATIOS), st.booleans(), st.sampled_from([1.0, 0.25, 1 / 16]))
def test_reference_equals_torchvision(data: st.DataObject, ratio: int, aligned: bool, scale: float) -> None:
    maps = data.draw(features())
    rois = rois_for_torchvision(data.draw, len(maps), aligned=aligned, ratio=ratio).double()
    size = data.draw(st.sampled_from([(1, 1), (2, 3), (7, 7), (5, 2)]))
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    found = ops.roi_align(ours, rois, size, scale, ratio, aligned, impl="reference")
    expected = pool_present(theirs, rois, size, scale, ratio, aligned)
    assert_exact_arithmetic(found, expected)
    assert (found[rois[:, 0] < 0] == 0).all()
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if len(rois):
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        assert_exact_arithmetic(ours.grad, theirs.grad, scale=len(rois))


@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from(RATIOS))
def test_all_implementations_keep_to_the_budget(data: st.DataObject, dtype: torch.dtype, ratio: int) -> None:
    maps = data.draw(features(dtype))
    rois = rois_for_torchvision(data.draw, len(maps), aligned=False, ratio=ratio)
    oracle = ops.roi_align(maps.double(), rois.double(), 4, 0.25, ratio, impl="reference")
    reference, *others = (ops.roi_align(maps, rois, 4, 0.25, ratio, impl=impl) for impl in ON_HOST)
    for other in others:
        assert reference.dtype == other.dtype == dtype
        assert_within_budget(reference, other, oracle)
        assert_within_budget(other, reference, oracle)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 15, 11], [1, -3, 4, 9, 30], [-1, 0, 0, 9, 9]], dtype=torch.float64)
    for ratio in (2, 0):
        assert torch.autograd.gradcheck(lambda x, r=ratio: ops.roi_align(x, rois, 3, 0.4, r, impl="reference"), maps)


@pytest.mark.parametrize("impl", ON_HOST)
@pytest.mark.parametrize("ratio", [2, -1])
def test_padding_and_boxes_that_are_not_finite_give_zeros(impl: ops.Impl, ratio: int) -> None:
    maps = torch.randn(2, 3, 8, 8, requires_grad=True)
    nan, inf = torch.nan, torch.inf
    rois = torch.tensor(
        [
            [-1, 1, 1, 6, 6],
            [0, nan, 1, 6, 6],
            [0, nan, nan, nan, nan],
            [2, 1, 1, 6, 6],
            [-1, nan, inf, 0, 0],
            [0, 1, 1, inf, 6],
            [0, 1, 1, -inf, 6],
            [0, 1, 1, 6, -inf],
            [0, -inf, 1, 6, 6],
            [0, 1, -inf, 6, 6],
        ]
    )
    pooled = ops.roi_align(maps, rois, 3, 1.0, ratio, impl=impl)
    assert (pooled == 0).all()
    pooled.sum().backward()
    assert (maps.grad == 0).all()


@pytest.mark.parametrize("impl", ON_HOST)
def test_no_rois(impl: ops.Impl) -> None:
    maps = [torch.rand(1, 3, 4, 4, requires_grad=True), torch.rand(1, 3, 2, 2, requires_grad=True)]
    assert ops.roi_align(maps[0], torch.zeros(0, 5), (2, 3), impl=impl).shape == (0, 3, 2, 3)
    assert ops.multilevel_roi_align(maps, torch.zeros(0, 5), (2, 3), (0.5, 0.25), impl=impl).shape == (0, 3, 2, 3)


@pytest.mark.parametrize("impl", ON_HOST)
def test_no_gradient_reaches_boxes(impl: ops.Impl) -> None:
    maps = torch.rand(1, 2, 6, 6, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 1, 4, 5]], requires_grad=True)
    ops.roi_align(maps, rois, 2, impl=impl).sum().backward()
    assert maps.grad.sum().item() == pytest.approx(8)  # four bins, two channels, weights that add up to one
    assert rois.grad is None or (rois.grad == 0).all()


@pytest.mark.parametrize("impl", ON_HOST)
def test_memory_layout_changes_nothing(impl: ops.Impl) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 9, 7, generator=generator)
    rois = torch.tensor([[0, 1.0, 1, 4, 5], [1, -2, 3, 9, 9]])
    expected = ops.roi_align(maps, rois, 3, impl=impl)
    views = [
        maps.contiguous(memory_format=torch.channels_last),
        maps.mT.contiguous().mT,
        maps.repeat(1, 2, 1, 1)[:, :5],
    ]
    for view in views:
        torch.testing.assert_close(ops.roi_align(view, rois, 3, impl=impl), expected)
    strided = rois.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(ops.roi_align(maps, strided, 3, impl=impl), expected)


def average_by_hand(cells: list[float], start: float, extent: float, bins: int, b: int) -> float:
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
    return total / max(grid, 1)  # no samples in an inverted box: zero


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("start", "end"), [(-3.0, 40_000.0), (-20_000.0, 20_000.0), (0.0, 37.3), (4.2, 4.9)])
def test_adaptive_sampling_by_hand(start: float, end: float, aligned: bool) -> None:
    """The number of samples grows with the box, the work of the reference does not.

    The features are a product of a column and a row, so two loops, one per axis, give the bins of huge RoIs too.
    """
    column, row = [1.0, -2.0, 3.0, 0.5, 7.0, -1.0, 2.0, 4.0, -6.0], [2.0, 5.0, -3.0, 1.0]
    maps = torch.tensor([[[[a * b for b in row] for a in column]]], dtype=torch.float64)
    rois = torch.tensor([[0, 2 * start, start, end / 2, end]], dtype=torch.float64)
    found = ops.roi_align(maps, rois, (5, 3), 1.0, -1, aligned, impl="reference")[0, 0]
    shift = 0.5 if aligned else 0.0
    least = -math.inf if aligned else 1.0
    width, height = max(end / 2 - 2 * start, least), max(end - start, least)
    y = [average_by_hand(column, start - shift, height, 5, b) for b in range(5)]
    x = [average_by_hand(row, 2 * start - shift, width, 3, b) for b in range(3)]
    expected = torch.tensor([[a * b for b in x] for a in y], dtype=torch.float64)
    assert_exact_arithmetic(found, expected, scale=max(35.0, end))  # the largest of features and coordinates


def test_adaptive_sampling_visits_every_sample() -> None:
    """A direct double loop over samples of features that are no product."""
    maps = torch.randn(1, 1, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    left, top, right, bottom = -9.3, -4.1, 97.2, 55.7
    rois = torch.tensor([[0, left, top, right, bottom]], dtype=torch.float64)
    found = ops.roi_align(maps, rois, (2, 3), 1.0, 0, impl="reference")
    tall, wide = (bottom - top) / 2, (right - left) / 3
    for p, q in product(range(2), range(3)):
        total = 0.0
        for i, j in product(range(math.ceil(tall)), range(math.ceil(wide))):
            y = top + p * tall + (i + 0.5) * tall / math.ceil(tall)
            x = left + q * wide + (j + 0.5) * wide / math.ceil(wide)
            if -1 <= y <= 6 and -1 <= x <= 5:
                y, x = min(max(y, 0), 5), min(max(x, 0), 4)
                for v, u in product(range(6), range(5)):
                    total += maps[0, 0, v, u].item() * max(0, 1 - abs(y - v)) * max(0, 1 - abs(x - u))
        expected = total / (math.ceil(tall) * math.ceil(wide))
        assert found[0, 0, p, q].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


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
    per_image = [ordered(b) for b in per_image]
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
    maps = arguments[0]
    for feature in maps:
        feature.requires_grad_()
    selected = torchvision_ops.multilevel_roi_align(*arguments, 2, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision_ops, "on_host", lambda tensor: False)
        masked = torchvision_ops.multilevel_roi_align(*arguments, 2, False)
    assert torch.equal(selected, masked)
    for a, b in zip(torch.autograd.grad(selected.sum(), maps), torch.autograd.grad(masked.sum(), maps), strict=True):
        assert a.isfinite().all()
        assert_exact_arithmetic(a, b, scale=20)


@given(found=boxes(20, extent=300.0, not_finite=True))
def test_multilevel_implementations_agree(found: Tensor) -> None:
    """RoIs of no image and boxes that are not finite give zeros on every level."""
    rois = torch.cat((torch.arange(20)[:, None] % 3 - 1.0, found), dim=1)
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    maps = list(pyramid(4).values())
    fast = ops.multilevel_roi_align(maps, rois.double(), 3, scales, impl="torchvision")
    assert_exact_arithmetic(ops.multilevel_roi_align(maps, rois.double(), 3, scales, impl="reference"), fast)
    absent = (rois[:, 0] < 0) | ~found.isfinite().all(dim=1)
    assert (fast[absent] == 0).all()


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


@pytest.mark.parametrize("image_shapes", [[(200, 301)], [(97, 301), (203, 99)], [(255, 320), (280, 319)]])
def test_scales_are_inferred_as_torchvision_does(image_shapes: list[tuple[int, int]]) -> None:
    """From the largest height of the images and the height of each map, to the nearest power of two."""
    maps = {name: m[: len(image_shapes)] for name, m in pyramid(4).items()}
    maps["pool"] = torch.rand(1, 1, 1, 1)  # not among featmap_names
    found = [torch.tensor([[3.0, 5.0, 90.0, 61.0], [10.0, 20.0, 240.0, 190.0]]).double()] * len(image_shapes)
    arguments = (["0", "1", "2", "3"], (3, 4), 2)
    expected = torchvision.ops.MultiScaleRoIAlign(*arguments)(maps, found, image_shapes)
    assert_exact_arithmetic(ops.MultiScaleRoIAlign(*arguments)(maps, found, image_shapes), expected)


def test_canonical_scale_and_level_are_options() -> None:
    maps, sides = pyramid(4), torch.tensor([3.0, 20, 60, 130, 250]).double()
    found = [torch.stack((0 * sides, 0 * sides, sides, sides), dim=1)] * 2
    options = {"canonical_scale": 60, "canonical_level": 3}
    expected = torchvision.ops.MultiScaleRoIAlign(list(maps), 3, 2, **options)(maps, found, [(256, 320)] * 2)
    pooled = ops.MultiScaleRoIAlign(list(maps), 3, 2, **options)(maps, found, [(256, 320)] * 2)
    assert_exact_arithmetic(pooled, expected)
    usual = ops.MultiScaleRoIAlign(list(maps), 3, 2)(maps, found, [(256, 320)] * 2)
    assert not torch.allclose(pooled, usual)


def sampled_by_grid_sample(maps: Tensor, roi: list[float], bins: int, ratio: int) -> Tensor:
    """Bins [C, bins, bins] of a RoI, by PyTorch's own bicubic interpolation of samples that lie on the map."""
    height, width = maps.shape[-2:]
    left, top, right, bottom = roi
    along = (torch.arange(bins * ratio, dtype=torch.float64) + 0.5) / (bins * ratio)
    x = (left + along * (right - left)).clamp(0, width - 1)
    y = (top + along * (bottom - top)).clamp(0, height - 1)
    grid = torch.stack(torch.meshgrid(x / (width - 1) * 2 - 1, y / (height - 1) * 2 - 1, indexing="xy"), dim=-1)
    samples = functional.grid_sample(maps, grid[None], mode="bicubic", padding_mode="border", align_corners=True)
    return functional.avg_pool2d(samples, ratio)[0]


@pytest.mark.parametrize("roi", [[3.0, 2.0, 9.0, 8.5], [-0.9, -0.5, 4.0, 6.0], [5.0, 3.0, 12.5, 10.9]])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_bicubic_against_grid_sample(roi: list[float], ratio: int) -> None:
    maps = torch.randn(1, 3, 11, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, *roi]], dtype=torch.float64)
    found = ops.roi_align(maps, rois, 3, 1.0, ratio, interpolation="bicubic", impl="reference")[0]
    assert_exact_arithmetic(found, sampled_by_grid_sample(maps, roi, 3, ratio), scale=10)


def test_adaptive_bicubic_is_bicubic_of_as_many_samples() -> None:
    maps = torch.randn(1, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, 0.3, 0.2, 7.9, 7.5]], dtype=torch.float64)  # bins of 2.5 cells: three samples each
    adaptive = ops.roi_align(maps, rois, 3, 1.0, 0, interpolation="bicubic", impl="reference")
    fixed = ops.roi_align(maps, rois, 3, 1.0, 3, interpolation="bicubic", impl="reference")
    assert_exact_arithmetic(adaptive, fixed, scale=10)


def crop_and_resize_by_hand(image: list[list[float]], box: list[float], rows: int, columns: int) -> list[list[float]]:
    """TensorFlow's operation for one box (x1, y1, x2, y2) in cells: bilinear, 0 outside the image."""
    height, width = len(image), len(image[0])
    x1, y1, x2, y2 = box
    result = []
    for i in range(rows):
        y = y1 + i * (y2 - y1) / (rows - 1) if rows > 1 else (y1 + y2) / 2
        result.append([])
        for j in range(columns):
            x = x1 + j * (x2 - x1) / (columns - 1) if columns > 1 else (x1 + x2) / 2
            if not (0 <= y <= height - 1 and 0 <= x <= width - 1):
                result[-1].append(0.0)
                continue
            low_y, low_x = math.floor(y), math.floor(x)
            high_y, high_x = math.ceil(y), math.ceil(x)
            top = image[low_y][low_x] + (image[low_y][high_x] - image[low_y][low_x]) * (x - low_x)
            bottom = image[high_y][low_x] + (image[high_y][high_x] - image[high_y][low_x]) * (x - low_x)
            result[-1].append(top + (bottom - top) * (y - low_y))
    return result


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (7, 4), (1, 5)])
@pytest.mark.parametrize(
    "box",
    [[1.0, 2.0, 4.5, 5.5], [0.0, 0.0, 6.0, 4.0], [-2.0, 1.0, 9.0, 2.0], [5.0, 4.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0]],
)
def test_corner_sampling_is_crop_and_resize(box: list[float], rows: int, columns: int) -> None:
    image = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, *box]], dtype=torch.float64)
    found = ops.roi_align(image[None, None], rois, (rows, columns), sampling="corner", impl="reference")[0, 0]
    expected = torch.tensor(crop_and_resize_by_hand(image.tolist(), box, rows, columns), dtype=torch.float64)
    assert_exact_arithmetic(found, expected, scale=10)


@pytest.mark.parametrize("sampler", [{"interpolation": "bicubic"}, {"sampling": "corner"}])
def test_gradcheck_of_other_samplers(sampler: dict[str, Any]) -> None:
    maps = torch.randn(1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rois = torch.tensor([[0, 0.5, 1, 5, 4.2]], dtype=torch.float64)
    for ratio in (2, 0):
        assert torch.autograd.gradcheck(
            lambda x, r=ratio: ops.roi_align(x, rois, 3, 1.0, r, **sampler, impl="reference"), maps
        )
