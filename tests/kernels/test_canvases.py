"""What lies beyond the canvases of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, examples
from torch import Tensor

from fastmrcnn import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Maps in some memory format, canvases that fill some of them, none, or all, and a stride."""
    images, channels = draw(st.integers(0, 3)), draw(st.sampled_from([1, 3, 8, 20]))
    height, width, stride = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 4, 32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    maps = torch.randn(images, channels, height, width, generator=generator).to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "slice"]))
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        maps = torch.cat((maps, maps), dim=1).contiguous(memory_format=torch.channels_last)[:, :channels]
    limit = torch.tensor([height, width]) * stride
    canvases = (torch.rand(images, 2, generator=generator) * 1.3 * limit).to(torch.int64).minimum(limit)
    return maps.to(DEVICE), canvases.to(DEVICE), stride


def copied(maps: Tensor) -> Tensor:
    """The same, with its strides and what lies between."""
    return torch.empty_strided(maps.shape, maps.stride(), dtype=maps.dtype, device=maps.device).copy_(maps)


@given(case=batches(), value=st.sampled_from([0.0, -torch.inf, 1.5]))
@examples(100, interpreted=25)
def test_clear_beyond_equals_the_reference(case: tuple[Tensor, Tensor, int], value: float) -> None:
    maps, canvases, stride = case
    found, expected = copied(maps), copied(maps)
    assert ops.clear_beyond_(found, canvases, stride, value, impl="triton") is found
    ops.clear_beyond_(expected, canvases, stride, value, impl="reference")
    assert torch.equal(found, expected)


@given(case=batches(), value=st.sampled_from([0.0, -torch.inf]))
def test_reference_cell_by_cell(case: tuple[Tensor, Tensor, int], value: float) -> None:
    maps, canvases, stride = (x.cpu() if isinstance(x, Tensor) else x for x in case)
    cleared = maps.clone()
    for n, canvas in enumerate(canvases.tolist()):
        rows, columns = (-(-side // stride) for side in canvas)
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                if y >= rows or x >= columns:
                    cleared[n, :, y, x] = value
    assert torch.equal(ops.clear_beyond_(maps.clone(), canvases, stride, value, impl="reference"), cleared)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_slices_leave_their_neighbours_alone(impl: Any) -> None:
    maps = torch.ones(2, 16, 5, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    canvases = torch.tensor([[8, 8], [20, 4]], device=DEVICE)
    ops.clear_beyond_(maps[:, 3:8], canvases, 4, impl=impl)
    assert maps[:, :3].min() == maps[:, 8:].min() == 1
    assert maps[:, 3:8].sum() == 5 * (2 * 2 + 5 * 1)


def test_opcheck() -> None:
    maps, canvases = torch.randn(2, 8, 4, 5, device=DEVICE), torch.tensor([[4, 9], [16, 20]], device=DEVICE)
    torch.library.opcheck(torch.ops.fastmrcnn.clear_beyond_, (maps, canvases, 4, 0.0))


def test_bad_arguments() -> None:
    maps, canvases = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"maps: expected shape"):
        ops.clear_beyond_(maps[0], canvases, 4)
    with pytest.raises(ValueError, match=r"canvases: expected shape \[2, 2\]"):
        ops.clear_beyond_(maps, canvases[:1], 4)
    with pytest.raises(TypeError, match=r"canvases: expected torch\.int64"):
        ops.clear_beyond_(maps, canvases.float(), 4)
    with pytest.raises(ValueError, match="stride=0"):
        ops.clear_beyond_(maps, canvases, 0)
