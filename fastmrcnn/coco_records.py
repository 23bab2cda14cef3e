"""COCO annotations and results as records: read, checked and indexed; detections as records.

What is malformed is named by file and position, before pycocotools trips over it or, worse, does not.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn.data.masks import check_segmentation, to_rle, total_pixels

__all__ = [
    "RESULT_KEYS",
    "IouType",
    "check_results",
    "count_keypoints",
    "detections_to_coco",
    "iou_types_of",
    "load_ground_truth",
    "load_json",
    "load_results",
    "match_categories",
]

IouType = Literal["bbox", "segm", "keypoints"]

# The field of annotations and results that each type compares.
RESULT_KEYS: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; names the file and the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def load_ground_truth(source: dict[str, Any] | str | os.PathLike[str], iou_type: IouType) -> COCO:
    """An indexed copy of the ground truth (a dict or a JSON file) with every field COCOeval reads filled in."""
    data, name = (source, "ground_truth") if isinstance(source, dict) else (load_json(source), str(source))
    parts = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
        raise ValueError(f"{name}: COCO annotations must be an object with the lists {', '.join(parts)}")
    for part, keys in (("images", ["id"]), ("categories", ["id", "name"])):
        for i, record in enumerate(data[part]):
            _require(record, keys, f"{name}: {part}[{i}]")
    images = {image["id"]: image for image in data["images"]}
    totals = _totals(data["annotations"]) if iou_type == "segm" else {}
    annotations = []
    for i, record in enumerate(data["annotations"]):
        where = f"{name}: annotations[{i}]"
        _require(record, ["image_id", "category_id", "bbox"] + ["segmentation"] * (iou_type == "segm"), where)
        if record["image_id"] not in images:
            continue  # belongs to an image outside this set: COCOeval passes it over, too
        _check_bbox(record["bbox"], where)
        annotation = {"iscrowd": 0, **record, "id": i + 1}
        if iou_type == "segm":
            annotation["segmentation"] = _to_rle(record["segmentation"], images[record["image_id"]], totals, where)
            annotation.setdefault("area", float(rle_codec.area(annotation["segmentation"])))
        annotation.setdefault("area", record["bbox"][2] * record["bbox"][3])
        if iou_type == "keypoints":
            annotation.setdefault("keypoints", [])
            annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
        annotations.append(annotation)
    return _index({**data, "annotations": annotations})


def load_results(
    source: list[dict[str, Any]] | str | os.PathLike[str], truth: COCO, iou_type: IouType, num_keypoints: int
) -> list[dict[str, Any]]:
    """The results of a list or a JSON file, as :func:`check_results` returns them."""
    data, name = (source, "results") if isinstance(source, list | dict) else (load_json(source), str(source))
    if not isinstance(data, list):
        raise ValueError(f"{name}: COCO results must be a list of records, got {type(data).__name__}")
    return check_results(data, truth, iou_type, num_keypoints, name)


def check_results(
    records: Sequence[dict[str, Any]], truth: COCO, iou_type: IouType, num_keypoints: int, name: str
) -> list[dict[str, Any]]:
    """What pycocotools' loadRes does, for each record by its own keys, on a copy, with checks, and for no results.

    Args:
        records: COCO results.
        truth: the ground truth they belong to.
        iou_type: what of them is to be compared.
        num_keypoints: keypoints that an object has.
        name: of the records in error messages.

    Returns:
        For each record a copy with id (from 1), iscrowd, area in pixels and, for masks, compressed RLE, and in the
        place of its score its mask_score, if it has one.

    Raises:
        ValueError: a record is malformed or names an image or category that the ground truth does not have.
    """
    totals = _totals(records) if iou_type == "segm" else {}
    annotations = []
    for i, record in enumerate(records):
        where = f"{name}[{i}]"
        _require(record, ["image_id", "category_id", "score", RESULT_KEYS[iou_type]], where)
        if record["image_id"] not in truth.imgs:
            raise ValueError(f"{where}: image_id {record['image_id']!r} is not in the ground truth")
        if record["category_id"] not in truth.cats:
            raise ValueError(f"{where}: category_id {record['category_id']!r} is not in the ground truth")
        key = "mask_score" if iou_type == "segm" and "mask_score" in record else "score"
        if not isinstance(record[key], int | float) or not math.isfinite(record[key]):
            raise ValueError(f"{where}: {key} must be a finite number, got {record[key]!r}")
        region = _region(record, iou_type, truth.imgs[record["image_id"]], num_keypoints, totals, where)
        annotations.append({**record, "score": record[key], "id": i + 1, "iscrowd": 0, **region})
    return annotations


def _region(
    record: dict[str, Any],
    iou_type: IouType,
    image: dict[str, Any],
    num_keypoints: int,
    totals: dict[str | bytes, int],
    where: str,
) -> dict[str, Any]:
    """The checked region of one result and its area in pixels."""
    box: Any = record.get("bbox")
    if box is not None:
        _check_bbox(box, where)
    if iou_type == "segm":
        rle = _to_rle(record["segmentation"], image, totals, where)
        polygons = isinstance(record["segmentation"], list)
        return {"segmentation": rle, "area": box[2] * box[3] if polygons and box else float(rle_codec.area(rle))}
    if iou_type == "keypoints":
        points = record["keypoints"]
        if not isinstance(points, list) or len(points) != 3 * num_keypoints:
            raise ValueError(f"{where}: keypoints must be {num_keypoints} flattened (x, y, v)")
        if not box:
            return {"area": float(np.ptp(points[0::3]) * np.ptp(points[1::3]))}
    return {"area": box[2] * box[3]}


def _totals(records: Sequence[Any]) -> dict[str | bytes, int]:
    """Pixels that the compressed counts of records cover, all decoded at once: one by one would take far longer."""
    segmentations = [record.get("segmentation") for record in records if isinstance(record, dict)]
    texts = {x["counts"] for x in segmentations if isinstance(x, dict) and isinstance(x.get("counts"), str | bytes)}
    return dict(zip(texts, total_pixels(list(texts)), strict=True))


def _to_rle(segmentation: Any, image: dict[str, Any], totals: dict[str | bytes, int], where: str) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE as compressed RLE, checked to be of the image's size.

    pycocotools would match masks of another size with nothing, silently, and trusts the rest of what it is given.
    """
    size = image.get("height"), image.get("width")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{where}: its image {image['id']!r} needs a height and a width, which masks have; got {size}")
    height, width = cast(tuple[int, int], size)
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    total = totals.get(counts) if isinstance(counts, str | bytes) else None
    problem = check_segmentation(segmentation, height, width, total)
    if problem is not None:
        raise ValueError(f"{where}: {problem}")
    return to_rle(segmentation, height, width)


