"""RoIPool: the reference against torchvision and a loop by hand, the kernels against the reference, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, examples, features, rois
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels.reference.roi_pool import round_half_away

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of NaN boxes

MOST_ROIS = 12 if DEVICE == "cuda" else 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = st.sampled_from([(1, 1), (2, 3), (7, 7), (5, 2)])
SCALES = st.sampled_from([1.0, 0.25, 1 / 16, 0.3])


def pooled_and_gradient(maps: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """RoIPool of `maps` and the gradient of its sum, weighted at random."""
    leaf = maps.detach().requires_grad_()
    pooled = ops.roi_pool(leaf, *arguments, **options)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(pooled)
    return pooled.detach(), torch.autograd.grad(pooled, leaf, weight)[0]


@given(data=st.data(), size=SIZES, scale=SCALES, tied=st.booleans())
def test_reference_equals_torchvision(data: st.DataObject, size: tuple[int, int], scale: float, tied: bool) -> None:
    maps = data.draw(features())
    if tied:
        maps = maps.round()
    found = data.draw(rois(len(maps))).double()
    pooled, gradient = pooled_and_gradient(maps, found, size, scale, impl="reference")
    expected, expected_gradient = pooled_and_gradient(maps, found, size, scale, impl="torchvision")
    assert torch.equal(pooled, expected)
    assert_exact_arithmetic(gradient, expected_gradient, scale=max(len(found), 1))


def test_rounding_is_that_of_c() -> None:
    value = torch.tensor([-2.5, -1.5, -0.5, -0.49999997, 0.0, 0.49999997, 0.5, 1.5, 2.5, 8388609.0, -(2.0**30)])
    expected = torch.tensor([-3.0, -2, -1, 0, 0, 0, 1, 2, 3, 8388609.0, -(2.0**30)])
    assert torch.equal(round_half_away(value), expected)


def test_by_hand() -> None:
    """A RoI of 3 x 5 cells, 2 x 2 bins: rows 0-1 and 1-2, columns 0-2 and 2-4 of the RoI share the middle ones."""
    cells = torch.arange(48.0).view(1, 1, 6, 8)
    found = torch.tensor([[0, 1.6, 2.4, 5.5, 4.0]])  # columns 2-6, rows 2-4
    assert ops.roi_pool(cells, found, 2, impl="reference").flatten().tolist() == [28, 30, 36, 38]
    assert ops.roi_pool(-cells, found, 2, impl="reference").flatten().tolist() == [-18, -20, -26, -28]


def test_gradcheck() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    found = torch.tensor([[0, 1.0, 2, 15, 11], [1, -3, 4, 9, 30], [-1, 0, 0, 9, 9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.roi_pool(x, found, 3, 0.4, impl="reference"), maps)


@examples(200, interpreted=10)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), size=SIZES, scale=SCALES, tied=st.booleans())
def test_kernel_equals_reference(
    data: st.DataObject, dtype: torch.dtype, size: tuple[int, int], scale: float, tied: bool
) -> None:
    maps = data.draw(features(dtype)).to(DEVICE)
    if tied:
        maps = maps.round()
    found = data.draw(rois(len(maps)))[:MOST_ROIS].to(DEVICE)
    pooled, gradient = pooled_and_gradient(maps, found, size, scale, impl="triton")
    expected, expected_gradient = pooled_and_gradient(maps, found, size, scale, impl="reference")
    assert torch.equal(pooled, expected)
    # In double precision positions may round otherwise; the maxima of the kernel say where its gradient belongs.
    exact = torch.zeros(maps.shape, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(pooled).double()
    position = torch.ops.fastmrcnn.roi_pool(maps, found, size, scale)[1].long()
    for r in range(len(found)):
        if found[r, 0] >= 0:
            add = torch.where(position[r] >= 0, weight[r], 0).flatten(1)
            exact[int(found[r, 0])].flatten(1).scatter_add_(1, position[r].clamp(min=0).flatten(1), add)
    assert_within_budget(gradient, expected_gradient, exact)


@pytest.mark.parametrize("impl", ["reference", "torchvision", "triton"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (8, 8)])
def test_extreme_rois(impl: ops.Impl, shape: tuple[int, int]) -> None:
    """The whole map and more, points, nothing, and coordinates of 40,000 pixels."""
    height, width = shape
    maps = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole, outside = maps.amax(dim=(2, 3)), torch.zeros(1, 3, device=DEVICE)
    cases = [
        ([0.0, 0, width, height], whole),
        ([-20_000.0, -20_000, 20_000, 20_000], whole),
        ([39_990.0, 39_990, 40_000, 40_000], outside),
        ([0.0, 0, 0, 0], maps[:, :, 0, 0]),
        ([0.0, 0, -9, -9], maps[:, :, 0, 0]),  # at least one cell
    ]
    found = torch.tensor([[0, *box] for box, _ in cases], device=DEVICE)
    pooled = ops.roi_pool(maps, found, 1, impl=impl)
    assert torch.equal(pooled.flatten(1), torch.cat([expected for _, expected in cases]))


@pytest.mark.parametrize("impl", ["reference", "torchvision", "triton"])
def test_padding_and_boxes_that_are_not_finite_give_zeros(impl: ops.Impl) -> None:
    nan, inf = torch.nan, torch.inf
    absent = [
        [-1, 1, 1, 6, 6],
        [0, nan, 1, 6, 6],
        [2, 1, 1, 6, 6],
        [0, 1, 1, inf, 6],
        [0, -inf, 1, 6, 6],
        [nan, 1, 1, 6, 6],
    ]
    maps = (torch.rand(2, 3, 8, 8, device=DEVICE) + 1).requires_grad_()
    pooled = ops.roi_pool(maps, torch.tensor(absent, device=DEVICE), 3, impl=impl)
    assert (pooled == 0).all()
    assert (torch.autograd.grad(pooled.sum(), maps)[0] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_boxes_too_large_for_float32_give_zeros(impl: ops.Impl) -> None:
    found = torch.tensor([[0, -3e38, 0, 3e38, 4], [0, 0, -3e38, 4, 3e38]], device=DEVICE)
    assert (ops.roi_pool(torch.ones(1, 1, 4, 4, device=DEVICE), found, 2, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_is_never_the_largest(impl: ops.Impl) -> None:
    maps = torch.full((1, 1, 2, 4), torch.nan, device=DEVICE)
    maps[..., 0, 1] = -3.0
    maps = maps.requires_grad_()
    found = torch.tensor([[0, 0.0, 0, 3, 1]], device=DEVICE)
    pooled = ops.roi_pool(maps, found, (1, 2), impl=impl)
    assert pooled.flatten().tolist() == [-3.0, -torch.inf]
    gradient = torch.autograd.grad(pooled, maps, torch.ones_like(pooled))[0]
    assert gradient.flatten().tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("channels", [1, 3, 100, 256, 257])
def test_channels(channels: int) -> None:
    maps = torch.randn(2, channels, 5, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    found = torch.tensor([[0, 1.0, 2, 20, 17], [1, -5, 3, 30, 40]], device=DEVICE)
    pooled, gradient = pooled_and_gradient(maps, found, 2, 0.25, impl="triton")
    expected, expected_gradient = pooled_and_gradient(maps, found, 2, 0.25, impl="reference")
    assert torch.equal(pooled, expected)
    assert torch.equal(gradient, expected_gradient)  # no cell is the largest of two bins here


@pytest.mark.parametrize("count", [31, 33, 1025])
def test_rois_beyond_a_word_and_a_group(count: int) -> None:
    """RoIs are found by bits, in words of 32 and groups of 1,024: only the last one has a gradient here."""
    found = torch.zeros(count, 5)
    found[:, 0] = -1
    found[-1] = torch.tensor([0, 1.0, 1, 3, 3])
    position = torch.full((count, 2, 1, 1), -1, dtype=torch.int32, device=DEVICE)
    position[-1] = 3 * 6 + 2
    pooled = torch.arange(2.0).view(1, 2, 1, 1).expand(count, 2, 1, 1).to(DEVICE)
    gradient = torch.ops.fastmrcnn.roi_pool_backward(pooled, position, found.to(DEVICE), 1, 6, 6, 1.0)
    expected = torch.zeros(1, 2, 6, 6, device=DEVICE)
    expected[0, 1, 3, 2] = 1
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("bins", "extent"), [(13, 14), (19, 15)])
def test_a_last_bin_that_ends_late(bins: int, extent: int) -> None:
    """Where the size of bins is rounded up, the last one ends a cell after the RoI, here the first of a new tile."""
    assert (torch.tensor(extent) / bins * bins).ceil() == extent + 1
    maps = torch.zeros(1, 1, 32, 32, device=DEVICE)
    maps[..., 24, 24] = 1.0
    maps = maps.requires_grad_()
    found = torch.tensor([[0, 24.0 - extent, 24 - extent, 23, 23]], device=DEVICE)
    for impl in ("torchvision", "reference", "triton"):
        pooled = ops.roi_pool(maps, found, bins, impl=impl)
        assert pooled[0, 0, -1, -1].item() == 1.0
        assert torch.autograd.grad(pooled.max(), maps)[0][..., 24, 24].item() == 1.0


def test_deterministic_where_bins_crowd() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 2_000 if DEVICE == "cuda" else 40
    start = torch.rand(count, 2, generator=generator) * 10
    found = torch.cat((torch.zeros(count, 1), start, start + 2 + torch.rand(count, 2, generator=generator) * 8), dim=1)
    maps = torch.randn(1, 2, 12, 14, generator=generator).to(DEVICE)
    first, second = (pooled_and_gradient(maps, found.to(DEVICE), 2, impl="triton") for _ in range(2))
    assert torch.equal(first[1], second[1])
    expected, exact = (pooled_and_gradient(x, found.to(x), 2, impl="reference")[1] for x in (maps, maps.double()))
    assert_within_budget(first[1], expected, exact)


def test_offsets_beyond_31_bits() -> None:
    """Features of 2^31 elements and more: only the cells that are read are ever touched."""
    side = 16_400  # one image alone is larger
    maps = torch.empty(2, 8, side, side, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    assert maps[0].numel() > 2**31
    maps[1, :, -12:, -12:] = torch.arange(12.0).to(DEVICE)  # by column
    found = torch.tensor([[1, side - 9.0, side - 9, side - 4, side - 4]], device=DEVICE)
    pooled = ops.roi_pool(maps, found, 2, impl="triton")
    assert torch.equal(pooled.float(), torch.tensor([5.0, 8.0], device=DEVICE).expand(1, 8, 2, 2))


def test_memory_layouts() -> None:
    maps = torch.randn(2, 5, 9, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = torch.tensor([[0, 1.0, 1, 4, 5], [1, -2, 3, 9, 9]], device=DEVICE)
    expected = ops.roi_pool(maps, found, 3, impl="triton")
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for view in (maps.contiguous(memory_format=torch.channels_last), maps.mT.contiguous().mT):
        assert torch.equal(ops.roi_pool(view, found, 3, impl="triton"), expected)
    assert torch.equal(ops.roi_pool(maps, found.repeat_interleave(2, dim=1)[:, ::2], 3, impl="triton"), expected)
    assert torch.equal(ops.roi_pool(maps, found.double(), 3, impl="triton"), expected)


@pytest.mark.parametrize("impl", ["reference", "torchvision", "triton"])
def test_no_rois(impl: ops.Impl) -> None:
    maps = torch.rand(1, 3, 4, 4, device=DEVICE).requires_grad_()
    pooled = ops.roi_pool(maps, torch.zeros(0, 5, device=DEVICE), (2, 3), impl=impl)
    assert pooled.shape == (0, 3, 2, 3)


def test_the_signature_is_that_of_torchvision() -> None:
    maps, found = torch.rand(2, 3, 8, 8), [torch.tensor([[0.0, 1, 5, 6]]), torch.tensor([[2.0, 2, 7, 7], [0, 0, 3, 3]])]
    assert torch.equal(ops.roi_pool(maps, found, (2, 3), 0.5), torchvision.ops.roi_pool(maps, found, (2, 3), 0.5))
