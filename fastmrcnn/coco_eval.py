"""COCO average precision: from annotations and results, as dicts or files, to numbers.

The matching is pycocotools'. Around it: checks of the input that name the bad record, an empty result list, any limit
of detections per image, and numbers one can read by name.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

__all__ = ["CocoMetrics", "IouType", "detections_to_coco", "evaluate_coco", "load_json"]

IouType = Literal["bbox", "segm", "keypoints"]

# COCO publishes one sigma per human keypoint; for other skeletons their mean is the neutral choice.
_MEAN_COCO_SIGMA = 0.067
_RESULT_KEY = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


class _Number(NamedTuple):
    """What one of the published numbers averages over."""

    name: str
    kind: Literal["AP", "AR"]
    iou: float | None
    area: str
    max_detections: int


def _published_numbers(iou_type: IouType, limit: int) -> list[_Number]:
    """The numbers of COCO's table, in its order: 12, or 10 for keypoints."""
    if iou_type == "keypoints":
        rows = [("", None, "all"), ("50", 0.5, "all"), ("75", 0.75, "all"), ("m", None, "medium"), ("l", None, "large")]
        kinds: tuple[Literal["AP"], Literal["AR"]] = ("AP", "AR")
        return [_Number(kind + end, kind, iou, area, limit) for kind in kinds for end, iou, area in rows]
    areas = [("s", "small"), ("m", "medium"), ("l", "large")]
    return [
        _Number("AP", "AP", None, "all", limit),
        _Number("AP50", "AP", 0.5, "all", limit),
        _Number("AP75", "AP", 0.75, "all", limit),
        *(_Number(f"AP{end}", "AP", None, area, limit) for end, area in areas),
        *(_Number(f"AR{count}", "AR", None, "all", count) for count in (1, 10, limit)),
        *(_Number(f"AR{end}", "AR", None, area, limit) for end, area in areas),
    ]


@dataclass(frozen=True)
class CocoMetrics:
    """The numbers of one evaluation; -1 where there is no ground truth to measure on, as in COCO.

    Args:
        iou_type: what was compared: boxes, masks or keypoints.
        max_detections: detections counted per image (and category).
        stats: COCO's 12 numbers (keypoints: 10) in COCO's order, each in 0..1 or -1.
        per_class: AP of every category by name; empty if categories were not told apart.
    """

    iou_type: IouType
    max_detections: int
    stats: tuple[float, ...]
    per_class: dict[str, float] = field(default_factory=dict)

    @property
    def ap(self) -> float:
        """AP averaged over IoU 0.50:0.95, COCO's main number."""
        return self.stats[0]

    @property
    def ap50(self) -> float:
        """AP at IoU 0.50."""
        return self.stats[1]

    @property
    def ap75(self) -> float:
        """AP at IoU 0.75."""
        return self.stats[2]

    def as_dict(self) -> dict[str, float]:
        """The numbers by name, in COCO's order: AP, AP50, ..., AR1, AR10, AR100 (named after the limit), ..., ARl."""
        numbers = _published_numbers(self.iou_type, self.max_detections)
        return {number.name: value for number, value in zip(numbers, self.stats, strict=True)}

    def table(self) -> str:
        """The table as COCO prints it: one line per number with its IoU, area and detections per image."""
        lines = []
        for number, value in zip(_published_numbers(self.iou_type, self.max_detections), self.stats, strict=True):
            title = "Average Precision" if number.kind == "AP" else "Average Recall"
            iou = "0.50:0.95" if number.iou is None else f"{number.iou:.2f}"
            lines.append(
                f" {title:<18} ({number.kind}) @[ IoU={iou:<9} | area={number.area:>6} "
                f"| maxDets={number.max_detections:>3} ] = {value:.3f}"
            )
        return "\n".join(lines)

    def class_table(self) -> str:
        """AP per category, one line each; empty if categories were not told apart."""
        width = max(map(len, self.per_class), default=0)
        return "\n".join(f" {name:<{width}}  AP = {value:.3f}" for name, value in self.per_class.items())


