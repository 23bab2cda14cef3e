import gc
import json
import pickle
import random
import sys

import numpy as np
import pytest
from coco_problems import cocoeval, random_problem
from conftest import SHARED

from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.coco_evaluator import CocoEvaluator
from fastmrcnn.coco_matching import accumulate, match_image
from fastmrcnn.coco_metrics import CocoTask
from fastmrcnn.coco_records import check_results

FIXTURES = SHARED / "data" / "cocoeval_fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"COCO evaluation fixtures are not at {FIXTURES}")

KINDS = [("bbox", True), ("bbox", False), ("segm", True), ("segm", False), ("keypoints", True)]


def by_image(truth, results):
    return {image["id"]: [r for r in results if r["image_id"] == image["id"]] for image in truth["images"]}


def evaluator_of(truth, results, iou_types, *, order=None, **options):
    evaluator = CocoEvaluator(truth, iou_types, **options)
    images = by_image(truth, results)
    for image_id in order or images:
        evaluator.add(image_id, images[image_id])
    return evaluator


@pytest.mark.parametrize(("iou_type", "use_categories"), KINDS)
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("seed", range(6))
def test_precision_and_recall_are_bit_for_bit_those_of_cocoeval_on_all_results(seed, limit, iou_type, use_categories):
    truth, results = random_problem(seed)
    measured = sorted(image["id"] for image in truth["images"])[seed % 3 :]
    task = CocoTask.of(truth, iou_type, limit, use_categories, None)
    images = {
        image_id: match_image(
            task, image_id, check_results(records, task.truth, iou_type, task.num_keypoints, "results")
        )
        for image_id, records in by_image(truth, results).items()
        if image_id in measured
    }
    precision, recall = accumulate(task, images)
    limits = None if limit is None else [limit] if iou_type == "keypoints" else [1, limit, 10]
    expected = cocoeval(truth, results, iou_type, limits=limits, use_categories=use_categories, image_ids=measured).eval
    assert (expected["precision"] > 0).any()
    np.testing.assert_array_equal(precision, expected["precision"])
    np.testing.assert_array_equal(recall, expected["recall"])


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_images_gives_the_numbers_of_all_at_once(seed):
    truth, results = random_problem(seed)
    order = [image["id"] for image in truth["images"]]
    random.Random(seed).shuffle(order)
    metrics = evaluator_of(truth, results, ["bbox", "segm", "keypoints"], order=order).metrics()
    assert list(metrics) == ["bbox", "segm", "keypoints"]
    for iou_type, numbers in metrics.items():
        expected = evaluate_coco(truth, results, iou_type)
        assert numbers == expected
        np.testing.assert_array_equal(numbers.precision, expected.precision)
        assert numbers.ap > 0


@needs_fixtures
@pytest.mark.parametrize(
    ("truth", "results", "iou_type", "use_categories"),
    [
        ("instances_val2014_100", "instances_val2014_fakebbox100_results", "bbox", True),
        ("instances_val2014_100", "instances_val2014_fakebbox100_results", "bbox", False),
        ("instances_val2014_100", "instances_val2014_fakesegm100_results", "segm", True),
        ("instances_val2014_100", "instances_val2014_fakesegm100_results", "segm", False),
        ("gt_dataset", "dt_dataset", "segm", True),
        ("keypoints_gt", "keypoints_dt", "keypoints", True),
    ],
)
def test_fixtures_image_by_image(truth, results, iou_type, use_categories):
    truth, results = (json.loads((FIXTURES / f"{name}.json").read_text()) for name in (truth, results))
    metrics = evaluator_of(truth, results, [iou_type], use_categories=use_categories).metrics()
    assert metrics[iou_type] == evaluate_coco(truth, results, iou_type, use_categories=use_categories)


def test_only_images_that_were_added_count():
    truth, results = random_problem(3)
    few = [image["id"] for image in truth["images"]][::2]
    evaluator = evaluator_of(truth, results, ["bbox"], order=few)
    assert evaluator.image_ids == set(few)
    assert few[0] in evaluator
    assert evaluator.metrics()["bbox"] == evaluate_coco(truth, results, "bbox", image_ids=few)
    assert evaluator.metrics()["bbox"] != evaluate_coco(truth, results, "bbox")


