"""Random ground truth and results with what makes COCO's evaluation hard, and pycocotools' own numbers for them."""

import contextlib
import io

import numpy as np
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIDE = 120
NUM_KEYPOINTS = 17


def random_problem(seed, *, images=8):
    """Ground truth and results with crowds, ignored flags, tied scores, empty images, an absent class and odd ids."""
    random = np.random.default_rng(seed)
    image_ids = random.permutation(1000)[:images].tolist()
    category_ids = random.permutation(50)[:4].tolist()
    annotations, results = [], []
    for image_id in image_ids:
        objects = []
        for box in (random_box(random) for _ in range(random.integers(0, 6))):
            points = random_keypoints(random, box) * (random.random() < 0.8)
            objects.append(
                {
                    "id": len(annotations) + len(objects),
                    "image_id": image_id,
                    "category_id": category_ids[random.integers(3)],
                    "bbox": box,
                    "segmentation": mask_of(box),
                    "area": box[2] * box[3] * float(random.choice([1, 0.7])),
                    "iscrowd": int(random.random() < 0.2),
                    "ignore": int(random.random() < 0.1),
                    "keypoints": points.ravel().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
        annotations += objects
        for _ in range(random.integers(0, 15)):
            box, category_id = random_box(random), category_ids[random.integers(4)]
            points = random_keypoints(random, box)
            if objects and random.random() < 0.7:
                near = objects[random.integers(len(objects))]
                shift = random.integers(-2, 3, 2).tolist()
                box = [min(max(near["bbox"][i] + shift[i], 0), SIDE - near["bbox"][i + 2]) for i in (0, 1)]
                box += near["bbox"][2:]
                points = np.reshape(near["keypoints"], (-1, 3))
                points = points + random.normal(0, 0.05 * np.sqrt(near["area"]), points.shape)
                category_id = near["category_id"] if random.random() < 0.7 else category_id
            score = random.random()
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "segmentation": mask_of(box),
                    "keypoints": points.ravel().tolist(),
                    "score": round(score, 1) if seed % 2 else score,
                }
            )
    random.shuffle(results)
    truth = {
        "images": [{"id": image_id, "height": SIDE, "width": SIDE} for image_id in image_ids],
        "categories": [{"id": category_id, "name": f"class {category_id}"} for category_id in category_ids],
        "annotations": annotations,
    }
    return truth, results


def random_box(random):
    most = int(random.choice([6, 12, 40, 100]))
    width, height = random.integers(1, most + 1, 2).tolist()
    return [int(random.integers(0, SIDE - width + 1)), int(random.integers(0, SIDE - height + 1)), width, height]


def random_keypoints(random, box):
    places = box[:2] + random.integers(0, 101, (NUM_KEYPOINTS, 2)) / 100 * box[2:]
    return np.column_stack([places, random.integers(0, 3, NUM_KEYPOINTS)])


def mask_of(box):
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = rle_codec.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def cocoeval(truth, results, iou_type, *, limits=None, use_categories=True, image_ids=None):
    """What pycocotools accumulates for all results at once, called as its documentation says."""
    area = {"segm": lambda r: float(rle_codec.area(r["segmentation"]))}.get(
        iou_type, lambda r: r["bbox"][2] * r["bbox"][3]
    )
    found = [{**record, "id": i + 1, "iscrowd": 0, "area": area(record)} for i, record in enumerate(results)]
    numbered = [{**annotation, "id": i + 1} for i, annotation in enumerate(truth["annotations"])]
    with contextlib.redirect_stdout(io.StringIO()):
        indices = []
        for annotations in (numbered, found):
            coco = COCO()
            coco.dataset = {**truth, "annotations": annotations}
            coco.createIndex()
            indices.append(coco)
        evaluator = COCOeval(*indices, iou_type)
        evaluator.params.useCats = int(use_categories)
        if limits is not None:
            evaluator.params.maxDets = limits
        if image_ids is not None:
            evaluator.params.imgIds = sorted(image_ids)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator
