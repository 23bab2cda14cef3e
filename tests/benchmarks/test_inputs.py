"""The counts of cells and bins against gradients of torchvision's RoIAlign, which say what depends on what."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.bench_nms import THRESHOLD, assert_is_nms, rounding_when_moved
from benchmarks.inputs import (
    PHOTO,
    SCALES,
    Pooling,
    bins_of_tiles,
    cells_of_rois,
    cells_read,
    head_outputs,
    pyramid,
    random_rois,
    scored_boxes,
)
from fastmrcnn_kernels.reference.roi_align import assign_levels

CASE = Pooling(2, 6, 3, (250, 300))


def dependences(maps: list[Tensor], rois: Tensor, bins: int) -> list[Tensor]:
    """For each level, which cells of it each bin depends on: bool [R, bins^2, N, H, W]."""
    levels = assign_levels(rois[:, 1:], len(maps), 2, 224, 4)
    result = []
    for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
        leaf = torch.ones_like(feature[:, :1]).requires_grad_()
        pooled = torchvision.ops.roi_align(leaf, rois, bins, scale, 2) * (levels == level)[:, None, None, None]
        one_by_one = [torch.autograd.grad(b, leaf, retain_graph=True)[0][:, 0] != 0 for b in pooled.flatten()]
        result.append(torch.stack(one_by_one).unflatten(0, (len(rois), -1)))
    return result


def test_counts() -> None:
    maps, rois = pyramid(CASE, torch.float32), random_rois(CASE)
    found = dependences(maps, rois, CASE.bins)
    assert sum(int(x.any(dim=(1, 2, 3, 4)).any()) for x in found) > 1  # several levels have RoIs
    assert cells_read(maps, rois, CASE.bins) == sum(int(x.any(dim=1).any(dim=0).sum()) for x in found)
    assert cells_of_rois(maps, rois, CASE.bins) == sum(int(x.any(dim=1).sum()) for x in found)
    for tile in (4, 8):
        expected = 0
        for depends in found:
            for y, x in product(range(0, depends.shape[3], tile), range(0, depends.shape[4], tile)):
                expected += int(depends[..., y : y + tile, x : x + tile].any(dim=(3, 4)).sum())
        assert bins_of_tiles(maps, rois, CASE.bins, tile) == expected


def test_inputs_are_those_of_a_detector() -> None:
    maps, rois = pyramid(Pooling(2, 50, 7), torch.bfloat16), random_rois(Pooling(2, 50, 7))
    assert [tuple(x.shape) for x in maps] == [
        (2, 256, 200, 336),
        (2, 256, 100, 168),
        (2, 256, 50, 84),
        (2, 256, 25, 42),
    ]
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    assert rois[:, 0].tolist() == [0] * 50 + [1] * 50
    assert (rois[:, 1:] >= 0).all()
    assert (rois[:, 3] <= 1333).all()
    assert (rois[:, 4] <= 800).all()
    assert (rois[:, 3:] > rois[:, 1:3]).all()
    assert len(assign_levels(rois[:, 1:], 4, 2, 224, 4).unique()) == 4


@pytest.mark.parametrize("clustered", [False, True])
def test_head_outputs_are_those_of_a_detector(clustered: bool) -> None:
    logits, deltas = head_outputs(2, PHOTO, torch.float16, clustered=clustered)
    assert [tuple(x.shape) for x in logits] == [
        (2, 3, 200, 336),
        (2, 3, 100, 168),
        (2, 3, 50, 84),
        (2, 3, 25, 42),
        (2, 3, 13, 21),
    ]
    assert [x.shape[1] for x in deltas] == [12] * 5
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*logits, *deltas))
    best = logits[0].flatten(1).float().topk(1000).indices % (200 * 336)  # cells
    rows = [len((image // 336 // 10).unique()) for image in best]
    columns = [len((image % 336 // 10).unique()) for image in best]
    assert all((r < 20 or c < 33) if clustered else r == 20 for r, c in zip(rows, columns, strict=True))


def test_boxes_in_clusters_overlap_more() -> None:
    sparse, clustered = (torchvision.ops.nms(*scored_boxes(1000, clustered=c), THRESHOLD) for c in (False, True))
    assert 20 <= len(clustered) < 500 < len(sparse) < 1000


def test_check_of_nms_finds_mistakes() -> None:
    boxes, scores = (x.cpu() for x in scored_boxes(300, clustered=True))
    groups = torch.arange(300) % 2
    kept = torchvision.ops.batched_nms(boxes, scores, groups, THRESHOLD)
    assert_is_nms(kept, boxes, scores, groups)
    with pytest.raises(AssertionError, match="overlaps another one"):
        assert_is_nms(kept, boxes, scores, groups * 0)
    with pytest.raises(AssertionError, match="overlaps none"):
        assert_is_nms(kept[:-1], boxes, scores, groups)
    with pytest.raises(AssertionError):
        assert_is_nms(kept.flip(0), boxes, scores, groups)


def test_check_of_nms_allows_for_boxes_that_were_moved() -> None:
    """Two boxes whose overlap torchvision rounds below the threshold among 80 groups; and mistakes are found still."""
    boxes, scores = (x.cpu() for x in scored_boxes(300, clustered=True))
    groups = torch.randint(0, 80, (300,), generator=torch.Generator().manual_seed(1))
    groups[-2:] = 79
    boxes[-2:] = torch.tensor([[900.0, 900, 920, 920], [900, 900, 920, 910 + 1e-4]])
    scores[-2:] = torch.tensor([3.0, 2.0])
    kept = torchvision.ops.batched_nms(boxes, scores, groups, THRESHOLD)
    band = rounding_when_moved(boxes, 80)
    assert 0 < band < 0.01
    with pytest.raises(AssertionError, match="overlaps another one"):
        assert_is_nms(kept, boxes, scores, groups)
    assert_is_nms(kept, boxes, scores, groups, band)
    with pytest.raises(AssertionError, match="overlaps none"):
        assert_is_nms(kept[:-1], boxes, scores, groups, band)
