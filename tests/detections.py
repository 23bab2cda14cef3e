"""Whether detections of two implementations are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from tolerances import assert_within_budget
from torch import Tensor

from fastmrcnn import DetectionBatch
from fastmrcnn_kernels.reference.boxes import pairwise_iou

Found = Mapping[str, Tensor]


def as_dict(found: DetectionBatch) -> dict[str, Tensor]:
    """The tensors of a batch by their names."""
    values: dict[str, Any] = {field.name: getattr(found, field.name) for field in fields(found)}
    return {name: value for name, value in values.items() if value is not None}


def assert_same_detections(found: Found, reference: Found, oracle: Found) -> None:
    """`found` are the detections of `reference` in its order, and as near to the float64 `oracle`: twice its error.

    Some images have detections.  Slots without one are 0, but for masks and keypoints, which have no meaning there.
    """
    assert list(found) == list(reference) == list(oracle)
    assert torch.equal(found["count"], reference["count"])
    assert torch.equal(found["count"], oracle["count"])
    assert found["count"].sum() > 0
    for i, count in enumerate(found["count"].tolist()):
        ours, theirs, exact = (
            {k: v[i, :count] for k, v in x.items() if k != "count"} for x in (found, reference, oracle)
        )
        assert torch.equal(ours["labels"], theirs["labels"])
        order = twins(theirs, exact)
        for name, values in ours.items():
            if values.is_floating_point():
                assert_within_budget(values, theirs[name], exact[name][order])
        assert not any(found[name][i, count:].any() for name in ("boxes", "scores", "labels"))


def twins(a: Found, b: Found) -> Tensor:
    """Which detection of `b` each of `a` is, one by one: rounding may have changed places of equal scores."""
    same = pairwise_iou(a["boxes"].double(), b["boxes"]) * (a["labels"][:, None] == b["labels"])
    overlap, index = same.max(dim=1)
    assert (overlap > 0.99).all()
    assert len(index.unique()) == len(index)
    return index
