"""Overlaps of packed masks: against pycocotools and computations on bool masks; the kernel against the reference."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from masks import by_coco, many, masks
from pycocotools import mask as coco
from strategies import DEVICE, examples
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels import numpy_bits
from fastmrcnn_kernels.reference import bits as reference

ON_HOST: list[ops.Impl] = ["reference", "numpy"]
EVERYWHERE: list[ops.Impl] = [*ON_HOST, "triton"]
FIXTURES = SHARED / "data" / "cocoeval_fixtures"


class Pairs(NamedTuple):
    """Two lists of masks of one size, and which of the second are crowds."""

    a: Tensor
    b: Tensor
    crowd: Tensor | None


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    a = draw(masks())
    b = draw(masks(size=(a.shape[1], a.shape[2])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    crowd = torch.rand(len(b), generator=generator) < 0.5
    return Pairs(a, b, draw(st.sampled_from([None, crowd])))


def packed(case: Pairs) -> tuple[Tensor, Tensor, Tensor | None]:
    return reference.pack_bits(case.a), reference.pack_bits(case.b), case.crowd


def iou(impl: ops.Impl, a: Tensor, b: Tensor, crowd: Tensor | None = None) -> Tensor:
    device = DEVICE if impl == "triton" else "cpu"
    crowd = None if crowd is None else crowd.to(device)
    return ops.mask_iou(a.to(device), b.to(device), crowd=crowd, impl=impl).cpu()


def by_definition(case: Pairs) -> Tensor:
    """Of bool masks, in double precision: rounded once more, a quotient of integers below 2^24 is still correct."""
    a, b = case.a[:, None], case.b[None]
    union = (a | b).sum(dim=(2, 3))
    if case.crowd is not None:
        union = torch.where(case.crowd, a.sum(dim=(2, 3)), union)
    return ((a & b).sum(dim=(2, 3)).double() / union.clamp(min=1)).float()


@pytest.mark.parametrize("impl", ON_HOST)
@given(case=pairs())
def test_overlaps_are_the_definition(impl: ops.Impl, case: Pairs) -> None:
    found = iou(impl, *packed(case))
    assert found.dtype == torch.float32
    assert torch.equal(found, by_definition(case))


@examples(200, interpreted=25)
@given(case=pairs())
def test_kernel_equals_reference(case: Pairs) -> None:
    assert torch.equal(iou("triton", *packed(case)), iou("reference", *packed(case)))


@pytest.mark.parametrize("impl", EVERYWHERE)
@examples(100, interpreted=15)
@given(a=masks(3, (17, 50)), b=masks(5, (17, 50)), crowd=st.sampled_from([None, torch.arange(5) % 2 == 0]))
def test_overlaps_are_those_of_pycocotools(impl: ops.Impl, a: Tensor, b: Tensor, crowd: Tensor | None) -> None:
    assert torch.equal(iou(impl, *packed(Pairs(a, b, crowd))), by_coco(a, b, crowd))


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_overlaps_by_hand(impl: ops.Impl) -> None:
    """Of a row of 40 pixels: none, all, the first 30, and the 20 in the middle."""
    place = torch.arange(40)
    mask = torch.stack((place < 0, place < 40, place < 30, (place >= 10) & (place < 30)))[:, None]
    expected = torch.tensor([[0, 0, 0, 0], [0, 1, 0.75, 0.5], [0, 0.75, 1, 2 / 3], [0, 0.5, 2 / 3, 1]])
    bits = ops.pack_bits(mask)
    assert torch.equal(iou(impl, bits, bits), expected)
    crowd = torch.tensor([True, True, False, False])
    expected[:, :2] = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1]])
    assert torch.equal(iou(impl, bits, bits, crowd), expected)
    assert iou(impl, bits, bits, crowd)[:, :2].any(dim=1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_overlaps_of_nothing(impl: ops.Impl) -> None:
    for count_a, count_b, *size in [(0, 3, 5, 2), (3, 0, 5, 2), (0, 0, 5, 2), (2, 3, 0, 2), (2, 3, 5, 0)]:
        a, b = (torch.ones(count, *size, dtype=torch.int32) for count in (count_a, count_b))
        for crowd in (None, torch.ones(count_b, dtype=torch.bool)):
            assert torch.equal(iou(impl, a, b, crowd), torch.zeros(count_a, count_b))


@pytest.mark.parametrize(("programs", "counts"), [(1, (9, 3)), (7, (8, 8)), (1024, (7, 16))])
def test_work_is_shared(programs: int, counts: tuple[int, int]) -> None:
    """Between programs, whole steps each, that add to the same counts."""
    a, b = (many(count, 40, 1000) for count in counts)
    with patch("fastmrcnn_kernels.triton.mask_iou.PROGRAMS", programs):
        assert torch.equal(iou("triton", a, b), iou("reference", a, b))


@pytest.mark.parametrize("limit", [1, 5000])
def test_a_part_of_the_pixels_at_a_time(limit: int) -> None:
    a, b = many(5, 9, 100), many(4, 9, 100)
    expected = iou("reference", a, b)
    with patch.object(reference, "PIXELS_AT_A_TIME", limit), patch.object(numpy_bits, "WORDS_AT_A_TIME", limit // 100):
        assert torch.equal(iou("reference", a, b), expected)
        assert torch.equal(iou("numpy", a, b), expected)


def test_more_pixels_than_floats_can_count() -> None:
    """Counts above 2^24 are exact; to be divided, they are rounded.  The interpreter takes them in longer steps."""
    mask = torch.ones(2, 4099, 4099, dtype=torch.bool)
    mask[1, 3, :5000:7] = False
    bits = ops.pack_bits(mask)
    areas = mask.sum(dim=(1, 2))
    assert torch.equal(ops.count_bits(bits), areas)
    expected = torch.ones(2, 2)
    expected[0, 1] = expected[1, 0] = areas[1].float() / areas[0].float()
    assert expected[0, 1] < 1
    words = patch("fastmrcnn_kernels.triton.mask_iou.WORDS", 1 << 14 if DEVICE == "cpu" else 128)
    for impl in EVERYWHERE:
        with words:
            assert torch.equal(iou(impl, bits, bits), expected), impl


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_overlaps_of_strided_bits(impl: ops.Impl) -> None:
    a, b, crowd = many(12, 9, 100)[1::2], many(5, 9, 100), torch.tensor([True, True, False, True, False] * 2)[::2]
    apart = b.transpose(0, 2).contiguous().transpose(0, 2)
    assert not any(x.is_contiguous() for x in (a, apart, crowd))
    assert torch.equal(iou(impl, a, apart, crowd), iou(impl, a.contiguous(), b, crowd.contiguous()))


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"COCO's annotations are not at {FIXTURES}")
def test_overlaps_of_real_annotations() -> None:
    """All pairs of an image's, as pycocotools has them of the run lengths."""
    rle_of = {rle["id"]: rle for rle in json.loads((FIXTURES / "expected_rle.json").read_text())}
    images = defaultdict(list)
    for annotation in json.loads((FIXTURES / "instances_val2014_100.json").read_text())["annotations"]:
        images[annotation["image_id"]].append(annotation)
    for of_image in images.values():
        rles = [rle_of[annotation["id"]] for annotation in of_image]
        crowd = [annotation["iscrowd"] for annotation in of_image]
        bits = ops.pack_bits(torch.from_numpy(coco.decode(rles)).permute(2, 0, 1).bool())
        expected = torch.from_numpy(coco.iou(rles, rles, crowd)).float()
        assert torch.equal(ops.mask_iou(bits, bits, crowd=torch.tensor(crowd).bool()), expected)
    assert sum(map(len, images.values())) == 839


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_autocast_leaves_counts_alone(impl: ops.Impl) -> None:
    bits = many(5, 40, 100)
    expected = iou(impl, bits, bits)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(iou(impl, bits, bits), expected)


@pytest.mark.parametrize("crowded", [False, True])
def test_opcheck(crowded: bool) -> None:
    a, b = many(3, 4, 40).to(DEVICE), many(2, 4, 40).to(DEVICE)
    crowd = torch.tensor([True, False], device=DEVICE) if crowded else None
    torch.library.opcheck(torch.ops.fastmrcnn.mask_iou.default, (a, b, crowd))
