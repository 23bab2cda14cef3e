"""The selection of detections: reference and host implementation against torchvision, the kernels against both."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DEVICE, examples
from tolerances import assert_within_budget
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from fastmrcnn import ops
from fastmrcnn_kernels.reference.boxes import clip_boxes, decode_deltas, pairwise_iou
from fastmrcnn_kernels.triton import detections as triton_detections

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, in the interpreter, of NaN logits
]

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
OTHERS: list[ops.Impl] = ["torchvision", "triton"]
Selected = tuple[Tensor, Tensor, Tensor, Tensor]


class Case(NamedTuple):
    """What a box head says of a batch of images, and the images' sizes."""

    logits: Tensor
    deltas: Tensor
    proposals: Tensor
    counts: Tensor
    sizes: Tensor


def select(case: Case, impl: ops.Impl, dtype: torch.dtype | None = None, **options: Any) -> Selected:
    """Boxes, scores, labels and counts, with the head's outputs in `dtype`; torchvision's on the CPU."""
    device = "cpu" if impl == "torchvision" else DEVICE
    logits, deltas = (x if dtype is None else x.to(dtype) for x in case[:2])
    arguments = (x.to(device) for x in (logits, deltas, *case[2:]))
    return tuple(x.cpu() for x in ops.select_detections(*arguments, impl=impl, **options))


