"""The RoIAlign kernels against the reference: compiled where there is a GPU, under Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, SAMPLERS, boxes, examples, extreme_rois, features, rois
from tolerances import assert_within_budget
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn import ops
from fastmrcnn_kernels.reference.roi_align import assign_levels, level_bounds
from fastmrcnn_kernels.sampler import Sampler
from fastmrcnn_kernels.triton import roi_align_backward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of NaN boxes

MOST_ROIS = 12 if DEVICE == "cuda" else 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pooled_and_gradients(
    maps: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Tensor], weight: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What `run` makes of `maps`, the gradients of its sum weighted by `weight`, and that (by default random)."""
    leaves = [x.detach().requires_grad_() for x in maps]
    pooled = run(leaves)
    if weight is None:
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(pooled.device)
    weight = weight.to(pooled.dtype)
    return pooled.detach(), list(torch.autograd.grad(pooled, leaves, weight)), weight


def assert_kernel_keeps_to_the_budget(maps: Sequence[Tensor], run: Callable[..., Tensor]) -> None:
    """Forward and backward: as near to float64 as the reference in the same dtype."""
    maps = [x.to(DEVICE) for x in maps]
    found, found_gradients, weight = pooled_and_gradients(maps, lambda x: run(x, impl="triton"))
    expected, gradients, _ = pooled_and_gradients(maps, lambda x: run(x, impl="reference"), weight)
    doubles = [x.double() for x in maps]
    exact, exact_gradients, _ = pooled_and_gradients(doubles, lambda x: run(x, impl="reference"), weight)
    assert_within_budget(found, expected, exact)
    for one, other, oracle in zip(found_gradients, gradients, exact_gradients, strict=True):
        assert_within_budget(one, other, oracle)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@examples(200, interpreted=6)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 0.25, 0.3]))
def test_one_level(sampler: dict[str, Any], data: st.DataObject, dtype: torch.dtype, scale: float) -> None:
    maps = data.draw(features(dtype))
    slow = sampler.get("sampling_ratio", 2) <= 0 and DEVICE == "cpu"  # visits every sample on the map, one by one
    found = data.draw(rois(len(maps), limit=50.0 if slow else torch.inf))[:MOST_ROIS].to(DEVICE)
    size = data.draw(st.sampled_from([(1, 1), (2, 3), (7, 7), (5, 2)]))
    assert_kernel_keeps_to_the_budget(
        [maps], lambda x, impl: ops.roi_align(x[0], found, size, scale, **sampler, impl=impl)
    )


def pyramid(levels: int, dtype: torch.dtype, *, channels: int = 3, height: int = 24, width: int = 37) -> list[Tensor]:
    generator = torch.Generator().manual_seed(levels)
    shapes = [(max(height >> i, 1), max(width >> i, 1)) for i in range(levels)]
    return [torch.randn(2, channels, *shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
@examples(50, interpreted=3)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), given_levels=st.booleans())
def test_pyramid(levels: int, data: st.DataObject, dtype: torch.dtype, given_levels: bool) -> None:
    """Levels by area, small boxes reaching several, or given: the first RoI of an image has one that there is not."""
    found = data.draw(boxes(extent=140.0))[:MOST_ROIS]
    index = torch.arange(len(found))[:, None] % 3 - 1.0
    one_per_roi = (levels - 1 + torch.arange(len(found))) % (levels + 1) if given_levels else None
    arguments = {
        "boxes": torch.cat((index, found), dim=1).to(DEVICE),
        "output_size": (3, 2),
        "spatial_scales": [2.0 ** -(i + 2) for i in range(levels)],
        "canonical_scale": 40,
        "levels": None if one_per_roi is None else one_per_roi.to(DEVICE),
    }
    maps = pyramid(levels, dtype)
    assert_kernel_keeps_to_the_budget(maps, lambda x, impl: ops.multilevel_roi_align(x, **arguments, impl=impl))


@pytest.mark.parametrize("channels", [1, 3, 100, 256, 257])
def test_channels(channels: int) -> None:
    maps = pyramid(2, torch.bfloat16, channels=channels, height=6, width=9)
    found = torch.tensor([[0, 1.0, 2, 20, 17], [1, -5, 3, 30, 40]], device=DEVICE)
    arguments = (found, 3, (0.25, 0.125))
    assert_kernel_keeps_to_the_budget(
        maps, lambda x, impl: ops.multilevel_roi_align(x, *arguments, canonical_scale=40, impl=impl)
    )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (8, 8)])
