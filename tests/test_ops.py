"""The public functions: validation, choice of implementation, and freedom from synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastmrcnn import ops
from fastmrcnn.ops import implementations
from fastmrcnn_kernels.reference import boxes
from fastmrcnn_kernels.reference.roi_align import assign_levels
from fastmrcnn_kernels.reference.topk import stable_topk

CALLS: dict[str, Callable[..., Any]] = {
    "roi_align": lambda **k: ops.roi_align(torch.rand(2, 3, 8, 8), torch.rand(4, 5), 2, **k),
    "multilevel_roi_align": lambda **k: ops.multilevel_roi_align(
        [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)], torch.rand(4, 5), 2, (0.25, 0.125), **k
    ),
    "roi_pool": lambda **k: ops.roi_pool(torch.rand(2, 3, 8, 8), torch.rand(4, 5), 2, **k),
    "nms": lambda **k: ops.nms(torch.rand(5, 4), torch.rand(5), 0.5, **k),
    "batched_nms": lambda **k: ops.batched_nms(torch.rand(5, 4), torch.rand(5), torch.zeros(5), 0.5, **k),
    "padded_nms": lambda **k: ops.padded_nms(torch.rand(2, 5, 4), torch.rand(2, 5), torch.tensor([3, 0]), 0.5, 4, **k),
    "decode_proposals": lambda **k: ops.decode_proposals(
        [torch.rand(2, 8, 4, 4)],
        torch.zeros(2, 1, 3, dtype=torch.int64),
        [torch.rand(2, 4)],
        [(8, 8)],
        torch.full((2, 2), 30),
        **k,
    ),
    "soft_nms": lambda **k: ops.soft_nms(torch.rand(5, 4), torch.rand(5), **k),
    "padded_soft_nms": lambda **k: ops.padded_soft_nms(
        torch.rand(2, 5, 4), torch.rand(2, 5), torch.tensor([3, 0]), 4, **k
    ),
    "encode_boxes": lambda **k: ops.encode_boxes(torch.rand(2, 5, 4), torch.rand(5, 4), **k),
    "decode_boxes": lambda **k: ops.decode_boxes(torch.rand(2, 5, 3, 4), torch.rand(2, 5, 4), **k),
    "topk_anchors": lambda **k: ops.topk_anchors([torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2)], 15, **k),
    "merge_levels": lambda **k: ops.merge_levels(
        torch.rand(2, 3, 5, 4),
        torch.rand(2, 3, 5),
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.int64),
        7,
        **k,
    ),
    "select_detections": lambda **k: ops.select_detections(
        torch.rand(2, 6, 3),
        torch.rand(2, 6, 3, 4),
        torch.rand(2, 6, 4) * 20,
        torch.tensor([6, 2]),
        torch.full((2, 2), 30),
        **k,
    ),
    "paste_masks": lambda **k: ops.paste_masks(torch.rand(3, 7, 7), torch.rand(3, 4) * 9, (20, 30), **k),
    "pack_bits": lambda **k: ops.pack_bits(torch.rand(2, 8, 40) < 0.5, **k),
    "unpack_bits": lambda **k: ops.unpack_bits(torch.ones(2, 8, 2).int(), 40, **k),
    "count_bits": lambda **k: ops.count_bits(torch.ones(2, 8, 2).int(), **k),
    "mask_iou": lambda **k: ops.mask_iou(torch.ones(2, 8, 2).int(), torch.ones(3, 8, 2).int(), **k),
    "boundary_iou": lambda **k: ops.boundary_iou(torch.ones(2, 8, 2).int(), torch.ones(3, 8, 2).int(), 40, **k),
    "heatmaps_to_keypoints": lambda **k: ops.heatmaps_to_keypoints(
        torch.rand(3, 2, 7, 7), torch.rand(3, 4) * 9, (20, 30), **k
    ),
}


ON_HOST: dict[str, Callable[..., Any]] = {
    "begin_encoding": lambda **k: ops.begin_encoding(
        torch.rand(2, 3, 7, 7), torch.rand(2, 3, 4) * 9, [(8, 9)] * 2, **k
    ),
    "encode_masks": lambda **k: ops.encode_masks(torch.rand(3, 7, 7), torch.rand(3, 4) * 9, (8, 9), **k),
    "encode_bool": lambda **k: ops.encode_bool(torch.rand(3, 8, 9) < 0.5, **k),
}
"""What ends in text, on the CPU."""
ALL = CALLS | ON_HOST

NO_KERNEL_YET = ["heatmaps_to_keypoints"]


@pytest.mark.parametrize("op", NO_KERNEL_YET)
def test_triton_is_not_there_yet_and_says_so(op: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"fastmrcnn\.ops\.{op} has no 'triton' implementation.*'reference'"):
        CALLS[op](impl="triton")


@pytest.mark.parametrize("op", ALL)
def test_unknown_implementation(op: str) -> None:
    with pytest.raises(ValueError, match="impl='cuda': expected 'auto'"):
        ALL[op](impl="cuda")


def test_torchvision_has_no_such_operation() -> None:
    with pytest.raises(NotImplementedError, match="no 'torchvision' implementation"):
        CALLS["decode_proposals"](impl="torchvision")


ALSO_CALLED = {"soft_nms": "padded_soft_nms", "begin_encoding": "encode_masks", "boundary_iou": "mask_iou"}
"""Functions that are another one with a view of its results."""


@pytest.mark.parametrize("op", ALL)
def test_an_explicit_request_never_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the reference was called")

    implementation = ALSO_CALLED.get(op, op)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS[implementation], "reference", broken)
    with pytest.raises(RuntimeError, match="the reference was called"):
        ALL[op](impl="reference")
    monkeypatch.delitem(implementations.IMPLEMENTATIONS[implementation], "reference")
    with pytest.raises(NotImplementedError, match=f"{implementation} has no 'reference'"):
        ALL[op](impl="reference")


def test_automatic_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own, torchvision's, or NumPy, where there is one: those are faster there."""
    chosen = []
    for op, available in implementations.IMPLEMENTATIONS.items():
        for name, run in available.items():

            def recorded(*args: Any, of: Any = (op, name), run: Any = run, **kwargs: Any) -> Any:
                chosen.append(of)
                return run(*args, **kwargs)

            monkeypatch.setitem(available, name, recorded)
    for call in ALL.values():
        call()
    called = [ALSO_CALLED.get(op, op) for op in ALL]
    for op, name in zip(called, (name for op, name in chosen if op in called), strict=True):
        fast = [other for other in ("torch", "torchvision", "numpy") if other in implementations.IMPLEMENTATIONS[op]]
        assert name == (fast or ["reference"])[0], op
    assert [op for op, _ in chosen if op in called] == called


