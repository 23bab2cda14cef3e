import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from coco_problems import cocoeval, random_problem
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastmrcnn.coco_eval import CocoMetrics, evaluate_coco

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cocoeval_fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"COCO evaluation fixtures are not at {FIXTURES}")

CASES = {
    "val2014_100/fakebbox100/bbox/useCats=1": ("instances_val2014_100", "instances_val2014_fakebbox100_results"),
    "val2014_100/fakebbox100/bbox/useCats=0": ("instances_val2014_100", "instances_val2014_fakebbox100_results"),
    "val2014_100/fakesegm100/segm/useCats=1": ("instances_val2014_100", "instances_val2014_fakesegm100_results"),
    "val2014_100/fakesegm100/segm/useCats=0": ("instances_val2014_100", "instances_val2014_fakesegm100_results"),
    "gt_dataset/dt_dataset/bbox": ("gt_dataset", "dt_dataset"),
    "gt_dataset/dt_dataset/segm": ("gt_dataset", "dt_dataset"),
    "keypoints_gt/keypoints_dt/keypoints": ("keypoints_gt", "keypoints_dt"),
}


def files_of(case):
    return [FIXTURES / f"{name}.json" for name in CASES[case]]


@needs_fixtures
def test_every_expected_entry_is_a_case():
    assert set(json.loads((FIXTURES / "expected_stats.json").read_text())["stats"]) == set(CASES)


@needs_fixtures
@pytest.mark.parametrize("case", CASES)
def test_fixture_numbers(case):
    expected = json.loads((FIXTURES / "expected_stats.json").read_text())
    metrics = evaluate_coco(*files_of(case), case.split("/")[2], use_categories=not case.endswith("useCats=0"))
    assert metrics.stats == pytest.approx(expected["stats"][case], abs=1e-12)
    if metrics.iou_type != "keypoints":
        assert list(metrics.as_dict()) == expected["order"]


