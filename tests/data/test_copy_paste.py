"""Copy-paste, on generated shapes: what is pasted, what it covers, and what stays as it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmrcnn.data import CopyPaste, Shapes

GIVEN = Shapes(30, image_size=(48, 64), seed=1, min_objects=0)
OTHER = Shapes(30, image_size=(72, 40), seed=2, min_objects=0)


def tight(mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


class Items(list):
    """A data set of given items."""

    num_keypoints = 0


def in_bytes(dataset):
    return Items(((image * 255).round().byte(), target) for image, target in dataset)


def marked(dataset):
    """With labels from 100 on, which the result of pasting keeps."""
    return Items((image, target | {"labels": target["labels"] + 100}) for image, target in dataset)


AS_FLOAT = Items(GIVEN), marked(OTHER)
AS_BYTES = in_bytes(GIVEN), marked(in_bytes(OTHER))


@given(st.integers(0, 29), st.integers(0, 2**31), st.booleans(), st.sampled_from([0.0, 0.1, 0.7]))
def test_pasted_objects_cover_the_others(i, seed, as_bytes, min_visible):
    dataset, other = AS_BYTES if as_bytes else AS_FLOAT
    image, target = dataset[i]
    before = [image.clone(), {name: torch.as_tensor(value).clone() for name, value in target.items()}]
    torch.manual_seed(seed)
    changed, result = CopyPaste(other, 1.0, min_visible=min_visible)(image, target)
    assert torch.equal(image, before[0])
    assert all(torch.equal(torch.as_tensor(target[name]), value) for name, value in before[1].items())
    assert set(result) == set(target)
    assert result["image_id"] == target["image_id"]
    assert all(result[name].dtype == target[name].dtype for name in target if name != "image_id")
    assert {len(result[name]) for name in target if name != "image_id"} == {len(result["labels"])}

    stayed = int((result["labels"] < 100).sum())
    assert (result["labels"][:stayed] < 100).all()
    assert not len(result["masks"]) or result["masks"].sum(dim=0).max() <= 1  # as in both images
    covered = result["masks"][stayed:].sum(dim=0).bool()
    differs = (changed != image).any(dim=0)
    assert not (differs & ~covered).any()
    assert changed.dtype == image.dtype
    remaining = target["masks"] * ~covered
    areas = remaining.flatten(1).sum(dim=1)
    stays = (areas > 0) & (areas >= target["area"] * min_visible)
    assert torch.equal(result["masks"][:stayed], remaining[stays])
    assert torch.equal(result["labels"][:stayed], target["labels"][stays])
    for mask, box, area in zip(result["masks"], result["boxes"], result["area"], strict=True):
        assert box.tolist() == tight(mask)
        assert area == mask.sum() > 0


def test_objects_that_nothing_covers_keep_their_boxes():
    image, target = GIVEN[3]
    assert len(target["labels"]) > 2
    target["boxes"] = target["boxes"] + torch.tensor([-0.25, 0, 0, 0.25])  # annotators' boxes are not tight
    target["area"] = target["area"] + 0.5
    target["masks"][0] = 0  # such annotations exist
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        _, result = CopyPaste(OTHER, 1.0)(image, target)
        assert torch.equal(result["boxes"][0], target["boxes"][0])
        for mask, box, area in zip(result["masks"], result["boxes"], result["area"], strict=True):
            for former, k in zip(target["masks"], range(len(target["labels"])), strict=True):
                if torch.equal(mask, former):
                    assert torch.equal(box, target["boxes"][k])
                    assert area == target["area"][k]
                elif (mask * former).any():
                    assert box.tolist() == tight(mask)
                    changed += 1
    assert changed > 5


def test_an_image_of_the_same_size_and_scale_is_pasted_pixel_by_pixel():
    other, source = OTHER[4]
    image, target = torch.zeros_like(other), {name: source[name][:0] for name in source if name != "image_id"}
    mirrored = set()
    for seed in range(12):
        torch.manual_seed(seed)
        changed, result = CopyPaste(Items([OTHER[4]]), 1.0, low=1.0, high=1.0)(image, target)
        if not len(result["labels"]):
            continue
        pasted = result["masks"].sum(dim=0).bool()
        flip = not torch.equal(changed, other * pasted)
        mirrored.add(flip)
        pixels, masks = (other.flip(-1), source["masks"].flip(-1)) if flip else (other, source["masks"])
        assert torch.equal(changed, pixels * pasted)
        taken = [k for k, mask in enumerate(masks) if any(torch.equal(mask, found) for found in result["masks"])]
        assert torch.equal(result["masks"], masks[taken])
        assert torch.equal(result["labels"], source["labels"][taken])
    assert mirrored == {False, True}


def striped(side, count):
    """An image full of objects: vertical stripes, labelled from left to right."""
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for k, mask in enumerate(masks):
        mask[:, k * side // count : (k + 1) * side // count] = 1
    target = {"masks": masks, "labels": torch.arange(1, count + 1), "boxes": torch.zeros(count, 4), "image_id": 1}
    target |= {"area": masks.flatten(1).sum(dim=1).float(), "iscrowd": torch.zeros(count, dtype=torch.uint8)}
    return torch.zeros(3, side, side), target


def test_smaller_images_lie_anywhere_within():
    transform = CopyPaste(Items([striped(24, 1)]), 1.0, low=0.25, high=0.25)
    found = []
    for seed in range(400):
        torch.manual_seed(seed)
        _, result = transform(*striped(40, 1))
        if len(result["labels"]) == 2:
            found.append(result["boxes"][1].tolist())
    assert all((x2 - x1, y2 - y1) == (10, 10) for x1, y1, x2, y2 in found)
    assert 150 < len(found) < 250  # the one object is taken every other time
    assert {box[0] for box in found} == {box[1] for box in found} == set(range(31))
    assert len({(box[0], box[1]) for box in found}) > 130


def test_larger_images_lie_anywhere_over():
    transform = CopyPaste(marked([striped(24, 24)]), 1.0, low=2.0, high=2.0, min_visible=0.45)
    seen, both = set(), 0
    for seed in range(200):
        torch.manual_seed(seed)
        _, result = transform(*striped(36, 1))
        labels = set(result["labels"].tolist()) - {1}
        assert max(labels) - min(labels) < 12  # 3 pixels wide each, and half as high: twelve are seen in full width
        seen |= labels
        both += min(labels) <= 112 < max(labels)
    assert {101, 124} <= seen
    assert both > 100  # of the left and of the right half


def test_what_is_covered_goes():
    image, target = striped(12, 2)
    for seed in range(8):
        torch.manual_seed(seed)
        _, result = CopyPaste(marked([striped(24, 1)]), 1.0, low=1.0, high=1.0, min_visible=0.0)(image, target)
        assert result["labels"].tolist() in ([101], [1, 2])


def test_a_scale_of_one_is_the_largest_that_fits():
    _, target = striped(20, 2)
    target["masks"] = torch.nn.functional.pad(target["masks"], (0, 40))
    for seed in range(8):
        torch.manual_seed(seed)
        changed, result = CopyPaste(marked([striped(24, 1)]), 1.0, low=1.0, high=1.0)(torch.zeros(3, 20, 60), target)
        assert changed.shape == (3, 20, 60)
        x1, y1, x2, y2 = result["boxes"][result["labels"] == 101].reshape(-1, 4).T
        assert ((x2 - x1) == 20).all()
        assert ((y2 - y1) == 20).all()


def test_low_and_high_bound_the_scale():
    transform = CopyPaste(Items([striped(40, 1)]), 1.0, low=0.2, high=0.8)
    sides = []
    for seed in range(200):
        torch.manual_seed(seed)
        _, result = transform(*striped(40, 1))
        sides += (result["boxes"][1:, 2] - result["boxes"][1:, 0]).tolist()
    assert (min(sides), max(sides)) == (8, 31)  # 32 is the scale 0.8 itself


def test_every_image_is_drawn_with_probability_p():
    image, target = striped(10, 1)
    others = Items([striped(10, 1) for _ in range(7)])
    for label, (_, other) in enumerate(others, start=10):
        other["labels"] = torch.tensor([label])
    torch.manual_seed(0)
    found = [CopyPaste(others, 0.25, low=0.5, high=0.5)(image, target)[1]["labels"].tolist() for _ in range(1600)]
    pasted = [labels[-1] for labels in found if len(labels) == 2]
    assert 150 < len(pasted) < 250
    assert set(pasted) == set(range(10, 17))
    torch.manual_seed(0)
    assert found[:50] == [
        CopyPaste(others, 0.25, low=0.5, high=0.5)(image, target)[1]["labels"].tolist() for _ in range(50)
    ]
    unchanged = CopyPaste(others, 0.0)(image, target)
    assert unchanged[0] is image
    assert unchanged[1] is target


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"p": 1.5}, "p and min_visible must be in 0..1"),
        ({"min_visible": -0.1}, "p and min_visible must be in 0..1"),
        ({"low": 0.0}, "0 < low <= high"),
        ({"low": 2.0, "high": 1.0}, "0 < low <= high"),
        ({"high": float("inf")}, "0 < low <= high"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        CopyPaste(GIVEN, **options)


def test_data_sets_without_masks_or_with_keypoints_are_refused():
    for name, value in (("masks", False), ("num_keypoints", 3)):
        dataset = Items()
        setattr(dataset, name, value)
        with pytest.raises(ValueError, match="copy-paste needs masks, and no keypoints"):
            CopyPaste(dataset)