HELPERS: dict[str, Callable[[], Any]] = {
    "stable_topk": lambda: stable_topk(torch.rand(2, 50), 7),
    "assign_levels": lambda: assign_levels(torch.rand(5, 4), 4, 2, 224, 4),
    "encode_deltas": lambda: boxes.encode_deltas(torch.rand(5, 4), torch.rand(5, 4)),
    "decode_deltas": lambda: boxes.decode_deltas(torch.rand(5, 4), torch.rand(5, 4)),
    "clip_boxes": lambda: boxes.clip_boxes(torch.rand(2, 5, 4), torch.ones(2, 2)),
    "large_enough": lambda: boxes.large_enough(torch.rand(5, 4), 1e-3),
    "pairwise_iou": lambda: boxes.pairwise_iou(torch.rand(5, 4), torch.rand(6, 4)),
    "adaptive roi_align": lambda: ops.roi_align(
        torch.rand(1, 2, 8, 8), torch.rand(4, 5), 2, 1.0, 0, True, impl="reference"
    ),
    "bool paste_masks": lambda: ops.paste_masks(
        torch.rand(3, 7, 7), torch.rand(3, 4), (20, 30), out="bool", impl="reference"
    ),
    "mask padded_nms": lambda: ops.padded_nms(
        torch.rand(2, 5, 4), torch.rand(2, 5), torch.ones(2, 5).bool(), 0.5, 4, impl="reference"
    ),
    "MultiScaleRoIAlign": lambda: ops.MultiScaleRoIAlign(["0", "1"], 2, 2)(
        {"0": torch.rand(1, 3, 8, 8), "1": torch.rand(1, 3, 4, 4)}, [torch.rand(4, 4)], [(32, 32)]
    ),
}
SIZED_BY_DATA = ("nms", "batched_nms", "soft_nms")
UNSYNCHRONISED: dict[str, Callable[[], Any]] = {
    **{f"{op}, reference": partial(call, impl="reference") for op, call in CALLS.items()},
    **{f"{op}, auto": call for op, call in CALLS.items()},
    **HELPERS,
}