@needs_fixtures
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("useCats=0")])
def test_stats_and_table_equal_those_of_summarize(case):
    truth_file, results_file = files_of(case)
    iou_type = case.split("/")[2]
    metrics = evaluate_coco(truth_file, results_file, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        evaluator = COCOeval(truth, truth.loadRes(str(results_file)), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluator.summarize()
    assert metrics.stats == tuple(evaluator.stats)
    assert metrics.table() == printed.getvalue().rstrip("\n")


@needs_fixtures
@pytest.mark.parametrize("limit", [3, 300])
def test_other_limits_equal_cocoeval_with_these_limits(limit):
    truth_file, results_file = files_of("val2014_100/fakebbox100/bbox/useCats=1")
    metrics = evaluate_coco(truth_file, results_file, "bbox", max_detections=limit)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        evaluator = COCOeval(truth, truth.loadRes(str(results_file)), "bbox")
        evaluator.params.maxDets = [limit]
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][:, :, :, 0, 0]
    assert metrics.ap == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    recall = evaluator.eval["recall"][:, :, 0, 0]
    assert metrics.as_dict()[f"AR{limit}"] == pytest.approx(recall[recall > -1].mean(), abs=1e-12)


def truth_of(boxes, *, categories=("thing",), size=(100, 100), **extra):
    """One image; boxes is a list of (category index, x, y, width, height)."""
    return {
        "images": [{"id": 7, "height": size[0], "width": size[1]}],
        "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(categories)],
        "annotations": [
            {
                "id": i,
                "image_id": 7,
                "category_id": 10 * (k + 1),
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [
                    [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]
                ],
                **extra,
            }
            for i, (k, *box) in enumerate(boxes)
        ],
    }


def found(box, score, category_id=10):
    return {"image_id": 7, "category_id": category_id, "bbox": list(box), "score": score}


def test_numbers_worked_out_by_hand():
    # Two objects. A false alarm scores highest, then one hit with IoU 1, then one with IoU 0.6 (box 60% as wide).
    truth = truth_of([(0, 0, 0, 20, 20), (0, 50, 50, 20, 20)])
    results = [found((80, 0, 10, 10), 0.9), found((0, 0, 20, 20), 0.8), found((50, 50, 12, 20), 0.7)]
    metrics = evaluate_coco(truth, results, "bbox")
    # IoU 0.50, 0.55, 0.60: precision 2/3 at every recall. Above: 1/2 up to recall 0.5, which is 51 of 101 points.
    high = 51 / 101 / 2
    assert metrics.ap50 == pytest.approx(2 / 3)
    assert metrics.ap75 == pytest.approx(high)
    assert metrics.ap == pytest.approx((3 * 2 / 3 + 7 * high) / 10)
    numbers = metrics.as_dict()
    assert numbers["AR1"] == 0
    assert numbers["AR100"] == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    assert numbers["APm"] == numbers["ARl"] == -1
    assert metrics.per_class == {"thing": pytest.approx(metrics.ap)}
    assert metrics.classes["thing"] == pytest.approx((metrics.ap, metrics.ap50, metrics.ap75, 2))


def test_an_annotation_with_id_0_can_be_found():
    truth = truth_of([(0, 0, 0, 20, 20)])
    assert truth["annotations"][0]["id"] == 0
    assert evaluate_coco(truth, [found((0, 0, 20, 20), 0.5)], "bbox").ap == pytest.approx(1)


def test_ap_per_class_and_without_categories():
    truth = truth_of([(0, 0, 0, 20, 20), (1, 50, 50, 20, 20)], categories=("cat", "dog", "never"))
    swapped = [found((0, 0, 20, 20), 0.9, 20), found((50, 50, 20, 20), 0.8, 20)]
    metrics = evaluate_coco(truth, swapped, "bbox")
    assert metrics.per_class == {"cat": 0, "dog": pytest.approx(0.5), "never": -1}
    assert metrics.class_table().splitlines() == [
        " class  objects     AP   AP50   AP75",
        " cat          1  0.000  0.000  0.000",
        " dog          1  0.500  0.500  0.500",
        " never        0      -      -      -",
    ]
    agnostic = evaluate_coco(truth, swapped, "bbox", use_categories=False)
    assert agnostic.ap == pytest.approx(1)
    assert agnostic.per_class == agnostic.classes == {}
    assert agnostic.class_table() == ""


def test_categories_of_the_same_name_stay_apart():
    truth = truth_of([(0, 0, 0, 20, 20)], categories=("cat", "cat"))
    assert set(evaluate_coco(truth, [], "bbox").per_class) == {"cat (10)", "cat (20)"}


def test_max_detections_keeps_the_best_scored():
    truth = truth_of([(0, 0, 0, 20, 20)])
    results = [found((80, 0, 10, 10), 0.9), found((0, 0, 20, 20), 0.8)]
    assert evaluate_coco(truth, results, "bbox", max_detections=1).ap == 0
    assert evaluate_coco(truth, results, "bbox", max_detections=2).ap == pytest.approx(0.5)
    with pytest.raises(ValueError, match="max_detections"):
        evaluate_coco(truth, results, "bbox", max_detections=0)


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_no_results_give_zeros(iou_type):
    truth = truth_of([(0, 0, 0, 20, 20)], keypoints=[5, 5, 2] * 17, num_keypoints=17)
    metrics = evaluate_coco(truth, [], iou_type)
    assert metrics.ap == metrics.ap50 == 0
    assert set(metrics.stats) == {0.0, -1.0}  # -1 where there is nothing of that size
    assert len(metrics.table().splitlines()) == len(metrics.stats)


@pytest.mark.parametrize("results", [[], [found((0, 0, 20, 20), 0.8)]])
def test_no_ground_truth_gives_minus_ones(results):
    assert evaluate_coco(truth_of([]), results, "bbox").stats == (-1.0,) * 12


def test_fields_that_cocoeval_needs_are_filled_in_and_arguments_left_alone():
    truth = truth_of([(0, 0, 0, 20, 20)])
    for key in ("id", "area", "iscrowd"):
        del truth["annotations"][0][key]
    results = [{**found((0, 0, 20, 20), 0.5), "segmentation": truth["annotations"][0]["segmentation"]}]
    before = copy.deepcopy((truth, results))
    for iou_type in ("bbox", "segm"):
        assert evaluate_coco(truth, results, iou_type).as_dict()["APs"] == pytest.approx(1)
    assert (truth, results) == before


def test_only_the_given_images_count():
    truth = truth_of([(0, 0, 0, 20, 20)])
    truth["images"].append({"id": 8, "height": 100, "width": 100})
    truth["annotations"].append({**truth["annotations"][0], "id": 99, "image_id": 8})
    results = [found((0, 0, 20, 20), 0.5)]
    assert evaluate_coco(truth, results, "bbox").as_dict()["AR100"] == pytest.approx(0.5)
    assert evaluate_coco(truth, results, "bbox", image_ids=[7]).as_dict()["AR100"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"image_ids.*9"):
        evaluate_coco(truth, results, "bbox", image_ids=[7, 9])


def test_mask_area_decides_the_size_of_a_mask_result():
    # The mask is small, its (wrong) box is large: as a false alarm it must count among the small ones only.
    truth = truth_of([(0, 0, 0, 20, 20)])
    mask = np.zeros((100, 100), np.uint8, order="F")
    mask[60:70, 60:70] = 1
    rle = rle_codec.encode(mask)
    alarm = {**found((0, 0, 100, 100), 0.9), "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
    hit = {**found((0, 0, 20, 20), 0.5), "segmentation": truth["annotations"][0]["segmentation"]}
    assert evaluate_coco(truth, [alarm, hit], "segm").as_dict()["APs"] == pytest.approx(0.5)


def test_keypoints_with_another_skeleton():
    points = [10, 10, 2, 20, 10, 2, 15, 20, 2]
    truth = truth_of([(0, 0, 0, 40, 40)], keypoints=points)
    shifted = [{**found((0, 0, 40, 40), 0.5), "keypoints": [v + 4 * (i % 3 == 0) for i, v in enumerate(points)]}]
    # OKS = exp(-d^2 / (2 area (2 sigma)^2)): 4 pixels off in an object of 1600 square pixels.
    oks = np.exp(-16 / (2 * 1600 * (2 * 0.067) ** 2))
    expected = np.mean(np.linspace(0.5, 0.95, 10) <= oks)
    assert 0.1 < expected < 0.9
    assert evaluate_coco(truth, shifted, "keypoints").ap == pytest.approx(expected)
    assert evaluate_coco(truth, shifted, "keypoints", sigmas=[0.5] * 3).ap == pytest.approx(1)
    assert evaluate_coco(truth, shifted, "keypoints", sigmas=[0.01] * 3).ap == 0
    with pytest.raises(ValueError, match="sigmas"):
        evaluate_coco(truth, shifted, "keypoints", sigmas=[0.1] * 17)
    with pytest.raises(ValueError, match=r"results\[0\].*3 flattened"):
        evaluate_coco(truth, [{**shifted[0], "keypoints": points[:6]}], "keypoints")
    with pytest.raises(ValueError, match="use_categories"):
        evaluate_coco(truth, shifted, "keypoints", use_categories=False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image_id": 7, "category_id": 10, "score": 0.5}, r"\[1\]: bbox missing"),
        ({"image_id": 7, "category_id": 10, "bbox": [0, 0, 1, 1]}, r"\[1\]: score missing"),
        ({**found((0, 0, 1, 1), 0.5), "image_id": 8}, r"\[1\]: image_id 8"),
        (found((0, 0, 1, 1), 0.5, 11), r"\[1\]: category_id 11"),
        (found((0, 0, 1, 1), float("nan")), r"\[1\]: score.*nan"),
        (found((0, 0, 1), 0.5), r"\[1\]: bbox must be four numbers"),
        ("text", r"\[1\]: must be an object"),
    ],
)
def test_a_bad_record_is_named_with_its_file(tmp_path, record, message):
    truth = truth_of([(0, 0, 0, 20, 20)])
    results = [found((0, 0, 20, 20), 0.5), record]
    with pytest.raises(ValueError, match=f"results{message}"):
        evaluate_coco(truth, results, "bbox")
    path = tmp_path / "found.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"found.json{message}"):
        evaluate_coco(truth, path, "bbox")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("text", "neither a list of polygons nor an RLE dict"),
        ([], "has no segmentation"),
        ({"size": [100, 100]}, "RLE counts must be"),
        ({"size": [100, 100], "counts": [9999, -1, 2]}, "non-negative integers"),
        ({"size": [100, 100], "counts": "0000~"}, "do not decode"),
        ({"size": [100, 100], "counts": [4]}, "cover 4 pixels"),
        ([[1, 2, 1e30, 4, 5, 6]], "farther than one image size"),
        ({"size": [50, 100], "counts": [5000]}, r"\[50, 100\].*\[100, 100\]"),
    ],
)
def test_a_bad_mask_is_named(segmentation, message):
    result = {**found((0, 0, 20, 20), 0.5), "segmentation": segmentation}
    with pytest.raises(ValueError, match=rf"results\[0\].*{message}"):
        evaluate_coco(truth_of([(0, 0, 0, 20, 20)]), [result], "segm")


def test_bad_files(tmp_path):
    truth = truth_of([(0, 0, 0, 20, 20)])
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        evaluate_coco(truth, tmp_path / "none.json", "bbox")
    (tmp_path / "bad.json").write_text("[{")
    with pytest.raises(ValueError, match=r"bad\.json is not a JSON file"):
        evaluate_coco(tmp_path / "bad.json", [], "bbox")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json: COCO annotations must be an object"):
        evaluate_coco(tmp_path / "list.json", [], "bbox")
    with pytest.raises(ValueError, match="must be a list"):
        evaluate_coco(truth, truth, "bbox")
    with pytest.raises(ValueError, match="iou_type"):
        evaluate_coco(truth, [], "boxes")
    del truth["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=r"ground_truth: annotations\[0\]: bbox missing"):
        evaluate_coco(truth, [], "bbox")


@pytest.mark.parametrize(("iou_type", "objects"), [("bbox", 2), ("segm", 2), ("keypoints", 1)])
def test_crowds_other_images_and_objects_without_keypoints_are_not_counted(iou_type, objects):
    truth = truth_of([(0, 0, 0, 20, 20)] * 3, keypoints=[5, 5, 2] * 17)
    truth["images"].append({"id": 8, "height": 100, "width": 100})
    truth["annotations"].append({**truth["annotations"][0], "image_id": 8})
    truth["annotations"][0]["iscrowd"] = 1
    truth["annotations"][1]["keypoints"] = [0] * 51
    assert evaluate_coco(truth, [], iou_type, image_ids=[7]).classes["thing"].objects == objects


@pytest.mark.parametrize("seed", range(3))
def test_precision_is_that_of_all_areas_and_the_largest_limit_and_no_part_of_comparisons(seed):
    truth, results = random_problem(seed)
    metrics = evaluate_coco(truth, results, "segm")
    np.testing.assert_array_equal(metrics.precision, cocoeval(truth, results, "segm").eval["precision"][..., 0, 2])
    assert metrics.precision[metrics.precision > -1].mean() == metrics.ap
    assert dataclasses.replace(metrics, precision=None) == metrics
    assert "precision" not in repr(metrics)


BACKEND_CASES = [("bbox", True), ("bbox", False), ("segm", True), ("segm", False), ("keypoints", True)]


@pytest.mark.parametrize(("iou_type", "use_categories"), BACKEND_CASES)
@pytest.mark.parametrize("max_detections", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_faster_backend_gives_equal_numbers(seed, max_detections, iou_type, use_categories):
    truth, results = random_problem(seed)
    before = copy.deepcopy((truth, results))
    options = {"max_detections": max_detections, "use_categories": use_categories}
    options["image_ids"] = sorted(image["id"] for image in truth["images"])[seed % 3 :]
    faster, exact = (
        evaluate_coco(truth, results, iou_type, backend=backend, **options)
        for backend in ("faster_coco_eval", "pycocotools")
    )
    assert (truth, results) == before
    assert faster.table() == exact.table()
    assert faster.class_table() == exact.class_table()
    # The two divide counts; pycocotools adds 2.2e-16 to the divisor.
    np.testing.assert_allclose(faster.precision, exact.precision, rtol=0, atol=3e-16)
    assert faster.stats == pytest.approx(exact.stats, abs=1e-15)


@needs_fixtures
@pytest.mark.parametrize("case", CASES)
def test_the_faster_backend_on_the_fixtures(case):
    expected = json.loads((FIXTURES / "expected_stats.json").read_text())
    agnostic = case.endswith("useCats=0")
    metrics = evaluate_coco(
        *files_of(case), case.split("/")[2], use_categories=not agnostic, backend="faster_coco_eval"
    )
    assert metrics.stats == pytest.approx(expected["stats"][case], abs=1e-12)


@pytest.mark.parametrize("results", [[], [found((0, 0, 20, 20), 0.5)]])
@pytest.mark.parametrize("boxes", [[], [(0, 0, 0, 20, 20)]])
def test_the_faster_backend_with_little_to_do(boxes, results, capfd):
    truth = truth_of(boxes)
    faster = evaluate_coco(truth, results, "bbox", backend="faster_coco_eval")
    assert faster.stats == pytest.approx(evaluate_coco(truth, results, "bbox").stats, abs=1e-15)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", ["text", 2**60, 1.5])
def test_the_faster_backend_refuses_ids_that_it_cannot_tell_apart(wrong):
    truth = truth_of([(0, 0, 0, 20, 20)])
    truth["images"][0]["id"] = truth["annotations"][0]["image_id"] = wrong
    results = [{**found((0, 0, 20, 20), 0.5), "image_id": wrong}]
    assert evaluate_coco(truth, results, "bbox").ap == pytest.approx(1)
    with pytest.raises(ValueError, match=f"image ids such as {wrong!r}"):
        evaluate_coco(truth, results, "bbox", backend="faster_coco_eval")


def test_a_missing_or_unknown_backend_is_named(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        evaluate_coco(truth_of([]), [], "bbox", backend="C++")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"fastmrcnn\[eval\]\""):
        evaluate_coco(truth_of([]), [], "bbox", backend="faster_coco_eval")


def test_metrics_by_name():
    metrics = CocoMetrics("bbox", 300, tuple(i / 12 for i in range(12)))
    assert list(metrics.as_dict())[6:9] == ["AR1", "AR10", "AR300"]
    assert (metrics.ap, metrics.ap50, metrics.ap75) == metrics.stats[:3]
    assert "maxDets=300 ] = 0.667" in metrics.table().splitlines()[8]