def test_no_images_give_minus_ones_and_numbers_can_be_had_in_between():
    truth, results = random_problem(0)
    evaluator = CocoEvaluator(truth, ["bbox"])
    assert set(evaluator.metrics()["bbox"].stats) == {-1.0}
    for image_id, records in by_image(truth, results).items():
        evaluator.add(image_id, records)
        evaluator.metrics()
    assert evaluator.metrics()["bbox"] == evaluate_coco(truth, results, "bbox")


def test_states_of_several_processes_are_merged_and_an_image_of_two_counts_once():
    truth, results = random_problem(5)
    ids = [image["id"] for image in truth["images"]]
    parts = [evaluator_of(truth, results, ["bbox", "segm"], order=part) for part in (ids[:5], ids[3:])]
    parts[0].merge(pickle.loads(pickle.dumps(parts[1].state())))
    assert parts[0].metrics() == evaluator_of(truth, results, ["bbox", "segm"]).metrics()
    with pytest.raises(ValueError, match="compare"):
        parts[0].merge(evaluator_of(truth, results, ["bbox"]).state())
    other = random_problem(6)
    with pytest.raises(ValueError, match="not in the ground truth"):
        parts[0].merge(evaluator_of(*other, ["bbox", "segm"]).state())


def test_nothing_of_a_record_is_kept():
    truth, results = random_problem(2)

    def references():
        gc.collect()
        parts = (part for record in results for part in (record, *record.values()) if isinstance(part, dict | list))
        return [sys.getrefcount(part) for part in parts]

    before = references()
    evaluator = evaluator_of(truth, results, ["bbox", "segm", "keypoints"])
    assert references() == before
    assert evaluator.metrics()["segm"].ap > 0


def test_an_image_of_100_detections_takes_2_kilobytes():
    truth, results = random_problem(2)
    many = [{**results[0], "score": float(np.float32(i / 100))} for i in range(100)]
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.add(results[0]["image_id"], many)
    assert len(pickle.dumps(evaluator.state())) < 2100


def test_scores_keep_every_digit():
    # As float32 the two tie, and the false alarm, in the first image, would come first.
    truth = {
        "images": [{"id": i, "height": 50, "width": 50} for i in (1, 2)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9]}],
    }
    evaluator = CocoEvaluator(truth, ["bbox"])
    for image_id, score in ((1, 0.5), (2, 0.5 + 1e-12)):
        evaluator.add(image_id, [{"image_id": image_id, "category_id": 1, "bbox": [0, 0, 9, 9], "score": score}])
    assert evaluator.metrics()["bbox"].ap == pytest.approx(1)


def test_what_cannot_be_added():
    truth, results = random_problem(4)
    images = by_image(truth, results)
    image_id, records = next((i, r) for i, r in images.items() if len(r) > 1)
    evaluator = CocoEvaluator(truth, ["bbox", "segm"])
    with pytest.raises(ValueError, match="image_id 5000 is not in the ground truth"):
        evaluator.add(5000, [])
    with pytest.raises(ValueError, match=rf"results of image {image_id}\[1\]: segmentation missing"):
        evaluator.add(image_id, [records[0], {k: v for k, v in records[1].items() if k != "segmentation"}])
    other = next(i for i in images if i != image_id)
    with pytest.raises(ValueError, match=rf"results of image {other}\[0\]: it is of image {image_id}"):
        evaluator.add(other, records)
    assert not evaluator.image_ids
    evaluator.add(image_id, records)
    with pytest.raises(ValueError, match=rf"image_id {image_id} was added before"):
        evaluator.add(image_id, records)


def test_arguments_are_checked():
    truth, _ = random_problem(0)
    with pytest.raises(ValueError, match="iou_types must be a list"):
        CocoEvaluator(truth, "bbox")
    with pytest.raises(ValueError, match="iou_types must be a list"):
        CocoEvaluator(truth, [])
    with pytest.raises(ValueError, match="iou_type must be one of"):
        CocoEvaluator(truth, ["boxes"])
    with pytest.raises(ValueError, match="max_detections"):
        CocoEvaluator(truth, ["bbox"], max_detections=0)
    with pytest.raises(ValueError, match="use_categories"):
        CocoEvaluator(truth, ["keypoints"], use_categories=False)
    with pytest.raises(ValueError, match="sigmas"):
        CocoEvaluator(truth, ["keypoints"], sigmas=[0.1])
