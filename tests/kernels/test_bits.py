"""Packed masks, their areas and boundaries: against NumPy, and computations on bool masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks import by_coco, eroded, masks
from strategies import DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn import ops
from fastmrcnn_kernels import numpy_bits
from fastmrcnn_kernels.library import bits as library
from fastmrcnn_kernels.reference import bits as reference

ON_HOST: list[ops.Impl] = ["reference", "numpy"]


@pytest.mark.parametrize("impl", ON_HOST)
@given(mask=masks())
def test_packing_is_packbits(impl: ops.Impl, mask: Tensor) -> None:
    bits = ops.pack_bits(mask, impl=impl)
    octets = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    expected = np.pad(octets, ((0, 0), (0, 0), (0, -octets.shape[-1] % 4))).view("<i4")
    assert bits.dtype == torch.int32
    np.testing.assert_array_equal(bits.numpy(), expected)
    areas, unpacked = ops.count_bits(bits, impl=impl), ops.unpack_bits(bits, mask.shape[-1], impl=impl)
    assert (areas.dtype, unpacked.dtype) == (torch.int64, torch.bool)
    assert torch.equal(areas, mask.sum(dim=(1, 2)))
    assert torch.equal(unpacked, mask)


@pytest.mark.parametrize("impl", ON_HOST)
def test_packing_of_other_shapes(impl: ops.Impl) -> None:
    """Nothing before the rows, much before them, strides, and no pixels."""
    mask = torch.rand(2, 3, 50, 5, generator=torch.Generator().manual_seed(0)).transpose(2, 3) < 0.5
    for found in (mask, mask[0, 0], mask[:, :0], mask[..., :0], mask[..., :0, :]):
        bits = ops.pack_bits(found, impl=impl)
        assert bits.shape == (*found.shape[:-1], -(-found.shape[-1] // 32))
        assert torch.equal(ops.unpack_bits(bits, found.shape[-1], impl=impl), found)
        assert torch.equal(ops.count_bits(bits, impl=impl), found.sum(dim=(-2, -1)))
    turned = ops.pack_bits(mask[0], impl=impl).transpose(0, 1)
    assert torch.equal(ops.unpack_bits(turned, 50, impl=impl), mask[0].transpose(0, 1))
    apart = turned.repeat_interleave(2, dim=2)[..., ::2]
    assert torch.equal(ops.unpack_bits(apart, 50, impl=impl), mask[0].transpose(0, 1))
    assert torch.equal(ops.count_bits(apart, impl=impl), ops.count_bits(turned, impl=impl))


@given(mask=masks(), distance=st.one_of(st.integers(0, 4), st.sampled_from([15, 16, 31, 32, 33, 70, 1000])))
def test_boundary_is_what_erosion_takes(mask: Tensor, distance: int) -> None:
    inside = eroded(mask, min(distance, 100))
    bits = ops.pack_bits(mask)
    assert torch.equal(reference.erode(bits, distance), ops.pack_bits(inside))
    assert torch.equal(ops.mask_boundary(bits, distance), ops.pack_bits(mask & ~inside))


@pytest.mark.parametrize("distance", range(40))
def test_boundary_of_a_large_mask(distance: int) -> None:
    """Windows over several words, in which something is left."""
    mask = torch.ones(1, 90, 150, dtype=torch.bool)
    mask[0, 80, 140] = False
    inside = eroded(mask, distance)
    assert inside.any()
    assert torch.equal(ops.mask_boundary(ops.pack_bits(mask), distance), ops.pack_bits(mask & ~inside))


@pytest.mark.parametrize(("size", "distance"), [((480, 640), 16), ((10, 10), 1), ((800, 1333), 31), ((33, 77), 2)])
def test_boundary_iou(size: tuple[int, int], distance: int) -> None:
    """At 2 % of the diagonal unless said otherwise."""
    mask = torch.zeros(3, *size, dtype=torch.bool)
    mask[0, : size[0] // 2] = mask[1, :, : size[1] // 2] = mask[2, 3:-3, 3:-3] = True
    bits, crowd = ops.pack_bits(mask), torch.tensor([True, False, True])
    for used, given_distance in ((distance, None), (3, 3)):
        boundaries = mask & ~eroded(mask, used)
        found = ops.boundary_iou(bits, bits, size[1], given_distance, crowd=crowd)
        assert torch.equal(found, by_coco(boundaries, boundaries, crowd))


def test_count_of_older_numpy() -> None:
    words = np.random.default_rng(0).integers(1 << 64, size=(3, 5), dtype=np.uint64)
    expected = [sum(int(w).bit_count() for w in row) for row in words]
    assert numpy_bits.count_by_table(words).sum(axis=1).tolist() == expected
    assert numpy_bits.count(words).sum(axis=1).tolist() == expected


@pytest.mark.parametrize("run", [reference.mask_iou, library.mask_iou])
def test_fake_tensors(run: Any) -> None:
    """No value is read: shapes depend on shapes alone."""
    with FakeTensorMode(), torch.device("cuda"):
        bits = reference.pack_bits(torch.ones(4, 5, 70, dtype=torch.bool))
        near = reference.mask_boundary(bits, 20)
        found = run(bits, near[:3], torch.ones(3, dtype=torch.bool))
        mask = reference.unpack_bits(near, 70)
    assert bits.shape == near.shape == (4, 5, 3)
    assert (mask.shape, mask.dtype, mask.device.type) == ((4, 5, 70), torch.bool, "cuda")
    assert (found.shape, found.dtype, found.device.type) == ((4, 3), torch.float32, "cuda")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks(impl: ops.Impl) -> None:
    def overlaps(mask: Tensor) -> Tensor:
        bits = ops.pack_bits(mask)
        return ops.boundary_iou(bits, bits, mask.shape[-1], 2, impl=impl) + ops.unpack_bits(bits, 70).sum()

    mask = torch.rand(3, 9, 70, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) < 0.9
    compiled = torch.compile(overlaps, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(mask), overlaps(mask))


BITS = torch.zeros(2, 5, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_bits(torch.zeros(2, 5, 70)), TypeError, "mask: expected torch.bool"),
        (lambda: ops.pack_bits(torch.zeros(5, dtype=torch.bool)), ValueError, "mask: expected shape"),
        (lambda: ops.pack_bits([True]), TypeError, "mask: expected a Tensor"),
        (lambda: ops.unpack_bits(BITS, 64), ValueError, "width=64: expected"),
        (lambda: ops.unpack_bits(BITS, 97), ValueError, "width=97: expected"),
        (lambda: ops.unpack_bits(BITS.long(), 70), TypeError, "bits: expected torch.int32"),
        (lambda: ops.count_bits(BITS.long()), TypeError, "bits: expected torch.int32"),
        (lambda: ops.mask_iou(BITS.bool(), BITS), TypeError, "a: expected torch.int32"),
        (lambda: ops.mask_iou(BITS, BITS[:, :4]), ValueError, "b: expected shape"),
        (lambda: ops.mask_iou(BITS, BITS, crowd=torch.zeros(2)), TypeError, "crowd: expected torch.bool"),
        (lambda: ops.mask_iou(BITS, BITS, crowd=torch.zeros(3).bool()), ValueError, "crowd: expected shape"),
        (lambda: ops.mask_boundary(BITS, -1), ValueError, "distance=-1: expected"),
        (lambda: ops.boundary_iou(BITS, BITS, 30), ValueError, "width=30: expected"),
    ],
)
def test_refuses(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
