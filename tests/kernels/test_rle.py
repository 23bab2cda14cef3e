"""Run-length encodings: byte by byte what pycocotools makes of the pasted mask."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as pycocotools_mask
from strategies import DEVICE, boxes, examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fastmrcnn import ops
from fastmrcnn_kernels.library import masks as library_masks
from fastmrcnn_kernels.reference import rle

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, in the interpreter, of boxes without extent
]

IMPLEMENTATIONS: list[ops.Impl] = ["reference", "torchvision", "triton"]
FIXTURES = SHARED / "data" / "cocoeval_fixtures"
NUCLEI = SHARED / "data" / "nuclei" / "annotations" / "instances_val_mini.json"


def by_pycocotools(masks: Tensor) -> list[dict[str, Any]]:
    """RLE, area and tight box of each of the masks [D, H, W]."""
    pixels = np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8))
    rles = pycocotools_mask.encode(pixels) if len(masks) else []
    return [
        {
            "size": list(x["size"]),
            "counts": x["counts"].decode(),
            "area": int(pycocotools_mask.area(x)),
            "bbox": pycocotools_mask.toBbox(x).tolist(),
        }
        for x in rles
    ]


def check(found: ops.Encoded, masks: Tensor) -> None:
    """`found` is what pycocotools makes of `masks`."""
    expected = by_pycocotools(masks)
    assert found.rles == [{"size": x["size"], "counts": x["counts"]} for x in expected]
    assert found.areas.tolist() == [x["area"] for x in expected]
    assert found.boxes.tolist() == [x["bbox"] for x in expected]
    assert found.areas.dtype == found.boxes.dtype == torch.int64
    assert found.boxes.shape == (len(masks), 4)


def encode(masks: Tensor, found: Tensor, size: Any, *, impl: ops.Impl, **options: Any) -> Any:
    device = DEVICE if impl == "triton" else "cpu"
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return ops.encode_masks(masks.to(device), found.to(device), size, impl=impl, **options)


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """Masks [D, H, W], noise, stripes and rectangles, whose runs wrap from column to column or do not."""
    height, width = draw(st.sampled_from([(1, 1), (1, 37), (41, 1), (2, 3), (7, 40), (33, 70), (40, 33)]))
    masks = torch.zeros(draw(st.integers(0, 4)), height, width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for mask in masks:
        top, bottom = sorted((draw(st.integers(0, height)), draw(st.sampled_from([0, height // 2, height]))))
        left, right = sorted((draw(st.integers(0, width)), draw(st.sampled_from([0, width // 2, width]))))
        density = draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
        mask[top:bottom, left:right] = torch.rand(bottom - top, right - left, generator=generator) < density
    return masks


@pytest.mark.parametrize("impl", ["reference", "triton"])
@examples(200, interpreted=15)
@given(masks=images())
def test_encode_bool_equals_pycocotools(impl: ops.Impl, masks: Tensor) -> None:
    found = ops.encode_bool(masks.to(DEVICE if impl == "triton" else "cpu"), impl=impl)
    check(found, masks)
    if len(masks):
        assert torch.equal(ops.decode(found.rles), masks)


@given(masks=images())
def test_reference_equals_pycocotools(masks: Tensor) -> None:
    """As above, more often."""
    check(ops.encode_bool(masks, impl="reference"), masks)
    check(ops.encode_bool(masks.float() * -3, impl="reference"), masks)


SPECIAL = {
    "borders": torch.tensor([[0.0, 0, 40, 30]]),
    "left": torch.tensor([[-20.0, 5, 3, 25]]),
    "bottom": torch.tensor([[7.0, 9, 33, 60]]),
    "columns": torch.tensor([[7.0, -40, 33, 70]]),
    "one pixel": torch.tensor([[5.4, 3.4, 5.6, 3.6]]),
    "last pixel": torch.tensor([[39.2, 29.2, 39.4, 29.4]]),
    "nowhere": torch.tensor([[100.0, 100, 120, 130]]),
    "NaN": torch.tensor([[torch.nan, 0, 10, 10]]),
}


@pytest.mark.parametrize("semantics", ["torchvision", "detectron2"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_special_masks(impl: ops.Impl, semantics: ops.Semantics) -> None:
    """Full ones too, in boxes that touch all borders, or whose columns are full so that runs wrap."""
    found = torch.cat(list(SPECIAL.values()))
    masks = torch.ones(len(found), 5, 5)
    options: dict[str, Any] = {"semantics": semantics, "impl": impl}
    for size in ((30, 40), (1, 40), (30, 1)):
        pasted = ops.paste_masks(masks, found, size, out="bool", semantics=semantics, impl="reference")
        check(encode(masks, found, size, **options), pasted)
    full = ops.paste_masks(masks, found, (30, 40), out="bool", semantics=semantics)
    assert full.flatten(1).any(dim=1).tolist()[-2:] == [False, False]
    assert full[3, :, 10:30].all(), "columns are full"


@pytest.mark.parametrize("semantics", ["torchvision", "detectron2"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@examples(200, interpreted=8)
@given(
    found=boxes(4, extent=40.0, not_finite=True),
    cells=st.sampled_from([1, 2, 7, 28]),
    padding=st.integers(0, 2),
    size=st.sampled_from([(33, 47), (1, 70), (50, 1), (40, 33)]),
    threshold=st.sampled_from([0.25, 0.5]),
    logits=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_encode_masks_equals_pycocotools_of_the_pasted_mask(
    impl: ops.Impl,
    semantics: ops.Semantics,
    found: Tensor,
    cells: int,
    size: tuple[int, int],
    seed: int,
    **options: Any,
) -> None:
    masks = torch.rand(len(found), cells, cells, generator=torch.Generator().manual_seed(seed))
    masks = masks * 4 - 2 if options["logits"] else masks
    options |= {"semantics": semantics, "impl": impl}
    device = DEVICE if impl == "triton" else "cpu"
    pasted = ops.paste_masks(masks.to(device), found.to(device), size, out="bool", **options)
    check(encode(masks, found, size, **options), pasted.cpu())


@pytest.mark.parametrize("garbage", [torch.nan, 7.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_batch_of_images_of_different_sizes(impl: ops.Impl, garbage: float) -> None:
    sizes, count = [(20, 30), (13, 40), (20, 40)], torch.tensor([2, 3, 0])
    masks = torch.rand(3, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    start = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(1)) * 15
    used = torch.arange(3) < count[:, None]
    masks = torch.where(used[..., None, None], masks, garbage)
    found = torch.where(used[..., None], torch.cat((start, start + 17), dim=-1), garbage)
    encoded = encode(masks, found, sizes, impl=impl, count=count)
    assert len(encoded) == 3
    for i, number in enumerate(count.tolist()):
        pasted = ops.paste_masks(masks[i, :number], found[i, :number], sizes[i], out="bool", impl="reference")
        check(encoded[i], pasted)
    assert len(encode(masks, found, (20, 40), impl=impl)) == 3


@pytest.mark.parametrize("room", [0, 3])
def test_too_little_room_at_first(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is done again: with room for all that changes, and for all text."""
    masks = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    capacities = []
    launch = torch.ops.fastmrcnn.encode_bool

    def counted(masks: Tensor, capacity: int) -> Tensor:
        capacities.append(capacity)
        return launch(masks, capacity)

    monkeypatch.setattr(library_masks, "ROOM", room - 20)
    monkeypatch.setattr(torch.ops.fastmrcnn, "encode_bool", counted)
    check(ops.encode_bool(masks.to(DEVICE), impl="triton"), masks)
    assert capacities[0] == 2 * room
    assert 2 <= len(capacities) <= 3