def random_case(seed: int, images: int, proposals: int, classes: int, spread: float = 2.0) -> Case:
    """Boxes of 5 .. 35 pixels in images of some 80 pixels; the second half of the images have half the proposals."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(images, proposals, 2, generator=generator) * 60
    size = 5 + torch.rand(images, proposals, 2, generator=generator) * 30
    counts = torch.where(torch.arange(images) * 2 < images, proposals, proposals // 2)
    return Case(
        torch.randn(images, proposals, classes, generator=generator) * spread,
        torch.randn(images, proposals, classes, 4, generator=generator),
        torch.cat((start, start + size), dim=2),
        counts,
        torch.tensor([[80, 90], [64, 100], [77, 33]])[:images],
    )


def by_torchvision(case: Case, **options: Any) -> list[dict[str, Tensor]]:
    """Detections of each image."""
    settings = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": 100} | options
    heads = RoIHeads(
        None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS,
        settings["score_threshold"], settings["iou_threshold"], settings["max_detections"],
    )  # fmt: skip
    used = [x[:n] for x, n in zip(case.proposals, case.counts.tolist(), strict=True)]
    logits, deltas = (
        torch.cat([x[:n].flatten(1) for x, n in zip(values, case.counts.tolist(), strict=True)])
        for values in (case.logits, case.deltas)
    )
    found = heads.postprocess_detections(logits, deltas, used, [tuple(x) for x in case.sizes.tolist()])
    return [dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*found, strict=True)]


CASES = st.builds(
    random_case,
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(2, 6),
    st.sampled_from([1.0, 3.0]),
)


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
@given(
    case=CASES,
    score_threshold=st.sampled_from([0.0, 0.05, 0.3]),
    iou_threshold=st.sampled_from([0.3, 0.5]),
    max_detections=st.sampled_from([1, 7, 100]),
)
def test_equal_to_torchvision(impl: ops.Impl, case: Case, **options: Any) -> None:
    boxes, scores, labels, count = select(case, impl, **options)
    for i, expected in enumerate(by_torchvision(case, **options)):
        number = len(expected["boxes"])
        assert count[i] == number
        for found, name in ((boxes, "boxes"), (scores, "scores"), (labels, "labels")):
            assert torch.equal(found[i, :number], expected[name]), name
            assert not found[i, number:].any()


def is_decided(case: Case, score_threshold: float, iou_threshold: float) -> bool:
    """Whether float32 cannot decide otherwise than float64: nothing is near a threshold, no two scores near each other.

    Scores are within some roundings, 1e-6, overlaps and sides of boxes within 1e-4.  Equal rows have equal scores.
    """
    scores = case.logits.double().softmax(dim=-1)[..., 1:]
    boxes = clip_boxes(
        decode_deltas(case.deltas.double(), case.proposals.double()[:, :, None], WEIGHTS)[:, :, 1:], case.sizes
    )
    for i, count in enumerate(case.counts.tolist()):
        its_scores, its_boxes = scores[i, :count], boxes[i, :count]
        gaps = its_scores.flatten().sort().values.diff()
        sides = (its_boxes[..., 2:] - its_boxes[..., :2]).flatten()
        overlaps = pairwise_iou(its_boxes.flatten(0, 1), its_boxes.flatten(0, 1))
        near = [
            (its_scores - score_threshold).abs() < 1e-6,
            (gaps > 1e-12) & (gaps < 1e-6),
            (sides - 1e-2).abs() < 1e-4,
            (overlaps - iou_threshold).abs() < 1e-4,
        ]
        if any(x.any() for x in near):
            return False
    return True


def check_kernel(case: Case, **options: Any) -> None:
    """Same decisions as the reference; boxes and scores within its error."""
    found, reference, exact = (
        select(case, "triton", **options),
        select(case, "reference", **options),
        select(case, "reference", torch.float64, **options),
    )
    assert torch.equal(found[3], reference[3])
    assert torch.equal(found[2], reference[2])
    assert_within_budget(found[0], reference[0], exact[0])
    assert_within_budget(found[1], reference[1], exact[1])


@examples(200, interpreted=25)
@given(
    case=CASES,
    score_threshold=st.sampled_from([-1.0, 0.0, 0.05, 0.3]),
    iou_threshold=st.sampled_from([0.3, 0.5]),
    max_detections=st.sampled_from([0, 1, 7, 100]),
    class_agnostic=st.booleans(),
    repeated=st.booleans(),
    chunk=st.sampled_from([8, 64, 256]),
)
def test_kernel_equals_reference(
    case: Case, score_threshold: float, iou_threshold: float, repeated: bool, chunk: int, **options: Any
) -> None:
    """Whether candidates fit one chunk or not, and with proposals that are repeated, so that scores are tied."""
    if repeated:
        case = case._replace(logits=case.logits[:, :1].expand_as(case.logits).contiguous())
    assume(is_decided(case, score_threshold, iou_threshold))
    before, triton_detections.SORTED = triton_detections.SORTED, chunk
    try:
        check_kernel(case, score_threshold=score_threshold, iou_threshold=iou_threshold, **options)
    finally:
        triton_detections.SORTED = before


@pytest.mark.parametrize("impl", ["reference", *OTHERS])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_equal_scores_by_proposal_and_class(impl: ops.Impl, class_agnostic: bool) -> None:
    """600 candidates of one score, in one place per proposal: more than a chunk, told apart by their number alone."""
    start = torch.stack((torch.arange(100) * 20.0, torch.zeros(100)), dim=1)
    boxes = torch.cat((start, start + 10), dim=1)[None]
    case = Case(
        torch.zeros(1, 100, 7), torch.zeros(1, 100, 7, 4), boxes, torch.tensor([100]), torch.tensor([[50, 5000]])
    )
    found, scores, labels, count = select(case, impl, max_detections=350, class_agnostic=class_agnostic)
    if class_agnostic:
        assert count.tolist() == [100]
        assert labels[0, :100].tolist() == [1] * 100
        assert torch.equal(found[0, :100], boxes[0])
    else:
        assert count.tolist() == [350]
        assert labels[0].tolist() == ([1, 2, 3, 4, 5, 6] * 59)[:350]
        assert torch.equal(found[0], boxes[0].repeat_interleave(6, dim=0)[:350])
    assert len(scores[0, : int(count)].unique()) == 1


@pytest.mark.parametrize("impl", ["reference", *OTHERS])
def test_a_score_exceeds_the_threshold_or_is_none(impl: ops.Impl) -> None:
    """Two equal logits make two scores of exactly one half."""
    box = torch.tensor([[[0.0, 0, 10, 10]]])
    case = Case(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 4), box, torch.tensor([1]), torch.tensor([[50, 50]]))
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    assert select(case, impl, score_threshold=0.5)[3].tolist() == [0]
    assert select(case, impl, score_threshold=below)[3].tolist() == [1]


@pytest.mark.parametrize("impl", OTHERS)
def test_a_chain_across_chunks(impl: ops.Impl) -> None:
    """400 boxes, each of which would suppress the next: every other one stays, in each class by itself."""
    x = torch.arange(400.0) * 4
    boxes = torch.stack((x, torch.zeros(400), x + 10, torch.full((400,), 10.0)), dim=1)[None]
    logits = torch.stack((torch.zeros(400), torch.linspace(3, 1, 400), torch.linspace(3, 1, 400)), dim=1)[None]
    case = Case(logits, torch.zeros(1, 400, 3, 4), boxes, torch.tensor([400]), torch.tensor([[50, 5000]]))
    found, _, labels, count = select(case, impl, max_detections=400, iou_threshold=0.4)
    assert count.tolist() == [400]
    assert labels[0].tolist() == [1, 2] * 200
    assert torch.equal(found[0, ::2], boxes[0, ::2])


@pytest.mark.parametrize("impl", ["reference", *OTHERS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_padding_changes_nothing(impl: ops.Impl, value: float) -> None:
    case = random_case(3, 3, 10, 4)
    expected = select(case, impl)
    used = torch.arange(10) < case.counts[:, None]
    garbage = [torch.where(used.view(3, 10, *(1,) * (x.dim() - 2)), x, value) for x in case[:3]]
    found = select(Case(*garbage, *case[3:]), impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", *OTHERS])
def test_hostile_values(impl: ops.Impl) -> None:
    """Scores or boxes that are NaN are no candidates, nor are boxes whose sides vanish; infinite growth is limited."""
    case = random_case(5, 1, 6, 3)
    logits, deltas = torch.zeros(1, 6, 3), torch.zeros(1, 6, 3, 4)
    logits[0, :, 1] = 5
    logits[0, 0, 2] = torch.nan
    logits[0, 1] = torch.inf
    deltas[0, 2, 1, 0] = torch.nan
    deltas[0, 3, 1, 2:] = torch.inf
    deltas[0, 4, 1, 2:] = -torch.inf
    boxes = torch.tensor([0.0, 0, 10, 10]).repeat(1, 6, 1) + torch.arange(6).view(1, 6, 1) * 12
    found, _, labels, count = select(Case(logits, deltas, boxes, case.counts, case.sizes), impl)
    assert count.tolist() == [2]
    assert labels[0, :2].tolist() == [1, 1]
    assert found[0, 0].tolist() == [0, 0, 90, 80]
    assert found[0, 1].tolist() == boxes[0, 5].tolist()


@pytest.mark.parametrize("impl", ["reference", *OTHERS])
def test_nothing_to_select_from(impl: ops.Impl) -> None:
    case = random_case(7, 2, 6, 3)
    for empty in (
        case._replace(counts=torch.zeros(2, dtype=torch.int64)),
        case._replace(logits=case.logits[..., :1], deltas=case.deltas[:, :, :1]),
        Case(*(x[:, :0] for x in case[:3]), case.counts * 0, case.sizes),
    ):
        boxes, scores, labels, count = select(empty, impl, max_detections=4)
        assert boxes.shape == (2, 4, 4)
        assert not any(x.any() for x in (boxes, scores, labels, count))
    assert select(Case(*(x[:0] for x in case)), impl, max_detections=4)[0].shape == (0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    case = random_case(9, 2, 10, 4)
    case = case._replace(logits=case.logits.to(dtype), deltas=case.deltas.to(dtype))
    wide = case._replace(logits=case.logits.float(), deltas=case.deltas.float())
    for impl in ("reference", *OTHERS):
        found = select(case, impl)
        assert found[0].dtype == found[1].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(found, select(wide, impl), strict=True))


def by_class(found: Selected) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of the first image, ordered by label, and then by where boxes are, not by scores."""
    boxes, scores, labels, _ = (x[0] for x in found)
    order = (1e6 * labels + boxes.double().sum(dim=1)).argsort()
    return boxes[order], scores[order], labels[order]


