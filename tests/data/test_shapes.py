import hashlib

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from fastmrcnn.data import Shapes
from fastmrcnn.data.drawing import Shape, place


def equal(a, b):
    return torch.equal(a[0], b[0]) and all(
        torch.equal(a[1][key], b[1][key]) if isinstance(a[1][key], torch.Tensor) else a[1][key] == b[1][key]
        for key in a[1]
    )


def test_item_contract():
    dataset = Shapes(10, image_size=(96, 64), seed=3)
    assert len(dataset) == len(dataset.image_ids) == len(list(dataset)) == 10
    assert dataset.class_names == ["circle", "rectangle", "triangle"]
    assert (dataset.num_classes, dataset.num_keypoints, dataset.category_ids) == (4, 0, [1, 2, 3])
    for i, (image, target) in enumerate(dataset):
        count = len(target["labels"])
        assert 1 <= count <= 6
        assert image.shape == (3, 96, 64)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert 0.2 < image.max() <= 1
        assert dataset.image_size(i) == (96, 64)
        assert target["image_id"] == dataset.image_ids[i]
        expected = {"boxes": (count, 4), "masks": (count, 96, 64), "area": (count,), "iscrowd": (count,)}
        assert {key: tuple(target[key].shape) for key in expected} == expected
        dtypes = [target[key].dtype for key in ("boxes", "labels", "masks", "area", "iscrowd")]
        assert dtypes == [torch.float32, torch.int64, torch.uint8, torch.float32, torch.uint8]
        assert target["labels"].min() >= 1
        assert target["labels"].max() <= 3


def test_item_depends_on_seed_and_index_alone():
    first, again = Shapes(5, seed=1), Shapes(50, seed=1)
    torch.manual_seed(0)
    item = first[3]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert all(not equal(first[i], item) for i in (2, 1, 0))
    assert equal(again[3], item)
    assert equal(first[-2], item)
    assert not equal(Shapes(5, seed=2)[3], item)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_pixels_are_the_same_on_every_machine():
    # Recorded once: a change here changes everybody's data set.
    image, target = Shapes(1, seed=0, image_size=(40, 48))[0]
    digest = hashlib.sha256((image * 255).round().byte().numpy().tobytes()).hexdigest()
    assert digest == "40fdbe8eadd51d2698416731ce6f9d669018aac54d0d6ad3cb03707264cfe643"
    assert target["boxes"].long().tolist() == [
        [0, 28, 10, 36],
        [28, 0, 48, 13],
        [4, 6, 23, 29],
        [34, 20, 48, 37],
        [32, 18, 41, 25],
        [16, 3, 38, 25],
    ]


def test_masks_are_disjoint_and_boxes_tight():
    for _, target in Shapes(40, seed=5):
        assert target["masks"].sum(0).max() <= 1
        for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum() >= 20


def test_later_shapes_cover_earlier_ones_and_a_quarter_stays_visible():
    covered_any = False
    ys, xs = np.mgrid[:64, :80] + 0.5
    for seed in range(30):
        shapes, owner = place(np.random.default_rng(seed), (64, 80), 5, 8)
        painted = np.zeros((64, 80), int)
        for number, shape in enumerate(shapes, start=1):
            inside = shape.contains(xs, ys)
            covered_any |= bool((painted[inside] > 0).any())
            painted[inside] = number
        assert np.array_equal(painted, owner)
        for number, shape in enumerate(shapes, start=1):
            assert (owner == number).sum() >= max(20, shape.area / 4)
    assert covered_any


@pytest.mark.parametrize("label", [1, 2, 3])
@pytest.mark.parametrize(("cos", "sin"), [(1.0, 0.0), (0.6, 0.8)])
def test_shapes_have_their_area_and_centre(label, cos, sin):
    shape = Shape(label, 200.5, 190.5, 120.0, 50.0, cos, sin)
    ys, xs = np.mgrid[:400, :400] + 0.5
    inside = shape.contains(xs, ys)
    assert inside.sum() == pytest.approx(shape.area, rel=0.015)
    assert xs[inside].mean() == pytest.approx(200.5, abs=0.5)
    assert ys[inside].mean() == pytest.approx(190.5, abs=0.5)


def test_a_pixel_is_inside_iff_its_centre_is():
    ys, xs = np.mgrid[:4, :4] + 0.5
    inside = Shape(2, 2.0, 2.0, 0.5, 1.5, 1.0, 0.0).contains(xs, ys)
    assert inside.astype(int).tolist() == [[0, 1, 1, 0]] * 4
    assert Shape(2, 2.0, 2.0, 0.49, 1.5, 1.0, 0.0).contains(xs, ys).sum() == 0
    # Apex up: half width 2 at the base.
    triangle = Shape(3, 2.0, 8 / 3, 2.0, 4 / 3, 1.0, 0.0).contains(xs, ys)
    assert triangle.astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]


def test_every_class_and_count_occurs():
    dataset = Shapes(120, image_size=(64, 64), max_objects=3, min_objects=0)
    counts = {len(target["labels"]) for _, target in dataset}
    assert counts == {0, 1, 2, 3}
    assert {label for _, target in dataset for label in target["labels"].tolist()} == {1, 2, 3}
    empty = next(target for _, target in dataset if not len(target["labels"]))
    assert (tuple(empty["boxes"].shape), tuple(empty["masks"].shape)) == ((0, 4), (0, 64, 64))


def test_coco_equals_the_items():
    dataset = Shapes(6, image_size=(48, 56))
    assert dataset.coco is dataset.coco
    coco = COCO()
    coco.dataset = dataset.coco
    coco.createIndex()
    for image_id, (_, target) in zip(dataset.image_ids, dataset, strict=True):
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert [a["category_id"] for a in annotations] == target["labels"].tolist()
        assert all(isinstance(a["segmentation"]["counts"], str) for a in annotations)
        masks = np.stack([mask_utils.decode(a["segmentation"]) for a in annotations])
        assert np.array_equal(masks, target["masks"].numpy())
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        assert corners == target["boxes"].tolist()
        assert [a["area"] for a in annotations] == target["area"].tolist()
    assert min(annotation["id"] for annotation in dataset.coco["annotations"]) == 1


def test_transforms_come_last_and_not_into_coco():
    dataset = Shapes(2, transforms=lambda image, target: (image * 0, {"labels": target["labels"] + 1}))
    image, target = dataset[0]
    assert image.max() == 0
    assert (target["labels"] == Shapes(2)[0][1]["labels"] + 1).all()
    assert dataset.coco == Shapes(2).coco


@pytest.mark.parametrize(
    "arguments",
    [{"length": -1}, {"seed": -1}, {"image_size": (31, 64)}, {"max_objects": 2, "min_objects": 3}, {"min_objects": -1}],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).split("_")[-1]):
        Shapes(**{"length": 3, **arguments})


def test_index_out_of_range():
    with pytest.raises(IndexError, match="3 images"):
        Shapes(3)[3]
