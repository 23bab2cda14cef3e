"""From the outputs of an RPN head to proposals: anchors, top-k, decoding, clipping, suppression.

torchvision's way is what its RPN does after its head.  "filter alone" leaves out its anchors and its decoding of all of
them, to which our time is compared if it is the shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torchvision.models.detection.rpn as torchvision_rpn
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from benchmarks.inputs import HEAD_STRIDES, PHOTO, SMALL, head_outputs, leave_out
from benchmarks.measure import device_name
from fastmrcnn import ops
from fastmrcnn.batches import ImageBatch, ProposalBatch
from fastmrcnn.models.adopt import adopt
from fastmrcnn.models.rpn import RegionProposalNetwork
from fastmrcnn_kernels.reference.boxes import pairwise_iou
from fastmrcnn_kernels.reference.topk import stable_topk

Proposals = list[tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """A batch of images, how many boxes per level enter suppression, and where high scores are."""

    images: int
    slots: int
    clustered: bool
    size: tuple[int, int] = PHOTO

    def __str__(self) -> str:
        scores = "clustered" if self.clustered else "sparse"
        return f"{self.images} x {self.slots} per level, {scores}, {self.size[0]}x{self.size[1]}"


CASES = [Case(n, slots, c) for n in (1, 2, 8) for slots in (1000, 2000) for c in (False, True)]
CASES += [Case(1, 1000, True, SMALL)]
CONTENDERS = [
    ("fastmrcnn", "ours", torch.float32),
    ("fastmrcnn", "ours", torch.float16),
    ("torchvision", "shipped", torch.float32),
    ("torchvision filter alone", "tuned", torch.float32),
]


def networks(case: Case) -> tuple[nn.Module, RegionProposalNetwork]:
    """torchvision's RPN and ours, without a head."""
    both = []
    for _ in range(2):
        anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
        top = {"training": case.slots, "testing": case.slots}
        both.append(torchvision_rpn.RegionProposalNetwork(anchors, nn.Identity(), 0.7, 0.3, 256, 0.5, top, top, 0.7))
    return both[0].eval(), adopt(both[1], RegionProposalNetwork).eval()


def by_torchvision(
    network: nn.Module, case: Case, images: Tensor, logits: Sequence[Tensor], deltas: Sequence[Tensor], *, alone: bool
) -> Callable[[], Proposals]:
    """Function that makes proposals as torchvision's RPN does."""
    image_list = ImageList(images, [case.size] * case.images)
    counts = [x[0].numel() for x in logits]

    def decode() -> tuple[Tensor, Tensor]:
        anchors = network.anchor_generator(image_list, list(logits))
        objectness, regression = torchvision_rpn.concat_box_prediction_layers(list(logits), list(deltas))
        boxes = network.box_coder.decode(regression.detach(), anchors).view(case.images, -1, 4)
        return boxes, objectness

    def select(boxes: Tensor, objectness: Tensor) -> Proposals:
        found, scores = network.filter_proposals(boxes, objectness, image_list.image_sizes, counts)
        return list(zip(found, scores, strict=True))

    if alone:
        decoded = decode()
        return lambda: select(*decoded)
    return lambda: select(*decode())


def as_lists(batch: ProposalBatch) -> Proposals:
    """One pair of boxes and scores per image."""
    return [(x[:n], s[:n]) for x, s, n in zip(batch.boxes, batch.scores, batch.count.tolist(), strict=True)]


@pytest.mark.parametrize(("name", "role", "dtype"), CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_proposals(case: Case, name: str, role: str, dtype: torch.dtype, timed: Callable[..., None]) -> None:
    leave_out("proposals", case.size, dtype)
    logits, deltas = head_outputs(case.images, case.size, dtype, clustered=case.clustered)
    height, width = (side * HEAD_STRIDES[0] for side in logits[0].shape[-2:])
    images = torch.empty(case.images, 3, height, width, device=device_name())
    theirs, ours = networks(case)
    batch = ImageBatch(images, torch.tensor([case.size] * case.images, device=device_name()))
    wide = [[x.float() for x in values] for values in (logits, deltas)]
    expected = by_torchvision(theirs, case, images, *wide, alone=False)()

    def check(found: ProposalBatch | Proposals) -> None:
        lists = as_lists(found) if isinstance(found, ProposalBatch) else found
        for (boxes, scores), (other, _) in zip(lists, expected, strict=True):
            assert (scores.diff() <= 0).all()
            same = pairwise_iou(boxes, other) > 0.99
            agreed = min(same.any(dim=0).float().mean(), same.any(dim=1).float().mean())
            assert agreed > 0.98, f"only {agreed:.1%} of the proposals agree"

    def by_us() -> ProposalBatch:
        return ours.propose(batch, logits, deltas)

    their_way = by_torchvision(theirs, case, images, logits, deltas, alone=role == "tuned")
    with torch.inference_mode():
        selected = case.images * len(logits) * case.slots
        timed(
            by_us if role == "ours" else their_way,
            check,
            op="proposals",
            case=str(case),
            contender=f"{name} {str(dtype).removeprefix('torch.')}",
            role=role,
            least_bytes=(sum(x.numel() for x in logits) + 4 * selected) * dtype.itemsize
            + case.images * case.slots * 20,
        )


def topk_of_a_padded_view(logits: Sequence[Tensor], k: int, *, by_sorting: bool) -> tuple[Tensor, Tensor]:
    """Top-k of all levels in one call of PyTorch, on a copy [N, L, most anchors] padded with -inf."""
    flat = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits]
    padded = flat[0].new_full((len(flat[0]), len(flat), max(x.shape[1] for x in flat)), -torch.inf)
    for i, level in enumerate(flat):
        padded[:, i, : level.shape[1]] = level
    if by_sorting:
        scores, indices = (x[..., :k] for x in padded.sort(dim=-1, descending=True, stable=True))
    else:
        scores, indices = stable_topk(padded, k)
    return scores, torch.where(scores == -torch.inf, -1, indices)


SELECTIONS: list[tuple[str, str, Callable[..., tuple[Tensor, Tensor]]]] = [
    ("fastmrcnn", "ours", ops.topk_anchors),
    ("torch.topk per level", "reference", lambda logits, k: ops.topk_anchors(logits, k, impl="reference")),
    ("torch.topk padded", "tuned", lambda logits, k: topk_of_a_padded_view(logits, k, by_sorting=False)),
    ("torch.sort padded", "tuned", lambda logits, k: topk_of_a_padded_view(logits, k, by_sorting=True)),
]


@pytest.mark.parametrize(("name", "role", "select"), SELECTIONS, ids=[x[0] for x in SELECTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [case for case in CASES if case.clustered], ids=str)
def test_topk(
    case: Case,
    dtype: torch.dtype,
    name: str,
    role: str,
    select: Callable[..., tuple[Tensor, Tensor]],
    timed: Callable[..., None],
) -> None:
    leave_out("topk_anchors", case.size, dtype)
    logits, _ = head_outputs(case.images, case.size, dtype, clustered=True)

    def check(found: tuple[Tensor, Tensor]) -> None:
        for a, b in zip(found, ops.topk_anchors(logits, case.slots, impl="reference"), strict=True):
            assert torch.equal(a, b)

    timed(
        lambda: select(logits, case.slots),
        check,
        op="topk_anchors",
        case=f"{case}, {str(dtype).removeprefix('torch.')}",
        contender=name,
        role=role,
        least_bytes=sum(x.nbytes for x in logits) + case.images * len(logits) * case.slots * 12,
    )