def evaluate_coco(
    ground_truth: dict[str, Any] | str | os.PathLike[str],
    results: list[dict[str, Any]] | str | os.PathLike[str],
    iou_type: IouType,
    *,
    max_detections: int | None = None,
    use_categories: bool = True,
    image_ids: Iterable[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> CocoMetrics:
    """Measure detections against COCO ground truth, with the numbers of pycocotools' ``COCOeval``.

    Neither argument is changed. Ground-truth annotations are renumbered inside, because COCOeval takes a match with
    the annotation of id 0 for no match.

    The area of a detection, which decides whether it counts as small, medium or large, is its box's for ``bbox``; for
    ``segm`` the mask's, as in torchvision's and detectron2's evaluations (pycocotools' ``loadRes`` would take the box's
    where a record has both; for polygons that is kept); for ``keypoints`` the box's, or the keypoints' extent without
    one.

    Args:
        ground_truth: COCO annotations (images, annotations, categories), or the JSON file.
        results: COCO results, or the JSON file: one record per detection with image_id, category_id, score and bbox
            (x, y, width, height in pixels), segmentation (RLE or polygons) or keypoints (x, y, v flattened).
        iou_type: what to compare.
        max_detections: the most confident detections that count per image and category. None is COCO's standard:
            100, for keypoints 20.
        use_categories: False compares regions only, whatever their category (not for keypoints).
        image_ids: the images to measure on; None is all images of the ground truth.
        sigmas: keypoint deviations of the OKS, one per keypoint. None is COCO's for 17 keypoints, and for any other
            number 0.067 each, the mean of COCO's.

    Raises:
        FileNotFoundError: a path names no file.
        ValueError: malformed JSON or records (named by file and position), or ids unknown to the ground truth.
    """
    if iou_type not in get_args(IouType):
        raise ValueError(f"iou_type must be one of {get_args(IouType)}, got {iou_type!r}")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    if iou_type == "keypoints" and not use_categories:
        raise ValueError("use_categories=False cannot be combined with keypoints: OKS is defined per category")
    truth = _load_ground_truth(ground_truth, iou_type)
    detections = _load_results(results, truth, iou_type)
    limit = max_detections or (20 if iou_type == "keypoints" else 100)

    evaluator = COCOeval(truth, detections, iou_type)
    parameters = evaluator.params
    parameters.useCats = int(use_categories)
    parameters.maxDets = [limit] if iou_type == "keypoints" else sorted({1, 10, limit})
    if image_ids is not None:
        parameters.imgIds = sorted(set(image_ids))
        unknown = [image_id for image_id in parameters.imgIds if image_id not in truth.imgs]
        if unknown:
            raise ValueError(f"image_ids: {unknown[:5]} not among the images of the ground truth")
    if iou_type == "keypoints":
        parameters.kpt_oks_sigmas = _oks_sigmas(truth, sigmas, parameters.kpt_oks_sigmas)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    stats = tuple(_average(evaluator, number) for number in _published_numbers(iou_type, limit))
    per_class = _ap_per_class(evaluator, truth, limit) if use_categories else {}
    return CocoMetrics(iou_type, limit, stats, per_class)


def _average(evaluator: COCOeval, number: _Number, category: int | slice = slice(None)) -> float:
    """Mean over everything measured (-1 marks what was not), or -1 if nothing was."""
    parameters = evaluator.params
    # precision is [T, R, K, A, M], recall [T, K, A, M]: IoU thresholds, recalls, categories, areas, limits.
    values = evaluator.eval["precision" if number.kind == "AP" else "recall"]
    values = values[..., parameters.areaRngLbl.index(number.area), parameters.maxDets.index(number.max_detections)]
    values = values[..., category]
    if number.iou is not None:
        values = values[np.isclose(parameters.iouThrs, number.iou)]
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _ap_per_class(evaluator: COCOeval, truth: COCO, limit: int) -> dict[str, float]:
    names = [str(truth.cats[category_id]["name"]) for category_id in evaluator.params.catIds]
    ap = _Number("AP", "AP", None, "all", limit)
    per_class = {}
    for k, (category_id, name) in enumerate(zip(evaluator.params.catIds, names, strict=True)):
        key = name if names.count(name) == 1 else f"{name} ({category_id})"
        per_class[key] = _average(evaluator, ap, k)
    return per_class


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


def _load_ground_truth(source: dict[str, Any] | str | os.PathLike[str], iou_type: IouType) -> COCO:
    """An indexed copy of the ground truth with every field COCOeval reads filled in."""
    data, name = (source, "ground_truth") if isinstance(source, dict) else (load_json(source), str(source))
    parts = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
        raise ValueError(f"{name}: COCO annotations must be an object with the lists {', '.join(parts)}")
    for part, keys in (("images", ["id"]), ("categories", ["id", "name"])):
        for i, record in enumerate(data[part]):
            _require(record, keys, f"{name}: {part}[{i}]")
    images = {image["id"]: image for image in data["images"]}
    annotations = []
    for i, record in enumerate(data["annotations"]):
        where = f"{name}: annotations[{i}]"
        _require(record, ["image_id", "category_id", "bbox"] + ["segmentation"] * (iou_type == "segm"), where)
        if record["image_id"] not in images:
            continue  # belongs to an image outside this set: COCOeval passes it over, too
        _check_bbox(record["bbox"], where)
        annotation = {"iscrowd": 0, **record, "id": i + 1}
        if iou_type == "segm":
            annotation["segmentation"] = _to_rle(record["segmentation"], images[record["image_id"]], where)
            annotation.setdefault("area", float(rle_codec.area(annotation["segmentation"])))
        annotation.setdefault("area", record["bbox"][2] * record["bbox"][3])
        if iou_type == "keypoints":
            annotation.setdefault("keypoints", [])
            annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
        annotations.append(annotation)
    return _index({**data, "annotations": annotations})


def _load_results(source: list[dict[str, Any]] | str | os.PathLike[str], truth: COCO, iou_type: IouType) -> COCO:
    """What pycocotools' loadRes does, for each record by its own keys, on a copy, with checks, and for no results."""
    data, name = (source, "results") if isinstance(source, list | dict) else (load_json(source), str(source))
    if not isinstance(data, list):
        raise ValueError(f"{name}: COCO results must be a list of records, got {type(data).__name__}")
    num_keypoints = _num_keypoints(truth) if iou_type == "keypoints" else 0
    annotations = []
    for i, record in enumerate(data):
        where = f"{name}[{i}]"
        _require(record, ["image_id", "category_id", "score", _RESULT_KEY[iou_type]], where)
        if record["image_id"] not in truth.imgs:
            raise ValueError(f"{where}: image_id {record['image_id']!r} is not in the ground truth")
        if record["category_id"] not in truth.cats:
            raise ValueError(f"{where}: category_id {record['category_id']!r} is not in the ground truth")
        if not isinstance(record["score"], int | float) or not math.isfinite(record["score"]):
            raise ValueError(f"{where}: score must be a finite number, got {record['score']!r}")
        region = _region(record, iou_type, truth.imgs[record["image_id"]], num_keypoints, where)
        annotations.append({**record, "id": i + 1, "iscrowd": 0, **region})
    return _index({**truth.dataset, "annotations": annotations})


def _region(
    record: dict[str, Any], iou_type: IouType, image: dict[str, Any], num_keypoints: int, where: str
) -> dict[str, Any]:
    """The checked region of one result and its area in pixels."""
    box: Any = record.get("bbox")
    if box is not None:
        _check_bbox(box, where)
    if iou_type == "segm":
        rle = _to_rle(record["segmentation"], image, where)
        polygons = isinstance(record["segmentation"], list)
        return {"segmentation": rle, "area": box[2] * box[3] if polygons and box else float(rle_codec.area(rle))}
    if iou_type == "keypoints":
        points = record["keypoints"]
        if not isinstance(points, list) or len(points) != 3 * num_keypoints:
            raise ValueError(f"{where}: keypoints must be {num_keypoints} flattened (x, y, v)")
        if not box:
            return {"area": float(np.ptp(points[0::3]) * np.ptp(points[1::3]))}
    return {"area": box[2] * box[3]}


def _to_rle(segmentation: Any, image: dict[str, Any], where: str) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE as compressed RLE, checked to be of the image's size."""
    if "height" not in image or "width" not in image:
        raise ValueError(f"{where}: its image {image['id']!r} has no height and width, which masks need")
    size = [image["height"], image["width"]]
    try:
        if isinstance(segmentation, list):
            return cast(dict[str, Any], rle_codec.merge(rle_codec.frPyObjects(segmentation, *size)))
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = rle_codec.frPyObjects(rle, *rle["size"])
    except Exception as error:  # pycocotools raises bare Exception, KeyError, TypeError and more
        raise ValueError(f"{where}: segmentation is neither polygons nor RLE ({error})") from None
    # pycocotools matches masks of another size with nothing, silently.
    if list(rle["size"]) != size:
        raise ValueError(f"{where}: the mask is {list(rle['size'])} (height, width), its image is {size}")
    return cast(dict[str, Any], rle)


def _num_keypoints(truth: COCO) -> int:
    """Keypoints per object, from the categories or, if they do not say, from the annotations."""
    named = [len(category["keypoints"]) for category in truth.cats.values() if category.get("keypoints")]
    marked = [len(annotation["keypoints"]) // 3 for annotation in truth.anns.values() if annotation.get("keypoints")]
    counts = set(named or marked)
    if len(counts) > 1:
        raise ValueError(f"ground_truth: categories with different numbers of keypoints: {sorted(counts)}")
    return counts.pop() if counts else 17


def _oks_sigmas(truth: COCO, sigmas: Sequence[float] | None, coco: np.ndarray) -> np.ndarray:
    """Keypoint deviations, float [K]."""
    count = _num_keypoints(truth)
    if sigmas is None:
        return coco if count == len(coco) else np.full(count, _MEAN_COCO_SIGMA)
    if len(sigmas) != count:
        raise ValueError(f"sigmas must have one value per keypoint, {count}, got {len(sigmas)}")
    return np.asarray(sigmas, dtype=float)


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
    output: Mapping[str, Tensor],
    image_id: int,
    category_ids: Sequence[int | None],
    *,
    mask_threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """The detections of one image as COCO results.

    Args:
        output: what the model returns for the image: boxes float [D, 4] (x1, y1, x2, y2 in pixels), labels int [D]
            from 1, scores float [D]; masks float [D, 1, H, W] in 0..1 and keypoints float [D, K, 3] if it has them.
        image_id: the image's id in the ground truth.
        category_ids: the category of label ``l`` is ``category_ids[l - 1]``; None leaves its detections out.
        mask_threshold: a pixel belongs to a mask where the soft mask is above this.

    Returns:
        One record per detection, in the model's order: image_id, category_id, bbox (x, y, width, height), score, and
        segmentation (RLE, counts as str) or keypoints (x, y, v flattened) if given.

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
    if "masks" in output:
        columns["segmentation"] = _encode(output["masks"], mask_threshold)
    if "keypoints" in output:
        columns["keypoints"] = output["keypoints"].flatten(1).tolist()
    records = []
    for i, label in enumerate(labels):
        category_id = category_ids[label - 1]
        if category_id is not None:
            values = {name: column[i] for name, column in columns.items()}
            records.append({"image_id": image_id, "category_id": category_id, **values})
    return records


def _encode(masks: Tensor, threshold: float) -> list[dict[str, Any]]:
    """Soft masks [D, 1, H, W] as D compressed RLEs with str counts."""
    if masks.shape[0] == 0:
        return []
    # pycocotools wants [H, W, D] in Fortran order, which is [D, W, H] in C order: transposed where the masks are, so
    # that one byte per pixel is moved once and numpy copies nothing.
    pixels = (masks[:, 0] > threshold).transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    rles = rle_codec.encode(pixels.transpose(2, 1, 0))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]
