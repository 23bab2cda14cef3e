"""Samples: that they depend on their keys alone, and what is refused."""

import pytest
import torch
from mixed_data import Mixed, assert_same, training_items

from fastmrcnn import ops
from fastmrcnn.data import DataError, LargeScaleJitter, Resize, TrainingItems
from fastmrcnn.data.items import in_bytes


def test_a_sample_depends_on_its_key_alone():
    dataset = Mixed()
    items = training_items(dataset)
    assert len(items) == 12
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = {key: items[key] for key in [(0, 0, 5), (0, 1, 5), (1, 0, 5), (0, 0, 4)]}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = training_items(Mixed())
    for key in reversed(list(found)):
        assert_same(again[key], found[key])
    views = {found[key].view for key in found if key[2] == 5} | {training_items(dataset, seed=4)[0, 0, 5].view}
    assert len(views) == 4


def test_a_sample_is_the_item_through_its_view():
    dataset = Mixed(num_keypoints=2)
    items = TrainingItems(dataset, 0, None, Resize([80], 1000))
    for i in range(12):
        sample, (image, target) = items[0, 0, i], dataset[i]
        height, width = image.shape[1:]
        assert torch.equal(sample.image, (image * 255).round().byte())
        assert sample.view[:2] == (height, width)
        assert (sample.image_id, min(sample.view[6:])) == (target["image_id"], 80)
        assert torch.equal(ops.unpack_bits(sample.words, width), target["masks"].bool())
        scale = torch.tensor([sample.view[3] / width, sample.view[2] / height]).repeat(2)
        torch.testing.assert_close(sample.boxes, target["boxes"] * scale)
        torch.testing.assert_close(sample.keypoints[:, 1, :2], target["boxes"][:, :2] * scale[:2])
        assert torch.equal(sample.labels, target["labels"])


def test_transforms_come_before_the_view():
    def framed(image, target):
        image = torch.nn.functional.pad(image, (8, 0, 0, 0))
        boxes = target["boxes"] + torch.tensor([8.0, 0, 8, 0])
        return image, target | {"boxes": boxes, "masks": torch.nn.functional.pad(target["masks"], (8, 0))}

    dataset = Mixed()
    sample, (image, target) = TrainingItems(dataset, 0, framed, Resize([80], 1000))[0, 0, 2], dataset[2]
    assert sample.view == (40, 48, 80, 96, 0, 0, 80, 96)
    assert torch.equal(sample.image[:, :, 8:], (image * 255).round().byte())
    assert torch.equal(sample.boxes, 2 * (target["boxes"] + torch.tensor([8.0, 0, 8, 0])))


def test_masks_and_boxes_of_jittered_samples_are_of_the_same_objects():
    items = TrainingItems(Mixed(), 0, None, LargeScaleJitter(32, 1.5, 2.0))
    fewer = 0
    for i in range(12):
        sample, (_, target) = items[0, 0, i], Mixed()[i]
        assert len(sample.words) == len(sample.boxes) == len(sample.labels)
        fewer += len(sample.labels) < len(target["labels"])
        masks = ops.unpack_bits(sample.words, sample.view[1])
        assert all(any(torch.equal(mask, m.bool()) for m in target["masks"]) for mask in masks)
    assert fewer > 3


def test_bytes_are_rounded():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert in_bytes(values) is values
    for shift in (-0.49, 0.0, 0.49):
        assert torch.equal(in_bytes((values + shift) / 255), values)
    assert in_bytes(torch.tensor([[[-0.5, 1.5, 0.5 / 255]]])).tolist() == [[[0, 255, 0]]]


class Broken(Mixed):
    """A data set whose targets were changed."""

    def __init__(self, change):
        super().__init__(num_keypoints=1)
        self.change = change

    def __getitem__(self, i):
        image, target = super().__getitem__(i)
        return self.change(image, target) or (image, target)


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda image, target: target["boxes"][-1].fill_(NAN), r"boxes must be finite x1 < x2.*\[nan, nan, nan, nan\]"),
        (lambda image, target: target["boxes"][-1, 2:].copy_(target["boxes"][-1, :2]), "boxes must be finite x1 < x2"),
        (lambda image, target: target.update(boxes=target["boxes"].double()), r"boxes are torch\.float64 \[\d, 4\]"),
        (lambda image, target: target.update(boxes=target["boxes"][1:]), r"boxes are .* accepted is torch\.float32"),
        (lambda image, target: (image, {"image_id": 5, "labels": target["labels"]}), r"its target has no \['boxes'\]"),
        (lambda image, target: target["labels"].fill_(4), r"labels must be in 1\.\.3, got \[4"),
        (lambda image, target: target["labels"][:1].fill_(0), r"labels must be in 1\.\.3, got \[0"),
        (lambda image, target: target.update(masks=target["masks"][..., 1:]), r"masks are torch\.uint8 \[\d, 64, 39\]"),
        (lambda image, target: target.update(masks=target["masks"].float()), r"masks are torch\.float32"),
        (lambda image, target: target["keypoints"].fill_(NAN), "keypoints must be finite"),
        (
            lambda image, target: target.update(keypoints=target["keypoints"][..., :2]),
            r"keypoints are .*, 2\]; accepted",
        ),
        (lambda image, target: (image[0], target), r"it is torch\.float32 \[64, 40\]; accepted is uint8 or floating"),
        (lambda image, target: (image.short(), target), r"it is torch\.int16 \[3, 64, 40\]"),
    ],
)
def test_targets_that_are_not_what_they_should_be(change, says):
    items = TrainingItems(
        Broken(lambda image, target: found if isinstance(found := change(image, target), tuple) else None),
        0,
        None,
        Resize([40], 99),
    )
    with pytest.raises(DataError, match=rf"image 5: {says}"):
        items[0, 0, 4]
