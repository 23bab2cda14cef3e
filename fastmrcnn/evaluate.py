"""Run a model over a dataset and measure it: COCO results in, COCO average precision out."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastmrcnn.coco_eval import CocoMetrics, evaluate_coco
from fastmrcnn.coco_records import IouType, detections_to_coco, load_json
from fastmrcnn.data import CocoDetection, DetectionDataset, collate
from fastmrcnn.files import write_json

__all__ = ["EvaluateConfig", "collect_results", "evaluate", "match_categories", "run"]


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    workers: int = 0,
    max_detections: int | None = None,
    iou_types: Sequence[IouType] | None = None,
    use_categories: bool = True,
    category_ids: Sequence[int | None] | None = None,
    progress: bool = True,
    results_path: str | os.PathLike[str] | None = None,
) -> dict[str, CocoMetrics]:
    """Measure a model on a dataset.

    The numbers are over the images the dataset delivered; a warning says if the annotations list more. The model's
    mode (and that of each of its modules) is as before afterwards.

    Args:
        model: called in eval mode with a list of float32 [3, H, W] in 0..1, returns torchvision's list of dicts.
        dataset: ``dataset[i]`` is (image, target with image_id); ``dataset.coco`` the COCO annotations and
            ``dataset.category_ids`` the category of each label.
        device: where to run; the model is moved there. None is where the model is.
        batch_size: images per call of the model.
        workers: processes that load images; 0 loads in this one.
        max_detections: detections that count per image; the model's own limit is raised to it for the duration. None
            is COCO's standard, 100 and for keypoints 20.
        iou_types: what to measure; None is all that both the model gives and the annotations have.
        use_categories: False ignores categories, as for a class-agnostic model.
        category_ids: the category of each of the model's labels, None for one the dataset does not have. By default
            ``dataset.category_ids``.
        progress: show a progress bar.
        results_path: also write the COCO results to this JSON file.

    Returns:
        The metrics by IoU type.
    """
    if results_path is not None and Path(results_path).is_dir():
        raise IsADirectoryError(f"results_path must name a file, but {results_path} is a folder")
    results, image_ids = _run_model(model, dataset, device, batch_size, workers, max_detections, category_ids, progress)
    if results_path is not None:
        write_json(results_path, results)
    missing = len({image["id"] for image in dataset.coco["images"]} - image_ids)
    if missing:
        warnings.warn(
            f"{missing} images of the annotations were not delivered by the dataset and do not count", stacklevel=2
        )
    return {
        iou_type: evaluate_coco(
            dataset.coco,
            results,
            iou_type,
            max_detections=max_detections,
            use_categories=use_categories,
            image_ids=image_ids,
        )
        for iou_type in iou_types or _measurable(dataset.coco, results)
    }


def collect_results(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    workers: int = 0,
    max_detections: int | None = None,
    category_ids: Sequence[int | None] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The COCO results of a model on a dataset; arguments as for :func:`evaluate`."""
    return _run_model(model, dataset, device, batch_size, workers, max_detections, category_ids, progress)[0]


