"""The public functions: validation, choice of implementation, and freedom from synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn import ops

CALLS: dict[str, Callable[..., Any]] = {
    "roi_align": lambda **k: ops.roi_align(torch.rand(2, 3, 8, 8), torch.rand(4, 5), 2, **k),
    "multilevel_roi_align": lambda **k: ops.multilevel_roi_align(
        [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)], torch.rand(4, 5), 2, (0.25, 0.125), **k
    ),
    "nms": lambda **k: ops.nms(torch.rand(5, 4), torch.rand(5), 0.5, **k),
    "batched_nms": lambda **k: ops.batched_nms(torch.rand(5, 4), torch.rand(5), torch.zeros(5), 0.5, **k),
    "padded_nms": lambda **k: ops.padded_nms(torch.rand(2, 5, 4), torch.rand(2, 5), torch.tensor([3, 0]), 0.5, 4, **k),
    "decode_proposals": lambda **k: ops.decode_proposals(
        [torch.rand(2, 8, 4, 4)],
        [torch.zeros(2, 3, dtype=torch.int64)],
        [torch.rand(2, 4)],
        [(8, 8)],
        torch.full((2, 2), 30),
        **k,
    ),
    "paste_masks": lambda **k: ops.paste_masks(torch.rand(3, 7, 7), torch.rand(3, 4) * 9, (20, 30), **k),
    "heatmaps_to_keypoints": lambda **k: ops.heatmaps_to_keypoints(
        torch.rand(3, 2, 7, 7), torch.rand(3, 4) * 9, (20, 30), **k
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_triton_is_not_there_yet_and_says_so(op: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"fastmrcnn\.ops\.{op} has no 'triton' implementation.*'reference'"):
        CALLS[op](impl="triton")


@pytest.mark.parametrize("op", CALLS)
def test_unknown_implementation(op: str) -> None:
    with pytest.raises(ValueError, match="impl='cuda': expected 'auto'"):
        CALLS[op](impl="cuda")


def test_torchvision_has_no_such_operation() -> None:
    with pytest.raises(NotImplementedError, match="no 'torchvision' implementation"):
        CALLS["decode_proposals"](impl="torchvision")


@pytest.mark.parametrize("op", CALLS)
def test_an_explicit_request_never_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the reference was called")

    monkeypatch.setitem(ops._IMPLEMENTATIONS[op], "reference", broken)
    with pytest.raises(RuntimeError, match="the reference was called"):
        CALLS[op](impl="reference")


@pytest.mark.parametrize("op", [op for op in CALLS if op not in ("nms", "batched_nms")])
def test_references_never_synchronise(op: str) -> None:
    """`nms` and `batched_nms` must: the size of their result depends on data."""
    with FakeTensorMode(), torch.device("cuda"):
        result = CALLS[op](impl="reference")
    first = result[0] if isinstance(result, tuple) else result
    assert first.device.type == "cuda"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.roi_align(torch.rand(3, 8, 8), torch.rand(4, 5), 2), ValueError, r"input: .*\[3, 8, 8\]"),
        (lambda: ops.roi_align(torch.rand(1, 3, 8, 8), torch.rand(4, 4), 2), ValueError, r"boxes: .*\[\*, 5\]"),
        (lambda: ops.roi_align(torch.rand(1, 3, 8, 8), [torch.rand(4, 5)], 2), ValueError, r"boxes\[0\]"),
        (lambda: ops.roi_align(torch.rand(1, 3, 8, 8), torch.rand(4, 5), 0), ValueError, "output_size=0"),
        (lambda: ops.roi_align(torch.ones(1, 3, 8, 8).long(), torch.rand(4, 5), 2), TypeError, "input: .*int64"),
        (lambda: ops.roi_align([[1.0]], torch.rand(4, 5), 2), TypeError, "input: .*list"),
        (
            lambda: ops.multilevel_roi_align([torch.rand(1, 3, 8, 8)], torch.rand(4, 5), 2, (0.5, 0.25)),
            ValueError,
            "spatial_scales: 2 given for 1",
        ),
        (lambda: ops.nms(torch.rand(5, 4), torch.rand(6), 0.5), ValueError, r"scores: .*\[5\].*\[6\]"),
        (
            lambda: ops.padded_nms(torch.rand(2, 5, 4), torch.rand(2, 5), torch.ones(2, 4).bool(), 0.5, 3),
            ValueError,
            r"valid: .*\[2, 5\].*\[2, 4\]",
        ),
        (lambda: ops.paste_masks(torch.rand(3, 7, 7), torch.rand(2, 4), (9, 9)), ValueError, r"boxes: .*\[3, 4\]"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_boxes_per_image() -> None:
    maps, first, second = torch.rand(2, 3, 8, 8), torch.rand(2, 4) * 8, torch.rand(1, 4) * 8
    index = torch.tensor([[0.0], [0.0], [1.0]])
    together = torch.cat((index, torch.cat((first, second))), dim=1)
    assert torch.equal(ops.roi_align(maps, [first, second], 2), ops.roi_align(maps, together, 2))
