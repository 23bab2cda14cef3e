"""Where torchvision's operations are replaced, and for how long."""

from __future__ import annotations

import functools
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
import torchvision.models.detection as torchvision_detection
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.ops import nms

import fastmrcnn

PLACES = [
    (torchvision.ops, "roi_align"),
    (sys.modules["torchvision.ops.roi_align"], "roi_align"),
    (torchvision.ops.poolers, "roi_align"),
    (torchvision_heads, "roi_align"),
    (torchvision.ops.poolers, "_multiscale_roi_align"),
    (torchvision.ops, "nms"),
    (torchvision.ops.boxes, "nms"),
    (torchvision.ops, "batched_nms"),
    (torchvision.ops.boxes, "batched_nms"),
    (torchvision_heads, "paste_masks_in_image"),
    (torchvision_detection.transform, "paste_masks_in_image"),
    (sys.modules[__name__], "nms"),
]
ORIGINALS = [getattr(place, name) for place, name in PLACES]
BOXES = torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9], [20, 20, 30, 30]])
SCORES = torch.tensor([0.5, 0.6, 0.7])


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    assert [getattr(place, name) for place, name in PLACES] == ORIGINALS


def is_patched() -> bool:
    """Whether all places are, or none is."""
    changed = {getattr(place, name) is not original for (place, name), original in zip(PLACES, ORIGINALS, strict=True)}
    assert len(changed) == 1
    return changed.pop()


def test_modules_of_the_program() -> None:
    """Names of their own, modules that come and go within the block, and such as are none."""
    before, later = ModuleType("before"), ModuleType("later")
    before.suppress, before.other = torchvision.ops.nms, torchvision.ops.box_iou
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "before", before)
        patch.setitem(sys.modules, "nothing", None)
        with fastmrcnn.patch_torchvision():
            assert before.suppress is torchvision.ops.nms is nms
            assert before.other is torchvision.ops.box_iou
            exec("from torchvision.ops import nms as late", vars(later))
            patch.setitem(sys.modules, "later", later)
            assert later.late is before.suppress
            assert before.suppress(BOXES, SCORES, 0.3).dtype == torch.int64
        assert before.suppress is later.late is torchvision.ops.nms


def test_references_that_outlive_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmrcnn.ops, "nms", lambda *_: pytest.fail("ours was called"))
    with fastmrcnn.patch_torchvision():
        kept = functools.partial(torchvision.ops.nms, iou_threshold=0.3)
        assert pickle.loads(pickle.dumps(torchvision.ops.nms)) is torchvision.ops.nms
    expected = torchvision.ops.nms(BOXES, SCORES, 0.3)
    assert torch.equal(kept(BOXES, SCORES), expected)


def test_permanent_and_undone_twice() -> None:
    patch = fastmrcnn.patch_torchvision()
    assert is_patched()
    patch.undo()
    assert not is_patched()
    patch.undo()
    with patch:
        assert is_patched()
    assert not is_patched()
    with patch as same, patch:
        assert same is patch
    assert not is_patched()
    with patch:
        patch.undo()
        assert not is_patched()


def test_nested_and_overlapping() -> None:
    with fastmrcnn.patch_torchvision():
        patched = torchvision.ops.nms
        with fastmrcnn.patch_torchvision():
            assert torchvision.ops.nms is patched
        assert is_patched()
    assert not is_patched()
    first, second = fastmrcnn.patch_torchvision(), fastmrcnn.patch_torchvision()
    first.undo()
    first.undo()
    assert is_patched()
    second.undo()
    assert not is_patched()
    with first, first:
        pass
    assert not is_patched()


def test_nested_use_of_one_patch() -> None:
    patch = fastmrcnn.patch_torchvision()
    with patch:
        with patch:
            assert is_patched()
        assert is_patched()
    assert not is_patched()


def test_exceptions() -> None:
    with pytest.raises(KeyError), fastmrcnn.patch_torchvision():
        raise KeyError
    assert not is_patched()


def test_threads() -> None:
    """Two that enter and leave in each order."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fastmrcnn.patch_torchvision():
            entered.set()
            leave.wait(10)

    for first_to_leave in ("other", "this"):
        entered.clear()
        leave.clear()
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        patch = fastmrcnn.patch_torchvision()
        if first_to_leave == "this":
            patch.undo()
            assert is_patched()
        leave.set()
        thread.join()
        assert is_patched() == (first_to_leave == "other")
        patch.undo()
        assert not is_patched()


def test_a_patch_begins_while_another_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    patching = sys.modules["fastmrcnn.patching"]
    exchange, ending = patching._exchange, threading.Event()

    def slowly(functions: Any) -> None:
        if functions is not patching.REPLACEMENTS:
            ending.set()
            time.sleep(0.1)
        exchange(functions)

    monkeypatch.setattr(patching, "_exchange", slowly)
    thread = threading.Thread(target=fastmrcnn.patch_torchvision().undo)
    thread.start()
    assert ending.wait(10)
    with fastmrcnn.patch_torchvision():
        thread.join()
        assert is_patched()
    assert not is_patched()