def test_extreme_rois(sampler: dict[str, Any], shape: tuple[int, int]) -> None:
    """The whole map and more, points, coordinates of 40,000 pixels, and maps of one cell.

    Of 16 channels: of fewer numbers the reference may happen to have the exact ones.
    """
    maps = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(0))
    found = extreme_rois(*shape).to(DEVICE)
    assert_kernel_keeps_to_the_budget([maps], lambda x, impl: ops.roi_align(x[0], found, 3, **sampler, impl=impl))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_padding_and_boxes_that_are_not_finite_give_zeros(sampler: dict[str, Any]) -> None:
    nan, inf = torch.nan, torch.inf
    absent = torch.tensor(
        [
            [-1, 1, 1, 6, 6],
            [0, nan, 1, 6, 6],
            [0, nan, nan, nan, nan],
            [2, 1, 1, 6, 6],
            [0, 1, 1, inf, 6],
            [0, -inf, 1, 6, 6],
            [-1, nan, inf, 0, 0],
            [nan, 1, 1, 6, 6],
        ]
    )
    maps = torch.randn(2, 3, 8, 8, device=DEVICE).requires_grad_()
    pooled = ops.roi_align(maps, absent.to(DEVICE), 3, **sampler, impl="triton")
    assert (pooled == 0).all()
    (gradient,) = torch.autograd.grad(pooled.sum(), maps)
    assert (gradient == 0).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("sampler", "box"),
    [
        ({"sampling_ratio": 1}, [5.0, 5, 11, 11]),
        ({"sampling_ratio": 1, "aligned": True}, [5.5, 5.5, 11.5, 11.5]),
        ({"sampling": "corner"}, [6.0, 6, 10, 10]),
    ],
)
def test_cells_without_weight_are_not_read(sampler: dict[str, Any], box: list[float], interpolation: Any) -> None:
    """Samples on cells 6, 8 and 10: those from 11 on have no weight, and what they hold does not matter."""
    maps = torch.full((1, 2, 20, 20), torch.nan, device=DEVICE)
    maps[..., 6:11, 6:11] = 1.0
    found = torch.tensor([[0, *box]], device=DEVICE)
    pooled = ops.roi_align(maps, found, 3, **sampler, interpolation=interpolation, impl="triton")
    assert torch.equal(pooled, torch.ones_like(pooled))


def test_no_rois_and_no_images() -> None:
    maps = [
        torch.rand(2, 3, 4, 4, device=DEVICE).requires_grad_(),
        torch.rand(2, 3, 2, 2, device=DEVICE).requires_grad_(),
    ]
    pooled = ops.multilevel_roi_align(maps, torch.zeros(0, 5, device=DEVICE), (2, 3), (0.5, 0.25), impl="triton")
    assert pooled.shape == (0, 3, 2, 3)
    for gradient in torch.autograd.grad(pooled.sum(), maps):
        assert (gradient == 0).all()
    nothing = torch.rand(0, 3, 4, 4, device=DEVICE)
    assert ops.roi_align(nothing, torch.zeros(1, 5, device=DEVICE), 2, impl="triton").eq(0).all()


@pytest.mark.parametrize("area", [112.0**2, 224.0**2, 448.0**2])
def test_levels_at_the_edges(area: float) -> None:
    """Bit-equal to the reference where the level changes, and some units in the last place to either side."""
    sides = [torch.tensor(area).sqrt()]
    for _ in range(10 if DEVICE == "cpu" else 300):
        sides.append(torch.nextafter(sides[-1], torch.tensor(0.0)))
    sides += [torch.nextafter(sides[0], torch.tensor(torch.inf))]
    side = torch.stack(sides)
    # The bounds lie some ulps below the powers of two: +1e-6 in the formula.
    bound = torch.tensor(min(level_bounds(4, 2, 224, 4), key=lambda x: abs(x - area**0.5)))
    side = torch.cat((side, torch.stack([torch.nextafter(bound, torch.tensor(0.0)), bound])))
    found = torch.stack((0 * side, 0 * side, side, side), dim=1)
    expected = assign_levels(found, 4, 2, 224, 4)
    assert len(expected.unique()) == 2
    rois = torch.cat((torch.zeros(len(found), 1), found), dim=1).to(DEVICE)
    maps = [torch.full((1, 1, 160, 160), float(i), device=DEVICE) for i in range(4)]  # a cell's value is its level
    pooled = ops.multilevel_roi_align(maps, rois, 1, [2.0 ** -(i + 2) for i in range(4)], 1, impl="triton")
    assert torch.equal(pooled.flatten().cpu(), expected.float())


def test_level_bounds_are_the_edges_of_the_reference() -> None:
    for bounds, arguments in (
        (level_bounds(6, 2, 224, 4), (6, 2, 224, 4)),
        (level_bounds(3, 3, 37.5, 5), (3, 3, 37.5, 5)),
    ):
        assert all(a < b for a, b in pairwise(bounds))
        at = torch.tensor(bounds)
        below = torch.nextafter(at, torch.tensor(0.0))
        for size, offset in ((at, 1), (below, 0)):
            square = torch.stack((0 * size, 0 * size, size, size), dim=1)
            assert assign_levels(square, *arguments).tolist() == [i + offset for i in range(len(bounds))]
    assert level_bounds(1, 2, 224, 4) == ()


