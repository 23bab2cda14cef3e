import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from fastmrcnn.data import CocoDetection, DataError, HorizontalFlip, collate, left_right_pairs
from fastmrcnn.data.records import AnnotationChecker, check_image, check_keypoints, read_coco

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# Height 6, width 8. Object 11 covers columns 1..3 of rows 2..4, in each of the three forms.
MASK = np.zeros((6, 8), np.uint8)
MASK[2:5, 1:4] = 1
POLYGON = [[1, 2, 4, 2, 4, 5, 1, 5]]
UNCOMPRESSED = {"size": [6, 8], "counts": [8, 3, 3, 3, 3, 3, 25]}
COMPRESSED = {"size": [6, 8], "counts": mask_utils.encode(np.asfortranarray(MASK))["counts"].decode()}
PIXELS = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def write(folder, coco, name="annotations.json"):
    path = folder / name
    path.write_text(json.dumps(coco))
    return path


@pytest.fixture
def coco(tmp_path):
    """Two images, one of them empty, in tmp_path/images; category ids 7 and 3."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.fromarray(PIXELS).save(tmp_path / "images" / "one.png")
    Image.fromarray(PIXELS[:4]).save(tmp_path / "images" / "sub" / "two.png")
    box = {"image_id": 5, "bbox": [1, 2, 3, 3], "iscrowd": 0, "area": 9, "segmentation": POLYGON}
    return {
        "images": [
            {"id": 9, "file_name": "sub/two.png", "height": 4, "width": 8},
            {"id": 5, "file_name": "one.png", "height": 6, "width": 8},
        ],
        "annotations": [
            {**box, "id": 11, "category_id": 7, "keypoints": [1, 2, 2, 3, 4, 1, 0, 0, 0]},
            {**box, "id": 12, "category_id": 3, "bbox": [-1.5, 0, 9.5, 6], "area": 40.5},
            {**box, "id": 13, "category_id": 3, "iscrowd": 1, "segmentation": UNCOMPRESSED},
        ],
        "categories": [{"id": 7, "name": "hand", "keypoints": ["left_a", "right_a", "tip"]}, {"id": 3, "name": "car"}],
    }


def test_item(tmp_path, coco):
    dataset = CocoDetection(tmp_path / "images", write(tmp_path, coco), keypoints=True)
    image, target = dataset[0]
    assert torch.equal(image, torch.from_numpy(PIXELS.transpose(2, 0, 1)).float() / 255)
    assert target["image_id"] == 5
    expected = {
        "boxes": torch.tensor([[1.0, 2, 4, 5], [0, 0, 8, 6]]),
        "labels": torch.tensor([2, 1]),
        "masks": torch.from_numpy(np.stack([MASK, MASK])),
        "keypoints": torch.tensor([[[1.0, 2, 2], [3, 4, 1], [0, 0, 0]], [[0.0, 0, 0]] * 3]),
        "area": torch.tensor([9.0, 40.5]),
        "iscrowd": torch.zeros(2, dtype=torch.uint8),
    }
    assert set(target) == {*expected, "image_id"}
    for key, value in expected.items():
        assert target[key].dtype == value.dtype, key
        assert torch.equal(target[key], value), key


def test_image_without_objects(tmp_path, coco):
    _, target = CocoDetection(tmp_path / "images", write(tmp_path, coco), keypoints=True)[1]
    assert target["image_id"] == 9
    shapes = {key: tuple(value.shape) for key, value in target.items() if key != "image_id"}
    expected = {"boxes": (0, 4), "labels": (0,), "masks": (0, 4, 8), "keypoints": (0, 3, 3), "area": (0,)}
    assert shapes == {**expected, "iscrowd": (0,)}
    assert target["labels"].dtype == torch.int64
    assert target["masks"].dtype == torch.uint8


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_as_bytes_and_of_other_channels(tmp_path, coco, channels):
    options = {"keypoints": True, "channels": channels}
    floats = CocoDetection(tmp_path / "images", write(tmp_path, coco), **options)
    as_bytes = CocoDetection(tmp_path / "images", write(tmp_path, coco), as_bytes=True, **options)
    for (image, target), (pixels, same) in zip(floats, as_bytes, strict=True):
        assert (image.dtype, pixels.dtype, pixels.shape[0]) == (torch.float32, torch.uint8, channels)
        assert torch.equal(pixels, (image * 255).round().byte())
        assert all(torch.equal(torch.as_tensor(target[key]), torch.as_tensor(same[key])) for key in target)
    with pytest.raises(ValueError, match="channels must be positive"):
        CocoDetection(tmp_path / "images", write(tmp_path, coco), channels=0)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_unreadable_images_have_a_rule_of_their_own(tmp_path, coco, on_error):
    def build(on_unreadable):
        file = write(tmp_path, coco)
        return CocoDetection(tmp_path / "images", file, on_error=on_error, on_unreadable=on_unreadable)

    lenient, strict, default = build("skip"), build("raise"), build(None)
    (tmp_path / "images" / "one.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"image 5: .*one\.png: not a readable image"):
        strict[0]
    with pytest.warns(UserWarning, match=r"image 5: .*one\.png"):
        assert lenient[0][1]["image_id"] == 9
    assert default.on_unreadable == on_error
    with pytest.raises(ValueError, match="on_unreadable must be"):
        build("never")


def test_attributes(tmp_path, coco):
    dataset = CocoDetection(str(tmp_path / "images"), str(write(tmp_path, coco)), keypoints=True)
    assert (dataset.category_ids, dataset.class_names, dataset.num_classes) == ([3, 7], ["car", "hand"], 3)
    assert (len(dataset), dataset.image_ids) == (2, [5, 9])
    assert (dataset.num_keypoints, dataset.keypoint_names) == (3, ["left_a", "right_a", "tip"])
    assert (dataset.image_size(0), dataset.image_size(1)) == ((6, 8), (4, 8))
    assert dataset.image_path(1) == tmp_path / "images" / "sub" / "two.png"
    assert dataset.coco == coco  # the crowd is still there
    boxes_only = CocoDetection(tmp_path / "images", write(tmp_path, coco), masks=False)
    assert boxes_only.num_keypoints == 0
    assert "masks" not in boxes_only[0][1]
    assert "keypoints" not in boxes_only[0][1]
    with pytest.raises(IndexError, match="2 images"):
        dataset[2]


@pytest.mark.parametrize("form", [POLYGON, UNCOMPRESSED, COMPRESSED, [POLYGON[0][:6], [1, 2, 4, 5, 1, 5]]])
def test_every_segmentation_form_gives_the_same_mask(tmp_path, coco, form):
    coco["annotations"] = [{**coco["annotations"][0], "segmentation": form}]
    del coco["annotations"][0]["area"], coco["annotations"][0]["iscrowd"]
    dataset = CocoDetection(tmp_path / "images", write(tmp_path, coco))
    assert torch.equal(dataset[0][1]["masks"], torch.from_numpy(MASK[None]))
    assert dataset[0][1]["area"].tolist() == [9]
    assert (dataset.coco["annotations"][0]["area"], dataset.coco["annotations"][0]["iscrowd"]) == (9, 0)


def test_boxes_only(tmp_path, coco):
    for annotation in coco["annotations"]:
        del annotation["segmentation"], annotation["area"]
    dataset = CocoDetection(tmp_path / "images", write(tmp_path, coco), masks=False)
    assert dataset[0][1]["area"].tolist() == [9, 57]


def test_number_of_keypoints_from_the_annotations(tmp_path, coco):
    del coco["categories"][0]["keypoints"]
    dataset = CocoDetection(tmp_path / "images", write(tmp_path, coco), keypoints=True)
    assert (dataset.num_keypoints, dataset.keypoint_names) == (3, [])
    assert dataset[0][1]["keypoints"].shape == (2, 3, 3)
    del coco["annotations"][0]["keypoints"]
    with pytest.raises(DataError, match=r"annotations\.json: .*keypoints"):
        CocoDetection(tmp_path / "images", write(tmp_path, coco), keypoints=True)


def test_transforms_and_loader(tmp_path, coco):
    dataset = CocoDetection(
        tmp_path / "images",
        write(tmp_path, coco),
        transforms=lambda image, target: (image + 1, {**target, "seen": True}),
    )
    images, targets = next(iter(DataLoader(dataset, batch_size=2, collate_fn=collate)))
    assert [tuple(image.shape) for image in images] == [(3, 6, 8), (3, 4, 8)]
    assert min(image.min() for image in images) >= 1
    assert [target["image_id"] for target in targets] == [5, 9]
    assert all(target["seen"] for target in targets)


def test_horizontal_flip(tmp_path, coco):
    dataset = CocoDetection(tmp_path / "images", write(tmp_path, coco), keypoints=True)
    pairs = left_right_pairs(dataset.keypoint_names)
    assert pairs == [(0, 1)]
    image, target = dataset[0]
    kept = {key: torch.as_tensor(value).clone() for key, value in target.items()}
    flipped, mirrored = HorizontalFlip(1.0, keypoint_pairs=pairs)(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert mirrored["boxes"].tolist() == [[4, 2, 7, 5], [0, 0, 8, 6]]
    assert torch.equal(mirrored["masks"], target["masks"].flip(-1))
    assert mirrored["keypoints"][0].tolist() == [[5, 4, 1], [7, 2, 2], [0, 0, 0]]
    assert mirrored["labels"].tolist() == [2, 1]
    assert all(torch.equal(torch.as_tensor(target[key]), kept[key]) for key in kept)  # input untouched
    back, again = HorizontalFlip(1.0, keypoint_pairs=pairs)(flipped, mirrored)
    assert torch.equal(back, image)
    assert all(torch.equal(torch.as_tensor(again[key]), kept[key]) for key in kept)
    assert HorizontalFlip(0.0, keypoint_pairs=())(image, target)[0] is image
    with pytest.raises(ValueError, match="keypoint_pairs"):
        HorizontalFlip()(image, target)
    with pytest.raises(ValueError, match="p must be"):
        HorizontalFlip(1.5)


def real(*parts):
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data set {'/'.join(parts)} is not at {SHARED_DATA}")
    return path


@pytest.mark.parametrize(
    ("folder", "name", "keypoints"),
    [
        ("coco_cc/train", "coco_cc/annotations/instances_train.json", False),
        ("coco_cc/train", "coco_cc/annotations/person_keypoints_train.json", True),
        ("nuclei/val", "nuclei/annotations/instances_val.json", False),
    ],
)
def test_real_data_reads_as_pycocotools_does(folder, name, keypoints):
    file = real(*name.split("/"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = CocoDetection(real(*folder.split("/")), file, keypoints=keypoints)
    reference = COCO(str(file))
    assert dataset.coco == reference.dataset
    assert dataset.image_ids == sorted(reference.imgs)
    for i in range(0, len(dataset), 8):
        image, target = dataset[i]
        annotations = reference.loadAnns(reference.getAnnIds(dataset.image_ids[i], iscrowd=False))
        assert image.shape[1:] == dataset.image_size(i) == target["masks"].shape[1:]
        assert len(target["labels"]) == len(annotations)
        for annotation, mask, label in zip(annotations, target["masks"], target["labels"], strict=True):
            assert np.array_equal(reference.annToMask(annotation), mask.numpy())
            assert dataset.category_ids[label - 1] == annotation["category_id"]


@pytest.mark.parametrize("name", ["instances_val2014_100.json", "gt_dataset.json", "keypoints_gt.json"])
def test_no_real_annotation_is_refused(name):
    path = real("cocoeval_fixtures", name)
    coco = read_coco(path)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    masks = "keypoints" not in name
    categories = [category["id"] for category in coco["categories"]]
    checker = AnnotationChecker(coco["annotations"], sizes, categories, masks=masks)
    for image in coco["images"]:
        check_image(image)
    for position, annotation in enumerate(coco["annotations"]):
        checker.check(position, annotation)
        if not masks:
            check_keypoints(annotation["keypoints"], 17)


def test_images_may_be_linked_folders(tmp_path, coco):
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    assert len(CocoDetection(tmp_path / "linked", write(tmp_path, coco))) == 2
    shutil.copy(tmp_path / "images" / "one.png", tmp_path / "images" / "copy.png")
    (tmp_path / "images" / "inner.png").symlink_to("copy.png")
    coco["images"][1]["file_name"] = "inner.png"
    coco["images"][0]["file_name"] = "sub\\two.png"
    dataset = CocoDetection(tmp_path / "images", write(tmp_path, coco))
    assert dataset[0][0].shape == (3, 6, 8)
    assert dataset.image_path(1) == tmp_path / "images" / "sub" / "two.png"
