"""RoIAlign by `embedding_bag` against the reference, for all samplers; `test_roi_align.py` has both and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SAMPLERS, boxes, extreme_rois, features, rois
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn import ops
from fastmrcnn_kernels import torch_roi_align

MANY = 1 << 23


def results(maps: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
    """Bins, and the gradients of their sum with random weights."""
    leaves = [x.detach().requires_grad_() for x in maps]
    pooled = run(leaves)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, weight.to(pooled.dtype))]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@given(data=st.data(), scale=st.sampled_from([1.0, 0.25, 0.3]), at_once=st.sampled_from([1, 3000, MANY]))
def test_equals_the_reference(sampler: dict[str, Any], data: st.DataObject, scale: float, at_once: int) -> None:
    """Also where not all weights, or not those of two RoIs, are in memory at a time."""
    maps = data.draw(features())
    found = data.draw(rois(len(maps)))
    size = data.draw(st.sampled_from([(1, 1), (2, 3), (7, 7), (5, 2)]))
    expected = results([maps], lambda x: ops.roi_align(x[0], found, size, scale, **sampler, impl="reference"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_roi_align, "ENTRIES_AT_ONCE", at_once)
        pooled = results([maps], lambda x: ops.roi_align(x[0], found, size, scale, **sampler, impl="torch"))
    for one, other in zip(pooled, expected, strict=True):
        assert_exact_arithmetic(one, other, scale=10 + len(found))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_extreme_rois(sampler: dict[str, Any]) -> None:
    kinds: list[list[list[Tensor]]] = []
    for size in [(1, 1), (1, 9), (9, 1), (8, 8)]:
        maps = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
        rois = extreme_rois(*size)

        def run(impl: ops.Impl, maps: Tensor, rois: Tensor) -> list[Tensor]:
            found = results([maps], lambda x: ops.roi_align(x[0], rois, 3, **sampler, impl=impl))
            return [x.flatten() for x in found]

        exact = run("reference", maps.double(), rois)
        for one, other in zip(run("torch", maps.double(), rois), exact, strict=True):
            assert_exact_arithmetic(one, other, scale=20)
        kinds.append([run("torch", maps, rois), run("reference", maps, rois), exact])
    for pooled_or_gradient in (0, 1):
        assert_within_budget(*(torch.cat([x[pooled_or_gradient] for x in kind]) for kind in zip(*kinds, strict=True)))


@given(found=boxes(20, extent=300.0, not_finite=True), given_levels=st.booleans())
def test_pyramid(found: Tensor, given_levels: bool) -> None:
    """Levels by area or given, some of which there are not; a map that needs no gradient."""
    rois = torch.cat((torch.arange(20)[:, None] % 3 - 1.0, found), dim=1)
    levels = torch.arange(20) % 6 - 1 if given_levels else None
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 64 >> i, 80 >> i, generator=generator, dtype=torch.float64) for i in range(4)]
    scales = [2.0 ** -(i + 2) for i in range(4)]

    def run(x: Sequence[Tensor], impl: ops.Impl) -> Tensor:
        return ops.multilevel_roi_align([maps[0], *x], rois, (3, 2), scales, levels=levels, impl=impl)

    for one, other in zip(
        results(maps[1:], lambda x: run(x, "torch")), results(maps[1:], lambda x: run(x, "reference")), strict=True
    ):
        assert_exact_arithmetic(one, other, scale=20)


def test_deterministic_and_channels_last() -> None:
    """Crowded: the gradient of a cell adds up many RoIs.  Convolutions want the layout of their inputs back."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(3000, 2, generator=generator) * 20
    found = torch.cat((torch.zeros(3000, 1), start, start + 4 + torch.rand(3000, 2, generator=generator) * 8), dim=1)
    maps = [torch.randn(1, 16, 12, 14, generator=generator).contiguous(memory_format=torch.channels_last)]
    first, second = (results(maps, lambda x: ops.roi_align(x[0], found, 2, 0.5, 2, impl="torch")) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous(memory_format=torch.channels_last)


class Peak(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.most = max(self.most, x.numel()) if isinstance(x, Tensor) and not func.is_view else self.most
        return result


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_memory_does_not_grow_with_the_rois(interpolation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_roi_align, "ENTRIES_AT_ONCE", 40_000)
    maps = torch.randn(1, 1, 30, 30)
    for count in (200, 800):
        found = torch.tensor([[0, 1.0, 1, 25, 25]]).repeat(count, 1)
        with Peak() as peak:
            results(
                [maps],
                lambda x, rois=found: ops.roi_align(x[0], rois, 7, 1.0, 2, interpolation=interpolation, impl="torch"),
            )
        assert peak.most < 2 * torch_roi_align.ENTRIES_AT_ONCE


def test_chosen_where_values_can_be_read() -> None:
    """On a CPU, for every sampler; not where tensors are traced, and have no values."""
    maps, found = torch.randn(1, 2, 8, 8), torch.tensor([[0, 1.0, 1, 5, 5]])
    for sampler in SAMPLERS:
        chosen = ops.roi_align(maps, found, 3, **sampler)
        assert torch.equal(chosen, ops.roi_align(maps, found, 3, **sampler, impl="torch"))
    with FakeTensorMode() as fake:
        assert ops.roi_align(fake.from_tensor(maps), fake.from_tensor(found), 3).shape == (1, 2, 3, 3)