@pytest.mark.parametrize("impl", ["torchvision", "triton"])
def test_an_image_of_thirty_megapixels(impl: ops.Impl) -> None:
    """Positions beyond 2^24, which float32 could not tell apart, in few pixels of a large image."""
    masks = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    found = torch.tensor([[5990.0, 4985, 6003, 5005], [5970, 20, 5976, 31]])
    size = (5000, 6000)
    found_rle = encode(masks, found, size, impl=impl)
    pasted = ops.paste_masks(masks, found, size, out="bool", impl="torchvision")
    check(found_rle, pasted)
    assert found_rle.areas.min() > 10


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_encode(impl: ops.Impl) -> None:
    check(encode(torch.zeros(0, 7, 7), torch.zeros(0, 4), (8, 9), impl=impl), torch.zeros(0, 8, 9))
    assert encode(torch.zeros(0, 3, 7, 7), torch.zeros(0, 3, 4), [], impl=impl) == []
    if impl != "torchvision":
        device = DEVICE if impl == "triton" else "cpu"
        check(ops.encode_bool(torch.zeros(0, 8, 9, device=device), impl=impl), torch.zeros(0, 8, 9))


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the COCO fixtures are not beside the repository")
def test_annotations_of_coco() -> None:
    """All 839: decoded, encoded again, and measured as pycocotools did, whose numbers are beside them."""
    expected = json.loads((FIXTURES / "expected_rle.json").read_text())
    records = expected if isinstance(expected, list) else list(expected.values())
    records = next((x for x in records if isinstance(x, list)), records)
    assert len(records) == 839
    for record in records:
        counts, size = record["counts"], record["size"]
        mask = ops.decode([{"size": size, "counts": counts}])
        found = ops.encode_bool(mask, impl="reference")
        assert found.rles == [{"size": size, "counts": counts}]
        assert found.areas.item() == record["area"]
        assert found.boxes[0].tolist() == record["bbox"]