def test_deterministic() -> None:
    """Crowded: the gradient of a cell adds up many RoIs."""
    generator = torch.Generator().manual_seed(0)
    count = 2_000 if DEVICE == "cuda" else 40
    start = torch.rand(count, 2, generator=generator) * 20
    found = torch.cat((torch.zeros(count, 1), start, start + 4 + torch.rand(count, 2, generator=generator) * 8), dim=1)
    found = found.to(DEVICE)
    maps = [torch.randn(1, 2, 12, 14, generator=generator).to(DEVICE)]
    _, first, weight = pooled_and_gradients(maps, lambda x: ops.roi_align(x[0], found, 2, 0.5, 2, impl="triton"))
    _, second, _ = pooled_and_gradients(maps, lambda x: ops.roi_align(x[0], found, 2, 0.5, 2, impl="triton"), weight)
    assert torch.equal(first[0], second[0])
    expected, exact = (
        pooled_and_gradients([x], lambda x: ops.roi_align(x[0], found, 2, 0.5, 2, impl="reference"), weight)[1][0]
        for x in (maps[0], maps[0].double())
    )
    assert_within_budget(first[0], expected, exact)


@pytest.mark.parametrize("count", [31, 33, 1025])
def test_rois_beyond_a_word_and_a_group(count: int) -> None:
    """RoIs are found by bits, in words of 32 and groups of 1,024: only the last one has a gradient here."""
    found = torch.zeros(count, 5)
    found[:, 0] = -1
    found[-1] = torch.tensor([0, 1.0, 1, 5, 5])
    maps = torch.randn(1, 2, 6, 6).requires_grad_()
    pooled = torch.ops.fastmrcnn.multilevel_roi_align_backward(
        torch.ones(count, 2, 2, 2, device=DEVICE),
        found.to(DEVICE),
        None,
        1,
        [6],
        [6],
        [1.0],
        2,
        False,
        "bilinear",
        "average",
        224.0,
        4,
    )
    (expected,) = torch.autograd.grad(ops.roi_align(maps, found[-1:], 2, 1.0, 2, impl="reference").sum(), maps)
    torch.testing.assert_close(pooled[0].cpu(), expected)


def test_memory_layouts() -> None:
    maps = torch.randn(2, 5, 9, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = torch.tensor([[0, 1.0, 1, 4, 5], [1, -2, 3, 9, 9]], device=DEVICE)
    expected = ops.roi_align(maps, found, 3, impl="triton")
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for view in (
        maps.contiguous(memory_format=torch.channels_last),
        maps.mT.contiguous().mT,
        maps.repeat(1, 2, 1, 1)[:, :5],
    ):
        assert torch.equal(ops.roi_align(view, found, 3, impl="triton"), expected)
    strided = found.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(ops.roi_align(maps, strided, 3, impl="triton"), expected)
    assert torch.equal(ops.roi_align(maps, found.double(), 3, impl="triton"), expected)


def test_offsets_beyond_31_bits() -> None:
    """Features of 2^31 elements and more: only the cells that are read are ever touched."""
    side = 16_400  # one image alone is larger
    maps = torch.empty(2, 8, side, side, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    assert maps[0].numel() > 2**31
    maps[1, :, -12:, -12:] = torch.arange(12.0).to(DEVICE)  # by column
    found = torch.tensor([[1, side - 9.0, side - 9, side - 3, side - 3]], device=DEVICE)
    pooled = ops.roi_align(maps, found, 2, 1.0, 2, impl="triton")
    expected = torch.tensor([4.5, 7.5], device=DEVICE).expand(1, 8, 2, 2)
    assert torch.equal(pooled.float(), expected)


def test_backward_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside gradients in and out less than 2 MB, for 1,024 RoIs on the pyramid of two images of 800 x 1333."""

    class Allocations(TorchDispatchMode):
        sizes: list[int]

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "empty" in function.name():
                self.sizes.append(result.nbytes)
            return result

    class Nothing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    monkeypatch.setattr(roi_align_backward, "find_rois_kernel", Nothing())
    monkeypatch.setattr(roi_align_backward, "_roi_align_bwd_kernel", Nothing())
    heights, widths = zip((200, 334), (100, 167), (50, 84), (25, 42), strict=True)
    pooled = torch.empty(1024, 256, 7, 7, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    rois, scales = torch.zeros(1024, 5, device=DEVICE), (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    with Allocations() as mode:
        mode.sizes = []
        gradients = roi_align_backward.roi_align_backward(
            pooled, rois, None, 2, heights, widths, scales, Sampler(2, False), (112.0, 224.0, 448.0)
        )
    outputs = sum(gradient.nbytes for gradient in gradients)
    assert 0 < sum(mode.sizes) - outputs < 2 * 2**20
