"""Bad input: every kind raises naming file and record, and is dropped and counted when skipping."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

from fastmrcnn.data import CocoDetection, DataError, MissingFile, MissingImage
from fastmrcnn.data.masks import total_pixels

SIZE = (16, 20)
GOOD_RLE = mask_utils.encode(np.asfortranarray(np.eye(*SIZE, dtype=np.uint8)))["counts"].decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    Image.fromarray(pixels).save(tmp_path / "outside.png")
    return tmp_path


@pytest.fixture
def coco():
    def annotation(id_, image_id):
        polygon = [[2, 2, 9, 2, 9, 9, 2, 9]]
        box = {"bbox": [2, 2, 7, 7], "area": 49, "iscrowd": 0, "segmentation": polygon}
        return {"id": id_, "image_id": image_id, "category_id": 1, **box, "keypoints": [3, 3, 2, 4, 4, 1]}

    return {
        "images": [
            {"id": id_, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for id_, name in [(1, "a.png"), (2, "b.png"), (3, "c.png")]
        ],
        "annotations": [annotation(101, 1), annotation(102, 2), annotation(103, 2)],
        "categories": [{"id": 1, "name": "thing", "keypoints": ["head", "tail"]}],
    }


def build(folder, coco, **options):
    path = folder / "gt.json"
    path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
    return CocoDetection(folder / "images", path, keypoints=True, **options)


def rle(counts, size=SIZE):
    return {"size": list(size), "counts": counts}


NAN, INF = float("nan"), float("inf")
BAD_ANNOTATIONS = [
    ({"image_id": 99}, "unknown image", r"image_id 99"),
    ({"image_id": [1]}, "unknown image", r"image_id \[1\]"),
    ({"category_id": 8}, "unknown category", r"category_id 8.*\[1\]"),
    ({"id": "x"}, "annotation record", r"id must be an integer, got 'x'"),
    ({"iscrowd": 2}, "annotation record", r"iscrowd must be 0 or 1, got 2"),
    ({"area": NAN}, "annotation record", r"area .*nan"),
    ({"bbox": None}, "box", r"bbox .*four finite numbers, got None"),
    ({"bbox": [1, 2, 3]}, "box", r"four finite"),
    ({"bbox": ["1", "2", "3", "4"]}, "box", r"four finite"),
    ({"bbox": [1, 2, NAN, 3]}, "box", r"four finite"),
    ({"bbox": [1, -INF, 2, INF]}, "box", r"four finite"),
    ({"bbox": [1, 2, 10**400, 3]}, "box", r"four finite"),
    ({"bbox": [1, 2, 0, 3]}, "box", r"positive width and height"),
    ({"bbox": [1, 2, 3, -1]}, "box", r"positive width and height"),
    ({"bbox": [-2.1, 2, 5, 5]}, "box", r"leaves the image \(20x16.*2 pixels"),
    ({"bbox": [15, 2, 7.1, 5]}, "box", r"leaves the image"),
    ({"bbox": [1, 2, 5, 16.1]}, "box", r"leaves the image"),
    ({"bbox": [20, 2, 1, 5]}, "box", r"thinner than 0.001"),
    ({"segmentation": None}, "segmentation", r"no segmentation.*masks=False"),
    ({"segmentation": []}, "segmentation", r"no segmentation"),
    ({"segmentation": 7}, "segmentation", r"neither a list of polygons nor an RLE"),
    ({"segmentation": [1, 2, 3, 4, 5, 6]}, "segmentation", r"neither a list of polygons nor an RLE"),
    ({"segmentation": [[1, 1, 5, 5]]}, "segmentation", r"4 coordinates; accepted is an even number from 6"),
    ({"segmentation": [[2, 2, 9, 2, 9, 9], [1, 1, 2, 2, 3]]}, "segmentation", r"5 coordinates"),
    ({"segmentation": [[1, 1, 5, 5, 2, 8, 3]]}, "segmentation", r"7 coordinates"),
    ({"segmentation": [[1, 1, NAN, 5, 2, 8]]}, "segmentation", r"finite"),
    ({"segmentation": [[1, 1, "5", 5, 2, 8]]}, "segmentation", r"finite"),
    ({"segmentation": [[1, 1, 1e9, 5, 2, 8]]}, "segmentation", r"reaches 1 to 1e\+09"),
    ({"segmentation": rle(GOOD_RLE, (20, 16))}, "segmentation", r"size \[20, 16\] differs .*\[16, 20\]"),
    ({"segmentation": {"counts": GOOD_RLE}}, "segmentation", r"size None"),
    ({"segmentation": rle(None)}, "segmentation", r"counts must be a string or a list"),
    ({"segmentation": rle([16 * 20 - 1])}, "segmentation", r"cover 319 pixels.*320"),
    ({"segmentation": rle([330, -10])}, "segmentation", r"non-negative integers"),
    ({"segmentation": rle([319.5, 0.5])}, "segmentation", r"non-negative integers"),
    ({"segmentation": rle(GOOD_RLE[:-2])}, "segmentation", r"cover \d+ pixels|do not decode"),
    ({"segmentation": rle("o" * 500)}, "segmentation", r"do not decode"),
    ({"segmentation": rle(GOOD_RLE + "P")}, "segmentation", r"do not decode"),
    ({"segmentation": rle("\u00ff\ud800 ")}, "segmentation", r"do not decode"),
    ({"segmentation": rle("")}, "segmentation", r"cover 0 pixels"),
    ({"keypoints": [1, 2, 2]}, "keypoints", r"2 x \(x, y, visibility\), 6 finite numbers, got 3"),
    ({"keypoints": [1, 2, 2, 3, INF, 2]}, "keypoints", r"6 finite numbers"),
    ({"keypoints": [1, 2, 2, 3, 4, 5]}, "keypoints", r"visibilities must be 0, 1 or 2"),
]


@pytest.mark.parametrize(("change", "kind", "says"), BAD_ANNOTATIONS)
def test_bad_annotation(folder, coco, change, kind, says):
    coco["annotations"][1].update(change)
    with pytest.raises(DataError, match=rf"gt\.json: annotations\[1\] \(id .*\): .*{says}"):
        build(folder, coco)
    with pytest.warns(
        UserWarning, match=rf"(?s)skipped 1 records.*1 x {kind}, first: .*annotations\[1\].*{says}"
    ) as seen:
        dataset = build(folder, coco, on_error="skip")
    assert len(seen) == 1
    assert dataset.skipped == {kind: 1}
    assert [annotation["id"] for annotation in dataset.coco["annotations"]] == [101, 103]
    assert len(dataset[1][1]["labels"]) == 1


def test_a_box_may_poke_out_by_two_pixels(folder, coco):
    coco["annotations"][0]["bbox"] = [-2, -1, 24, 18]
    assert build(folder, coco)[0][1]["boxes"].tolist() == [[0, 0, 20, 16]]


def test_a_polygon_of_monstrous_length_is_refused_unrasterised(folder, coco):
    coco["annotations"][0]["segmentation"] = [[-16, 0, 40, 0] * 60_000]
    with pytest.raises(DataError, match=r"annotations\[0\].*boundary of more than"):
        build(folder, coco)


BAD_IMAGES = [
    ({"file_name": "gone.png"}, "missing image", r"'gone\.png': no such file in .*images"),
    ({"file_name": "gone/b.png"}, "missing image", r"no such file"),
    ({"file_name": "b.png/x.png"}, "missing image", r"no such file"),
    ({"file_name": "."}, "missing image", r"no such file"),
    ({"file_name": "b\0.png"}, "missing image", r"no such file"),
    ({"file_name": "\0/b.png"}, "missing image", r"no such file"),
    ({"file_name": "../outside.png"}, "image outside the folder", r"leads out of .*images.*relative"),
    ({"file_name": "..\\outside.png"}, "image outside the folder", r"leads out of"),
    ({"file_name": "x/../b.png"}, "image outside the folder", r"leads out of"),
    ({"file_name": ".."}, "image outside the folder", r"leads out of"),
    ({"file_name": "/etc/passwd"}, "image outside the folder", r"leads out of"),
    ({"file_name": "C:\\b.png"}, "image outside the folder", r"leads out of"),
    ({"file_name": "\\\\server\\share\\b.png"}, "image outside the folder", r"leads out of"),
    ({"file_name": "link.png"}, "image outside the folder", r"leads out of"),
    ({"file_name": "up/outside.png"}, "image outside the folder", r"leads out of"),
    ({"file_name": None}, "image record", r"file_name must be a non-empty string, got None"),
    ({"height": 0}, "image record", r"height 0 and width 20 must be positive integers"),
    ({"height": 16.5}, "image record", r"positive integers"),
    ({"width": True}, "image record", r"positive integers"),
    ({"height": 10**6, "width": 10**6}, "image record", r"178,956,970"),
]


@pytest.mark.parametrize(("change", "kind", "says"), BAD_IMAGES)
def test_bad_image_record(folder, coco, change, kind, says):
    (folder / "images" / "link.png").symlink_to(folder / "outside.png")
    (folder / "images" / "up").symlink_to(folder)
    coco["images"][1].update(change)
    with pytest.raises(DataError, match=rf"gt\.json: images\[1\] \(id 2\): .*{says}") as raised:
        build(folder, coco)
    assert isinstance(raised.value, MissingImage) == (kind == "missing image")
    with pytest.warns(
        UserWarning, match=rf"(?s)skipped 3 records.*1 x {kind}, first: .*{says}.*2 x annotation of"
    ) as seen:
        dataset = build(folder, coco, on_error="skip")
    assert len(seen) == 1
    assert dataset.skipped == {kind: 1, "annotation of a skipped image": 2}
    assert dataset.image_ids == [image["id"] for image in dataset.coco["images"]] == [1, 3]
    assert [annotation["id"] for annotation in dataset.coco["annotations"]] == [101]


def change(coco, key, value):
    return {**coco, key: value}


STRUCTURAL = [
    (lambda coco: "{", r"not JSON"),
    (lambda coco: "[" * 100_000, r"not JSON"),
    (lambda coco: [], r"top level is a list.*\"images\""),
    (lambda coco: {key: coco[key] for key in ("annotations", "categories")}, r'"images" is missing'),
    (lambda coco: {key: coco[key] for key in ("images", "categories")}, r'"annotations" is missing'),
    (lambda coco: {key: coco[key] for key in ("images", "annotations")}, r'"categories" is missing'),
    (lambda coco: change(coco, "images", {"1": {}}), r'"images" is a dict; accepted is a list'),
    (lambda coco: change(coco, "annotations", [3]), r"annotations\[0\] is 3; accepted is an object"),
    (lambda coco: change(coco, "images", coco["images"] * 2), r"images\[0\] and images\[3\] have the same id 1"),
    (lambda coco: change(coco, "annotations", coco["annotations"] * 2), r"annotations\[0\] .* same id 101"),
    (lambda coco: change(coco, "categories", coco["categories"] * 2), r"categories\[0\] .* same id 1"),
    (lambda coco: change(coco, "categories", []), r'"categories" is empty'),
    (lambda coco: change(coco, "categories", [{"id": 1}]), r"categories\[0\] .*name must be a string, got None"),
    (lambda coco: change(coco, "categories", [{"id": "1", "name": "a"}]), r"categories\[0\].*integer"),
    (lambda coco: change(coco, "images", []), r"no usable image among the 0"),
]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(("break_it", "says"), STRUCTURAL)
def test_what_is_not_coco_always_raises(folder, coco, break_it, says, on_error):
    with pytest.raises(DataError, match=rf"gt\.json: .*{says}"):
        build(folder, break_it(coco), on_error=on_error)


def test_missing_folder_and_file(folder, coco):
    build(folder, coco)
    with pytest.raises(MissingFile, match="nowhere"):
        CocoDetection(folder / "nowhere", folder / "gt.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        CocoDetection(folder / "images", folder / "none.json")
    with pytest.raises(ValueError, match=r"on_error.*ignore"):
        CocoDetection(folder / "images", folder / "gt.json", on_error="ignore")


def test_good_data_is_silent(folder, coco):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(folder, coco, on_error="skip").skipped == {}


def test_one_warning_counts_all_kinds(folder, coco):
    coco["images"][0]["file_name"] = "gone.png"
    coco["annotations"][1]["bbox"] = [1, 1, 0, 1]
    coco["annotations"][2]["category_id"] = 5
    with pytest.warns(UserWarning, match="skipped 4 records") as seen:
        dataset = build(folder, coco, on_error="skip")
    assert len(seen) == 1
    counts = {"missing image": 1, "annotation of a skipped image": 1, "box": 1, "unknown category": 1}
    assert dataset.skipped == counts


def spoil(folder, name):
    path = folder / "images" / name
    path.write_bytes(path.read_bytes()[:200])


def test_truncated_image(folder, coco):
    spoil(folder, "b.png")
    dataset = build(folder, coco)
    with pytest.raises(DataError, match=r"gt\.json: image 2: .*b\.png: not a readable image"):
        dataset[1]

    dataset = build(folder, coco, on_error="skip")
    with pytest.warns(UserWarning, match=r"image 2: .*b\.png: not a readable") as seen:
        assert dataset[1][1]["image_id"] == 3
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per file
        assert dataset[1][1]["image_id"] == 3
    assert dataset.skipped == {"unreadable image": 1}

    spoil(folder, "c.png")
    with pytest.warns(UserWarning, match="image 3"):
        assert dataset[1][1]["image_id"] == 1  # around the end
    (folder / "images" / "a.png").unlink()
    with pytest.warns(UserWarning, match="image 1"), pytest.raises(DataError, match="none of its 3 images"):
        dataset[2]


def test_image_of_another_size(folder, coco):
    coco["images"][0].update(height=20, width=21)
    with pytest.raises(DataError, match=r"image 1: .*a\.png: the image is 20x16.*declares 21x20"):
        build(folder, coco)[0]


@given(st.lists(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=30), max_size=5))
def test_compressed_counts_of_any_mask_cover_it(masks):
    arrays = [np.asfortranarray(mask, dtype=np.uint8) for mask in masks]
    assert total_pixels([mask_utils.encode(array)["counts"] for array in arrays]) == [array.size for array in arrays]


@given(st.lists(st.integers(0, 2**27), min_size=1, max_size=12))
def test_compressed_counts_of_any_runs(runs):
    width = sum(runs)
    packed = mask_utils.frPyObjects({"size": [1, width], "counts": runs}, 1, width)["counts"]
    assert total_pixels([b"", packed, packed[:-1] + b"P", packed]) == [0, width, -1, width]


def packed_value(value, digits):
    """One number of a counts string, `digits` characters long: pycocotools writes no negative or padded ones."""
    chars = [(value >> 5 * place & 0x1F) | (0x20 if place < digits - 1 else 0) for place in range(digits)]
    return bytes(char + 48 for char in chars)


def test_hostile_counts_do_not_decode():
    assert total_pixels([packed_value(320, 3)]) == [320]
    assert total_pixels([packed_value(320, 3) + packed_value(-10, 1)]) == [-1]
    assert total_pixels([packed_value(320, 3) + packed_value(2**32, 7)]) == [-1]
    assert total_pixels([packed_value(320, 7), packed_value(320, 8)]) == [320, -1]
    # Fourth value: a difference to the second, 5 - 6 = -1.
    assert total_pixels([b"".join(packed_value(value, 2) for value in (3, 5, 3, -6))]) == [-1]


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_total_of_a_string_does_not_depend_on_its_neighbours(strings):
    assert total_pixels(strings) == [total_pixels([string])[0] for string in strings]
