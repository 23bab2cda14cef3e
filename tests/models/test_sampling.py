"""Matching and sampling against torchvision's classes."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

from fastmrcnn import TargetBatch
from fastmrcnn.models.sampling import match, sample


def grid_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes on a coarse grid, so that IoUs tie."""
    start = torch.randint(0, 6, (count, 2), generator=generator)
    return torch.cat((start, start + torch.randint(1, 5, (count, 2), generator=generator)), dim=1).float() * 8


@given(
    seed=st.integers(0, 10_000),
    objects=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    boxes=st.integers(1, 40),
    low_quality=st.booleans(),
    thresholds=st.sampled_from([(0.5, 0.5), (0.7, 0.3), (0.25, 0.2)]),
)
def test_match(seed: int, objects: list[int], boxes: int, low_quality: bool, thresholds: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    high, low = thresholds
    matcher = Matcher(high, low, allow_low_quality_matches=low_quality)
    slots = max(1, *objects)
    targets = TargetBatch(
        torch.full((len(objects), slots, 4), torch.nan),
        torch.ones(len(objects), slots, dtype=torch.int64),
        torch.tensor(objects),
    )
    candidates = grid_boxes(boxes, generator)
    for i, count in enumerate(objects):
        targets.boxes[i, :count] = grid_boxes(count, generator)
    found = match(targets, candidates[None], matcher)
    for i, count in enumerate(objects):
        if count == 0:
            assert (found[i] == Matcher.BELOW_LOW_THRESHOLD).all()
        else:
            expected = matcher(box_iou(targets.boxes[i, :count], candidates))
            assert torch.equal(found[i], expected)


@given(
    seed=st.integers(0, 10_000),
    positives=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    negatives=st.integers(0, 60),
    batch=st.integers(1, 120),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_sample_counts(seed: int, positives: list[int], negatives: int, batch: int, fraction: float) -> None:
    torch.manual_seed(seed)
    ignored = 100 - negatives - max(positives)
    labels = torch.stack(
        [
            torch.cat((torch.full((p,), 3), torch.zeros(negatives), torch.full((ignored + max(positives) - p,), -1.0)))
            for p in positives
        ]
    ).long()[:, torch.randperm(100)]
    sampler = BalancedPositiveNegativeSampler(batch, fraction)
    samples = sample(labels, sampler)
    expected_positives, expected_negatives = sampler(list(labels))
    for i, label in enumerate(labels):
        chosen = samples.indices[i][samples.valid[i]]
        assert len(chosen.unique()) == len(chosen)
        picked = label[chosen]
        count = int((picked > 0).sum())
        assert count == int(expected_positives[i].sum())
        assert int((picked == 0).sum()) == int(expected_negatives[i].sum())
        assert (picked[:count] > 0).all()
        assert count <= samples.positives
    # Where the host must not look, slots are as many as can be used, and the same ones are.
    torch.manual_seed(0)
    trimmed = sample(labels, sampler)
    torch.manual_seed(0)
    with patch("fastmrcnn.models.sampling.on_host", lambda _: False):
        fixed = sample(labels, sampler)
    used = trimmed.valid.shape[1]
    assert fixed.indices.shape == fixed.valid.shape == (len(labels), min(batch, 100))
    assert fixed.positives == min(int(batch * fraction), 100)
    assert ((fixed.indices >= 0) & (fixed.indices < 100)).all()
    assert torch.equal(fixed.valid[:, :used], trimmed.valid)
    assert not fixed.valid[:, used:].any()
    assert torch.equal(fixed.indices[:, :used][trimmed.valid], trimmed.indices[trimmed.valid])


def test_sample_is_uniform() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([1] * 8 + [0] * 12).repeat(4_000, 1)
    samples = sample(labels, BalancedPositiveNegativeSampler(8, 0.5))
    chosen = torch.zeros(labels.shape).scatter_add(1, samples.indices, samples.valid.float()).mean(dim=0)
    assert (chosen[:8] - 4 / 8).abs().max() < 0.05
    assert (chosen[8:] - 4 / 12).abs().max() < 0.05