@pytest.mark.parametrize("name", UNSYNCHRONISED)
def test_no_host_synchronisation(name: str) -> None:
    """On a GPU without data no value can be read.

    `nms` and `batched_nms` return as many indices as they keep, a shape that depends on data.  It may be unknown here,
    but nothing may depend on it, so the one synchronisation sits at their end.
    """
    shapes = ShapeEnv() if name.split(",")[0] in SIZED_BY_DATA else None
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes), torch.device("cuda"):
        result = UNSYNCHRONISED[name]()
    for tensor in result if isinstance(result, tuple) else [result]:
        assert tensor.device.type == "cuda"


def pool(maps: list[Tensor] | None = None, **arguments: Any) -> Tensor:
    maps = maps or [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4)]
    return ops.multilevel_roi_align(maps, torch.rand(4, 5), 2, (0.5, 0.25), **arguments)


def suppress(**changed: Any) -> tuple[Tensor, Tensor]:
    usual = {"boxes": torch.rand(2, 5, 4), "scores": torch.rand(2, 5), "valid": torch.ones(2, 5).bool()}
    return ops.padded_nms(**{**usual, "iou_threshold": 0.5, "max_keep": 3, **changed})


def decode(**changed: Any) -> tuple[Tensor, Tensor]:
    usual = {"deltas": [torch.rand(2, 8, 3, 3)], "indices": torch.zeros(2, 1, 3).long()}
    usual |= {"base_anchors": [torch.rand(2, 4)], "sizes": torch.full((2, 2), 30)}
    return ops.decode_proposals(**{**usual, "strides": [(8, 8)], **changed})


def merge(**changed: Any) -> Any:
    usual = {"boxes": torch.rand(2, 3, 5, 4), "scores": torch.rand(2, 3, 5), "kept": torch.zeros(2, 3, 4).long()}
    return ops.merge_levels(**{**usual, "counts": torch.ones(2, 3).long(), "max_keep": 7, **changed})