def _run_model(
    model: nn.Module,
    dataset: DetectionDataset,
    device: torch.device | str | None,
    batch_size: int,
    workers: int,
    max_detections: int | None,
    category_ids: Sequence[int | None] | None,
    progress: bool,
) -> tuple[list[dict[str, Any]], set[int]]:
    """COCO results and the ids of the images seen."""
    device = device_of(model) if device is None else torch.device(device)
    categories = dataset.category_ids if category_ids is None else category_ids
    pin = device.type == "cuda"
    # A cast, since DataLoader asks for its own base class and needs only len() and [i].
    loader = DataLoader(cast(Any, dataset), batch_size, num_workers=workers, collate_fn=collate, pin_memory=pin)
    results: list[dict[str, Any]] = []
    seen: set[int] = set()
    model.to(device)
    with (
        eval_mode(model),
        detection_limit(model, max_detections or 100, raise_only=True),
        tqdm(total=len(dataset), desc="evaluate", unit="image", disable=not progress) as bar,
    ):
        for images, targets in loader:
            bar.update(len(images))
            # A dataset that passes over a corrupt image hands out the next one twice: it counts once.
            new: dict[int, Tensor] = {}
            for image, target in zip(images, targets, strict=True):
                image_id = int(target["image_id"])
                if image_id not in seen:
                    new.setdefault(image_id, image.to(device, non_blocking=True))
            if not new:
                continue
            seen.update(new)
            with torch.inference_mode():
                outputs = model(list(new.values()))
            for image_id, output in zip(new, outputs, strict=True):
                results += detections_to_coco(output, image_id, categories)
    return results, seen


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and afterwards each module back in the mode it was in (some are frozen in eval)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def detection_limit(model: nn.Module, limit: int | None, *, raise_only: bool = False) -> Iterator[None]:
    """Set how many detections a detector returns per image, for the duration; other models are left alone.

    Args:
        model: a detector has ``model.roi_heads.detections_per_img``.
        limit: the number of detections; None leaves the model's own.
        raise_only: leave a higher limit of the model as it is.
    """
    heads: Any = getattr(model, "roi_heads", None)
    before = getattr(heads, "detections_per_img", None)
    if limit is None or before is None or (raise_only and before >= limit):
        yield
        return
    heads.detections_per_img = limit
    try:
        yield
    finally:
        heads.detections_per_img = before


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for a model without any."""
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measurable(coco: dict[str, Any], results: list[dict[str, Any]]) -> list[IouType]:
    """What both the annotations and the results have; an empty one of the two leaves it to the other."""
    keys: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
    types: list[IouType] = [
        iou_type
        for iou_type, key in keys.items()
        if all(not records or any(record.get(key) for record in records) for records in (coco["annotations"], results))
    ]
    if not types:
        raise ValueError("the results have nothing that the annotations have: neither bbox, segmentation nor keypoints")
    return types


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


@dataclass
class EvaluateConfig:
    """What to evaluate: a checkpoint on a folder of images, or a results file, against COCO annotations.

    Args:
        annotations: COCO annotation file (JSON).
        images: folder of the images that the annotations name; needed with a checkpoint.
        checkpoint: model to run; leave it out to evaluate existing results.
        results: existing COCO results file to evaluate, without any model.
        iou_types: what to measure, any of bbox, segm, keypoints; by default all that results and annotations have.
        max_detections: detections that count per image; by default COCO's standard, 100 and for keypoints 20.
        use_categories: false ignores categories and compares regions only.
        batch_size: images per call of the model.
        workers: processes that load images.
        device: where to run, such as cuda, cuda:1 or cpu; by default cuda if there is one.
        output: COCO results file (JSON) to write.
    """

    annotations: Path
    images: Path | None = None
    checkpoint: Path | None = None
    results: Path | None = None
    iou_types: list[IouType] | None = None
    max_detections: int | None = None
    use_categories: bool = True
    batch_size: int = 1
    workers: int = 2
    device: str | None = None
    output: Path | None = None


def run(config: EvaluateConfig) -> dict[str, CocoMetrics]:
    """Evaluate as configured, print the tables and return the metrics by IoU type.

    Raises:
        ValueError: neither or both of checkpoint and results are given, or a checkpoint without images.
        FileNotFoundError: a file does not exist.
    """
    if (config.checkpoint is None) == (config.results is None):
        raise ValueError("give either a checkpoint to run or a results file to evaluate")
    metrics = _evaluate_file(config) if config.results is not None else _evaluate_checkpoint(config)
    for iou_type, numbers in metrics.items():
        print(f"{iou_type}\n{numbers.table()}")
        if len(numbers.per_class) > 1:
            print(numbers.class_table())
    return metrics


def _evaluate_file(config: EvaluateConfig) -> dict[str, CocoMetrics]:
    assert config.results is not None
    iou_types: Sequence[IouType] | None = config.iou_types
    if iou_types is None:
        coco, results = load_json(config.annotations), load_json(config.results)
        readable = isinstance(coco, dict) and isinstance(results, list)
        # What is unreadable is for evaluate_coco to refuse, which names the file and the record.
        iou_types = _measurable(coco, results) if readable else ["bbox"]
    return {
        iou_type: evaluate_coco(
            config.annotations,
            config.results,
            iou_type,
            max_detections=config.max_detections,
            use_categories=config.use_categories,
        )
        for iou_type in iou_types
    }


def _evaluate_checkpoint(config: EvaluateConfig) -> dict[str, CocoMetrics]:
    assert config.checkpoint is not None
    if config.images is None:
        raise ValueError("a checkpoint needs images: give the folder of the images that the annotations name")
    # Read by a command only: whoever evaluates a model of their own needs none of the weight formats.
    from fastmrcnn.checkpoints import load_model

    dataset = CocoDetection(config.images, config.annotations, masks=_has_masks(load_json(config.annotations)))
    device = torch.device(config.device) if config.device else default_device()
    model, info = load_model(config.checkpoint, device)
    return evaluate(
        model,
        dataset,
        device=device,
        batch_size=config.batch_size,
        workers=config.workers,
        max_detections=config.max_detections,
        iou_types=config.iou_types,
        use_categories=config.use_categories,
        category_ids=match_categories(info.class_names, info.category_ids, dataset.coco["categories"]),
        results_path=config.output,
    )


def _has_masks(coco: Any) -> bool:
    """Whether any annotation has a mask; what is malformed is for the dataset to refuse, which names the record."""
    annotations = coco.get("annotations") if isinstance(coco, dict) else None
    return isinstance(annotations, list) and any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