@pytest.mark.parametrize(("classes", "proposals", "score_threshold"), [(91, 4, 0.05), (1204, 1, 0.0001)])
def test_many_classes(classes: int, proposals: int, score_threshold: float) -> None:
    """COCO and LVIS, with more candidates than a chunk has; of so many scores some are as good as equal."""
    case = random_case(11, 1, proposals, classes, spread=0.4 if classes == 1204 else 2.0)
    options = {"score_threshold": score_threshold, "max_detections": 2000}
    found, reference = (select(case, impl, **options) for impl in ("triton", "reference"))
    exact = select(case, "reference", torch.float64, **options)
    assert int(reference[3]) > (1000 if classes == 1204 else 10)
    assert torch.equal(found[3], reference[3])
    assert (found[1].diff() <= 0).all()
    assert_within_budget(found[1], reference[1], exact[1])
    boxes, scores, labels = zip(*(by_class(x) for x in (found, reference, exact)), strict=True)
    assert torch.equal(labels[0], labels[1])
    assert_within_budget(*boxes)
    assert_within_budget(*scores)


def test_no_more_candidates_than_there_is_room_for() -> None:
    """Scores of a proposal add up to 1, so only so many exceed the threshold: all but the background, here."""
    for classes in range(2, 30):
        for threshold in (0.03, 0.05, 1 / 7, 0.3, 0.999):
            case = random_case(13, 1, 1, classes)
            logits = torch.zeros_like(case.logits)
            logits[..., 0] = -30.0
            boxes = torch.tensor([[[0.0, 0, 10, 10]]])
            case = case._replace(logits=logits, deltas=torch.zeros_like(case.deltas), proposals=boxes)
            expected = (logits.softmax(dim=-1)[..., 1:] > threshold).sum()
            room = triton_detections.most_candidates(classes, threshold)
            assert expected <= room <= classes - 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: programs that race")
def test_deterministic() -> None:
    case = random_case(15, 3, 1000, 91)
    expected = select(case, "triton")
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(select(case, "triton"), expected, strict=True))
