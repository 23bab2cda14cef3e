"""With equal weights: torchvision's detections, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from detectors import BUILDERS, KINDS, pair, step, targets_for
from torch import Tensor, nn

from benchmarks.detectors import agreement

FEW = {"rpn_post_nms_top_n_test": 60, "box_detections_per_img": 25}


def assert_same_form(theirs: list[dict[str, Tensor]], ours: list[dict[str, Tensor]]) -> None:
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        assert all(a[key].dtype == b[key].dtype and a[key].shape[1:] == b[key].shape[1:] for key in a)


@pytest.mark.parametrize("builder", BUILDERS)
def test_detections(builder: str, photos: list[Tensor]) -> None:
    """In float64 all are equal; in float32 nearly all, since rounding may flip a decision."""
    if builder not in KINDS:  # of parts that the others have, too
        photos = photos[:1]
    theirs, ours = pair(builder, photos, **FEW)
    with torch.inference_mode():
        expected, found = theirs(photos), ours(photos)
        exact = [photo.double() for photo in photos]
        expected_exact, found_exact = theirs.double()(exact), ours.double()(exact)
    assert_same_form(expected, found)
    assert_same_form(expected_exact, found_exact)
    assert all(len(detections["boxes"]) > 0 for detections in expected)
    assert all((detections["scores"].diff() <= 0).all() for detections in found)
    assert agreement(expected_exact, found_exact) == 1
    assert agreement(expected, found) >= 0.98


@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_nothing_found(builder: str, photos: list[Tensor]) -> None:
    theirs, ours = pair(builder, photos[:1], **FEW)
    theirs.roi_heads.score_thresh = ours.roi_heads.score_thresh = 1.0
    with torch.inference_mode():
        expected, found = theirs(photos[:2]), ours(photos[:2])
    assert_same_form(expected, found)
    for a, b in zip(expected, found, strict=True):
        assert all(a[key].shape == b[key].shape and len(b[key]) == 0 for key in a)


EXHAUSTIVE = {
    "rpn_batch_size_per_image": 100_000,
    "box_batch_size_per_image": 4_000,
    "rpn_pre_nms_top_n_train": 30,
    "rpn_post_nms_top_n_train": 40,
    "min_size": 160,
    "max_size": 224,
}


def exhaustive(builder: str, images: list[Tensor]) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A pair that samples everything, and the images, in float64, where the order of additions does not show."""
    theirs, ours = pair(builder, images, **EXHAUSTIVE)
    return theirs.double(), ours.double(), [image.double() for image in images]


@pytest.mark.parametrize("builder", KINDS)  # the others have parts of these
def test_losses_and_gradients(builder: str) -> None:
    torch.manual_seed(0)
    images = [torch.rand(3, 150, 190), torch.rand(3, 180, 130), torch.rand(3, 140, 140)]
    theirs, ours, images = exhaustive(builder, images)
    targets = targets_for(images, [3, 2, 0], keypoints=17 if "keypoint" in builder else 0)
    expected, found = step(theirs, images, targets), step(ours, images, targets)
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert 0 < value.item() < 20, f"{name}: {value} is no trained model's loss, and would hide differences"
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=0, check_dtype=False, msg=name)

    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(gradient.norm() for gradient in gradients.values())
    assert gradients.keys() == {name for name, p in ours.named_parameters() if p.grad is not None}
    for name, p in ours.named_parameters():
        if p.grad is not None:  # a bias in front of a norm has no gradient but rounding errors
            allowed = 1e-4 * gradients[name].norm() + 1e-7 * largest
            assert (p.grad - gradients[name]).norm() <= allowed, name
    for (name, a), b in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)


def test_images_without_objects() -> None:
    torch.manual_seed(0)
    images = [torch.rand(3, 150, 190), torch.rand(3, 180, 130)]
    theirs, ours, images = exhaustive("maskrcnn_resnet50_fpn", images)
    targets = targets_for(images, [0, 0])
    expected, found = step(theirs, images, targets), step(ours, images, targets)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9, check_dtype=False, msg=name)
    assert found["loss_mask"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_objects_at_the_border() -> None:
    """The smaller image of a batch ends inside the canvas: its masks end there too."""
    torch.manual_seed(0)
    images = [torch.rand(3, 200, 220), torch.rand(3, 150, 160)]
    theirs, ours, images = exhaustive("maskrcnn_resnet50_fpn", images)
    targets = []
    for image in images:
        height, width = image.shape[-2:]
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, height - 40 :, width - 50 :] = 1
        masks[1] = 1
        boxes = torch.tensor([[width - 50, height - 40, width, height], [0, 0, width, height]]).to(image)
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    expected, found = step(theirs, images, targets), step(ours, images, targets)
    torch.testing.assert_close(found["loss_mask"], expected["loss_mask"], rtol=1e-5, atol=0, check_dtype=False)