@pytest.mark.skipif(not NUCLEI.is_file(), reason="the nuclei are not beside the repository")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nuclei_pasted_from_small_masks(impl: ops.Impl) -> None:
    """Real shapes: masks cut out by their boxes, 28 x 28, and pasted back."""
    coco = json.loads(NUCLEI.read_text())
    image = coco["images"][0]
    records = [x for x in coco["annotations"] if x["image_id"] == image["id"]][: 40 if impl != "triton" else 6]
    size = (image["height"], image["width"])
    masks, found = [], []
    for record in records:
        segmentation = record["segmentation"]
        if isinstance(segmentation, list):
            segmentation = pycocotools_mask.merge(pycocotools_mask.frPyObjects(segmentation, *size))
        full = ops.decode([segmentation])[0]
        x, y, w, h = (int(v) for v in ops.encode_bool(full[None]).boxes[0])
        crop = full[y : y + h, x : x + w].float()
        masks.append(functional.interpolate(crop[None, None], (28, 28), mode="bilinear")[0, 0])
        found.append([x, y, x + w, y + h])
    small, where = torch.stack(masks), torch.tensor(found).float()
    pasted = ops.paste_masks(small, where, size, out="bool", impl="reference")
    assert pasted.flatten(1).any(dim=1).all()
    check(encode(small, where, size, impl=impl), pasted)


@pytest.mark.parametrize("counts", ["", "0", "\x7f", "00P", [3, -1, 98], [99], [101], "d30"])
def test_malformed_counts(counts: str | list[int]) -> None:
    """The last is 100, and is well-formed."""
    size = [10, 10]
    if counts == "d30":
        counts = rle.as_text([np.array([100])])[0]
        assert not ops.decode([{"size": size, "counts": counts}]).any()
        return
    with pytest.raises(ValueError, match=r"rles\[0\]: its counts"):
        ops.decode([{"size": size, "counts": counts}])


def test_decode_wants_masks_of_one_size() -> None:
    one, other = ({"size": [h, 2], "counts": [2 * h]} for h in (3, 4))
    assert ops.decode([one, one]).shape == (2, 3, 2)
    with pytest.raises(ValueError, match="all of one size"):
        ops.decode([one, other])
    with pytest.raises(ValueError, match="at least one"):
        ops.decode([])


def test_the_first_step_does_not_wait() -> None:
    """Fake tensors on a GPU have no values to wait for."""
    with FakeTensorMode(), torch.device("cuda"):
        masks, found, count = torch.rand(2, 3, 28, 28), torch.rand(2, 3, 4), torch.ones(2, dtype=torch.int64)
        assert callable(ops.begin_encoding(masks, found, [(80, 100), (90, 70)], count=count))


def test_what_is_refused() -> None:
    masks, found = torch.rand(2, 3, 7, 7), torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match="sizes: expected one for each of 2 images, got 1"):
        ops.encode_masks(masks, found, [(3, 4)])
    with pytest.raises(ValueError, match=r"sizes\[1\]=\(0, 4\)"):
        ops.encode_masks(masks, found, [(3, 4), (0, 4)])
    with pytest.raises(ValueError, match=r"sizes\[0\]=\(65536, 65536\).*2\^31"):
        ops.encode_masks(masks, found, (65536, 65536))
    with pytest.raises(ValueError, match=r"size=\[\(3, 4\), \(3, 4\)\]: expected \(height, width\)"):
        ops.encode_masks(masks[0], found[0], [(3, 4), (3, 4)])
    with pytest.raises(ValueError, match="threshold=0"):
        ops.encode_masks(masks, found, (3, 4), threshold=0, semantics="detectron2")
    with pytest.raises(TypeError, match="masks: expected a Tensor"):
        ops.encode_bool(cast(Any, [[1]]))