def select(**changed: Any) -> Any:
    usual = {"logits": torch.rand(2, 6, 3), "deltas": torch.rand(2, 6, 3, 4), "proposals": torch.rand(2, 6, 4)}
    usual |= {"counts": torch.tensor([6, 2]), "sizes": torch.full((2, 2), 30)}
    return ops.select_detections(**{**usual, **changed})


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
        (lambda: ops.roi_align(torch.rand(1, 3, 8, 8), torch.ones(4, 5).int(), 2), TypeError, "boxes: .*int32"),
        (lambda: ops.roi_align(torch.rand(1, 3, 8, 8), [], 2), ValueError, "boxes: .*got none"),
        (lambda: ops.roi_align(torch.rand(1, 3, 8, 8), torch.rand(4, 5), (1, 2, 3)), ValueError, "output_size="),
        (lambda: ops.multilevel_roi_align([], torch.rand(4, 5), 2, ()), ValueError, "0 given for 0"),
        (lambda: pool(maps=[torch.rand(1, 3, 8, 8), torch.rand(1, 2, 4, 4)]), ValueError, r"features\[1\]: .*\[1, 3, "),
        (lambda: pool(maps=[torch.rand(1, 3, 8, 8), torch.rand(2, 3, 4, 4)]), ValueError, r"features\[1\]: .*\[1, 3, "),
        (lambda: pool(levels=torch.zeros(3, dtype=torch.int64)), ValueError, r"levels: .*\[4\].*\[3\]"),
        (
            lambda: pool(maps=[torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4).half()]),
            TypeError,
            r"features\[1\]: .*32.*16",
        ),
        (lambda: pool(maps=[torch.ones(1, 3, 8, 8).long()] * 2), TypeError, r"features\[0\]: .*int64"),
        (lambda: pool(maps=[torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8)]), ValueError, r"features\[1\]: .*\[1, 3, 8\]"),
        (lambda: pool(maps=[torch.rand(3, 8, 8)] * 2), ValueError, r"features\[0\]: .*\[3, 8, 8\]"),
        (lambda: pool(maps=[[1.0], torch.rand(1, 3, 8, 8)]), TypeError, r"features\[0\]: .*list"),
        (lambda: pool(maps=[torch.rand(1, 3, 8, 8), None]), TypeError, r"features\[1\]: .*NoneType"),
        (lambda: pool(interpolation="nearest"), ValueError, "interpolation='nearest'"),
        (lambda: pool(sampling="max"), ValueError, "sampling='max'"),
        (lambda: pool(interpolation="bicubic", impl="torchvision"), NotImplementedError, "'bilinear'"),
        (lambda: pool(sampling="corner", impl="torchvision"), NotImplementedError, "'average'"),
        (lambda: pool([torch.rand(1, 3, 8, 8).double()] * 2, impl="triton"), TypeError, "float64"),
        (lambda: ops.roi_pool(torch.rand(3, 8, 8), torch.rand(4, 5), 2), ValueError, r"input: .*\[3, 8, 8\]"),
        (lambda: ops.roi_pool(torch.rand(1, 3, 8, 8), torch.rand(4, 4), 2), ValueError, r"boxes: .*\[\*, 5\]"),
        (lambda: ops.roi_pool(torch.rand(1, 3, 8, 8), torch.rand(4, 5), 0), ValueError, "output_size=0"),
        (
            lambda: ops.roi_pool(torch.rand(1, 3, 8, 8).double(), torch.rand(4, 5), 2, impl="triton"),
            TypeError,
            "float64",
        ),
        (lambda: pool(levels=torch.zeros(4)), TypeError, "levels: .*int64.*float32"),
        (lambda: ops.nms(torch.rand(5, 5), torch.rand(5), 0.5), ValueError, r"boxes: .*\[\*, 4\]"),
        (lambda: ops.nms(torch.rand(5, 4), torch.ones(5).long(), 0.5), TypeError, "scores: .*int64"),
        (lambda: ops.batched_nms(torch.rand(5, 4), torch.rand(5), torch.zeros(4), 0.5), ValueError, "idxs"),
        (lambda: suppress(scores=torch.rand(2, 4)), ValueError, r"scores: .*\[2, 5\]"),
        (lambda: suppress(valid=torch.ones(2, 5)), TypeError, "valid: .*bool.*float32"),
        (lambda: suppress(valid=torch.ones(2)), TypeError, "valid: .*int64.*float32"),
        (lambda: suppress(valid=torch.ones(3).long()), ValueError, r"valid: .*\[2\].*\[3\]"),
        (lambda: suppress(valid=[5, 5]), TypeError, "valid: .*list"),
        (lambda: suppress(max_keep=-1), ValueError, "max_keep=-1"),
        (lambda: decode(deltas=[]), ValueError, "one of each per level"),
        (lambda: decode(deltas=[torch.rand(2, 4, 3, 3)]), ValueError, r"deltas\[0\]: .*\[2, 8, "),
        (lambda: decode(deltas=[torch.rand(2, 8, 3, 3).long()]), TypeError, r"deltas\[0\]: .*int64"),
        (lambda: decode(indices=torch.zeros(1, 1, 3).long()), ValueError, r"indices: .*\[2, 1, \*\]"),
        (lambda: decode(indices=torch.zeros(2, 1, 3)), TypeError, "indices: .*int64"),
        (lambda: decode(scores=torch.zeros(2, 1, 4)), ValueError, r"scores: .*\[2, 1, 3\]"),
        (lambda: decode(deltas=[torch.rand(2, 8, 3, 3).double()], impl="triton"), TypeError, "deltas, got .*float64"),
        (lambda: ops.topk_anchors([], 3), ValueError, "0 levels"),
        (lambda: ops.topk_anchors([torch.rand(1, 3, 2, 2)], -1), ValueError, "k=-1"),
        (lambda: ops.topk_anchors([torch.rand(1, 3, 2)], 1), ValueError, r"logits\[0\]: .*\[1, 3, 2\]"),
        (
            lambda: ops.topk_anchors([torch.rand(1, 3, 2, 2), torch.rand(1, 3, 2, 2).half()], 1),
            TypeError,
            r"logits\[1\]: .*32.*16",
        ),
        (lambda: merge(counts=torch.ones(2, 4).long()), ValueError, r"counts: .*\[2, 3\]"),
        (lambda: merge(kept=torch.zeros(2, 3, 4)), TypeError, "kept: .*int64"),
        (lambda: merge(max_keep=13), ValueError, r"max_keep=13: expected 0 \.\. 12"),
        (lambda: merge(scores=torch.rand(2, 3, 6)), ValueError, r"scores: .*\[2, 3, 5\]"),
        (lambda: select(deltas=torch.rand(2, 6, 3)), ValueError, r"deltas: .*\[2, 6, 3, 4\]"),
        (lambda: select(proposals=torch.rand(2, 5, 4)), ValueError, r"proposals: .*\[2, 6, 4\]"),
        (lambda: select(counts=torch.ones(2)), TypeError, "counts: .*int64"),
        (lambda: select(sizes=torch.ones(3, 2)), ValueError, r"sizes: .*\[2, 2\]"),
        (lambda: select(max_detections=-1), ValueError, "max_detections=-1"),
        (lambda: ops.encode_boxes(torch.rand(5, 4), torch.rand(6, 4)), ValueError, "anchors: "),
        (lambda: ops.encode_boxes(torch.rand(5, 3), torch.rand(5, 4)), ValueError, r"boxes: .*\[5, 3\]"),
        (lambda: ops.decode_boxes(torch.rand(5, 4), torch.rand(6, 4)), ValueError, "anchors: expected the shape"),
        (lambda: ops.decode_boxes(torch.rand(5, 4), torch.rand(5, 4), (1, 1, 0, 1)), ValueError, "weights="),
        (lambda: ops.soft_nms(torch.rand(5, 4), torch.rand(4)), ValueError, r"scores: .*\[5\]"),
        (lambda: ops.soft_nms(torch.rand(5, 4), torch.rand(5), idxs=torch.rand(5)), TypeError, "idxs: .*int64"),
        (lambda: ops.soft_nms(torch.rand(5, 4), torch.rand(5), method="hard"), ValueError, "method='hard'"),
        (lambda: ops.soft_nms(torch.rand(5, 4), torch.rand(5), sigma=0.0), ValueError, "sigma=0.0"),
        (lambda: suppress(groups=torch.ones(2, 5)), TypeError, "groups: .*int64"),
        (lambda: decode(base_anchors=[torch.rand(2, 5)]), ValueError, r"base_anchors\[0\]"),
        (lambda: decode(sizes=torch.ones(2, 3)), ValueError, r"sizes: .*\[\*, 2\]"),
        (lambda: ops.paste_masks(torch.rand(3, 7, 8), torch.rand(3, 4), (9, 9)), ValueError, "masks: .*7, 8"),
        (lambda: ops.paste_masks(torch.rand(3, 7, 7), torch.rand(3, 4), (0, 9)), ValueError, "size="),
        (
            lambda: ops.paste_masks_in_image(torch.rand(3, 2, 7, 7), torch.rand(3, 4), (9, 9)),
            ValueError,
            "masks: .*1, ",
        ),
        (lambda: ops.heatmaps_to_keypoints(torch.rand(3, 7, 7), torch.rand(3, 4), (9, 9)), ValueError, "heatmaps"),
        (lambda: ops.heatmaps_to_keypoints(torch.rand(3, 1, 7, 7), torch.rand(2, 4), (9, 9)), ValueError, "boxes"),
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
    assert torch.equal(ops.roi_align(maps, (first, second[:0]), 2), ops.roi_align(maps, together[:2], 2))


def test_signatures_of_torchvision() -> None:
    """Positional calls of torchvision's functions work unchanged."""
    maps, rois, scores = torch.rand(1, 2, 9, 9), torch.tensor([[0, 1.0, 1, 7, 8], [0, 2, 2, 5, 9]]), torch.rand(2)
    arguments = (maps, rois, (2, 3), 0.5, 2, True)
    expected = torchvision.ops.roi_align(*arguments)
    assert torch.equal(ops.roi_align(*arguments, impl="torchvision"), expected)
    torch.testing.assert_close(ops.roi_align(*arguments), expected)
    assert torch.equal(ops.nms(rois[:, 1:], scores, 0.5), torchvision.ops.nms(rois[:, 1:], scores, 0.5))
    groups = (rois[:, 1:], scores, torch.tensor([3, 3]), 0.5)
    assert torch.equal(ops.batched_nms(*groups), torchvision.ops.batched_nms(*groups))
    module = ops.MultiScaleRoIAlign(["0"], 7, sampling_ratio=2)
    assert isinstance(module, torchvision.ops.MultiScaleRoIAlign)
    assert repr(module) == repr(torchvision.ops.MultiScaleRoIAlign(["0"], 7, sampling_ratio=2))