def count_keypoints(truth: COCO) -> int:
    """Keypoints per object, from the categories or, if they do not say, from the annotations."""
    named = [len(category["keypoints"]) for category in truth.cats.values() if category.get("keypoints")]
    marked = [len(annotation["keypoints"]) // 3 for annotation in truth.anns.values() if annotation.get("keypoints")]
    counts = set(named or marked)
    if len(counts) > 1:
        raise ValueError(f"ground_truth: categories with different numbers of keypoints: {sorted(counts)}")
    return counts.pop() if counts else 17


def _index(data: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _require(record: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be an object with {', '.join(keys)}, got {type(record).__name__}")
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing (it has {', '.join(map(str, record))})")


def _check_bbox(box: Any, where: str) -> None:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise ValueError(f"{where}: bbox must be four numbers (x, y, width, height), got {box!r}")


def detections_to_coco(
    output: Mapping[str, Any],
    image_id: int,
    category_ids: Sequence[int | None],
    *,
    mask_threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """The detections of one image as COCO results.

    Args:
        output: what the model returns for the image: boxes float [D, 4] (x1, y1, x2, y2 in pixels), labels int [D]
            from 1, scores float [D]; if it has them, masks float [D, 1, H, W] in 0..1, or D COCO RLEs, mask_scores
            float [D], and keypoints float [D, K, 3].
        image_id: the image's id in the ground truth.
        category_ids: the category of label ``l`` is ``category_ids[l - 1]``; None leaves its detections out.
        mask_threshold: a pixel belongs to a mask where the soft mask is above this.

    Returns:
        One record per detection, in the model's order: image_id, category_id, bbox (x, y, width, height), score, and
        segmentation (RLE, counts as str), mask_score or keypoints (x, y, v flattened) if given.

    Raises:
        ValueError: a label has no category.
    """
    labels = output["labels"].tolist()
    if labels and not 1 <= min(labels) <= max(labels) <= len(category_ids):
        raise ValueError(
            f"image {image_id}: the model predicts labels {min(labels)} to {max(labels)}, but category_ids has only "
            f"{len(category_ids)} classes: is this the dataset it was trained for?"
        )
    boxes = output["boxes"].float()
    sizes = boxes[:, 2:] - boxes[:, :2]
    columns: dict[str, list[Any]] = {
        "bbox": torch.cat([boxes[:, :2], sizes], dim=1).tolist(),
        "score": output["scores"].tolist(),
    }
    if "mask_scores" in output:
        columns["mask_score"] = output["mask_scores"].tolist()
    if "masks" in output:
        masks = output["masks"]
        encoded = ops.encode_bool(masks[:, 0] > mask_threshold).rles if isinstance(masks, Tensor) else masks
        columns["segmentation"] = encoded
    if "keypoints" in output:
        columns["keypoints"] = output["keypoints"].flatten(1).tolist()
    records = []
    for i, label in enumerate(labels):
        category_id = category_ids[label - 1]
        if category_id is not None:
            values = {name: column[i] for name, column in columns.items()}
            records.append({"image_id": image_id, "category_id": category_id, **values})
    return records


def iou_types_of(output: Mapping[str, Any]) -> list[IouType]:
    """What the output of a model, as in :func:`detections_to_coco`, can be measured by; also if it found nothing."""
    keys: dict[IouType, str] = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
    return [iou_type for iou_type, key in keys.items() if key in output]


def match_categories(
    class_names: Sequence[str],
    category_ids: Sequence[int],
    categories: Sequence[dict[str, Any]],
) -> list[int | None]:
    """The category in a COCO file of each label of a model trained on another file.

    By name, since ids are each file's own; by id only if no name is shared.

    Args:
        class_names: the model's classes, label ``l`` is ``class_names[l - 1]``.
        category_ids: the ids of these classes in the file the model was trained on.
        categories: the categories of the COCO file to measure on.

    Returns:
        One category id per label, None for a class the file does not have.

    Raises:
        ValueError: no class of the model is in the file.
    """
    by_name = {category["name"]: category["id"] for category in categories}
    known_ids = set(by_name.values())
    if not by_name.keys().isdisjoint(class_names):
        return [by_name.get(name) for name in class_names]
    if not known_ids.isdisjoint(category_ids):
        return [category_id if category_id in known_ids else None for category_id in category_ids]
    raise ValueError(
        f"the checkpoint and the annotations share no category: the checkpoint has {list(class_names)[:10]}, "
        f"the annotations have {list(by_name)[:10]}"
    )
