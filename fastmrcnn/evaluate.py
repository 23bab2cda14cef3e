"""Run a model over a dataset and measure it: COCO results in, COCO average precision out."""

import contextlib
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fastmrcnn.coco_eval import Backend, CocoMetrics, check_backend, evaluate_coco
from fastmrcnn.coco_evaluator import CocoEvaluator
from fastmrcnn.coco_records import RESULT_KEYS, IouType, detections_to_coco, iou_types_of, load_json, match_categories
from fastmrcnn.data import CocoDetection, DetectionDataset
from fastmrcnn.distributed import all_gather, broadcast, process_group, rank, world_size
from fastmrcnn.inference import default_device
from fastmrcnn.precision_recall import check_plot, plot_precision_recall
from fastmrcnn.predictor import Predictor
from fastmrcnn.results_file import results_writer

__all__ = ["EvaluateConfig", "evaluate", "match_categories", "run"]


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
    backend: Backend = "pycocotools",
) -> dict[IouType, CocoMetrics]:
    """Measure a model on a dataset.

    The numbers are over the images the dataset delivered, each once; a warning says if the annotations list more. The
    model's mode (and that of each of its modules) is as before afterwards. Results are evaluated image by image and
    not held in memory.

    In a ``torch.distributed`` process group, every process must call it, with the same arguments. Each runs the model
    on its share of the images, and all return the same numbers, those of one process.

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
        progress: show a progress bar (of rank 0).
        results_path: also write the COCO results to this JSON file, while the model runs; it appears when all are
            done. Of several processes, rank 0 writes it.
        backend: as in :func:`fastmrcnn.coco_eval.evaluate_coco`. "faster_coco_eval" needs all results at once: rank 0
            reads them back from the file, or from a temporary one, into memory.

    Returns:
        The metrics by IoU type.

    Raises:
        IsADirectoryError: ``results_path`` is a folder.
        ValueError: an argument is out of range, the backend is not installed, or the annotations are malformed.
    """
    check_backend(backend)
    if results_path is not None and Path(results_path).is_dir():
        raise IsADirectoryError(f"results_path must name a file, but {results_path} is a folder")
    options: Any = {"max_detections": max_detections, "use_categories": use_categories}
    categories = dataset.category_ids if category_ids is None else category_ids
    evaluator: CocoEvaluator | None = None
    seen: set[int] = set()
    with contextlib.ExitStack() as stack:
        if results_path is None and backend == "faster_coco_eval":
            results_path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "results.json"
        # Closed in any case, so that the model is as before even if an error is kept and with it the iterator.
        outputs = _predictions(model, dataset, device, batch_size, workers, max_detections, progress)
        with results_writer(results_path) as write, contextlib.closing(outputs):
            for image_id, output in outputs:
                # A dataset that passes over a corrupt image hands out the next one twice: it counts once.
                if image_id in seen:
                    write([])
                    continue
                seen.add(image_id)
                records = detections_to_coco(output, image_id, categories)
                write(records)
                iou_types = iou_types or _measurable(dataset.coco, iou_types_of(output))
                if backend == "pycocotools":
                    evaluator = evaluator or CocoEvaluator(dataset.coco, iou_types, **options)
                    evaluator.add(image_id, records)
        seen = set().union(*all_gather(seen))
        states = all_gather(evaluator.state() if evaluator else {})
        metrics: dict[IouType, CocoMetrics] = {}
        if rank() == 0:
            # Rank 0 has the first image, if there is any.
            iou_types = iou_types or _measurable(dataset.coco, None)
            if backend == "pycocotools":
                evaluator = evaluator or CocoEvaluator(dataset.coco, iou_types, **options)
                for state in states[1:]:
                    evaluator.merge(state)
                metrics = evaluator.metrics()
            else:
                assert results_path is not None
                found = load_json(results_path)
                for iou_type in iou_types:
                    metrics[iou_type] = evaluate_coco(
                        dataset.coco, found, iou_type, image_ids=seen, backend=backend, **options
                    )
    missing = len({image["id"] for image in dataset.coco["images"]} - seen)
    if missing and rank() == 0:
        warnings.warn(
            f"{missing} images of the annotations were not delivered by the dataset and do not count", stacklevel=2
        )
    return broadcast(metrics)


def _predictions(
    model: nn.Module,
    dataset: DetectionDataset,
    device: torch.device | str | None,
    batch_size: int,
    workers: int,
    max_detections: int | None,
    progress: bool,
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Image id and result of this process' share of the items: of rank r in n processes r, r + n, r + 2 n, ..."""
    # Casts, since Subset and DataLoader ask for their own base class and need only len() and [i].
    share = Subset(cast(Any, dataset), range(rank(), len(dataset), world_size()))
    loader = DataLoader(share, batch_size=None, num_workers=workers, collate_fn=cast(Any, _image_and_id))
    limit = max(max_detections or 100, getattr(getattr(model, "roi_heads", None), "detections_per_img", None) or 0)
    predictor = Predictor(model, device=device, masks="rle", batch_size=batch_size, max_detections=limit, workers=0)
    ids: deque[int] = deque()

    def images() -> Iterator[Tensor]:
        for image, image_id in loader:
            ids.append(image_id)
            yield image

    title = "evaluate" if progress and rank() == 0 else False
    for prediction in predictor.stream(images(), progress=title, total=len(share)):
        assert prediction.result is not None
        yield ids.popleft(), prediction.result


def _image_and_id(item: tuple[Tensor, dict[str, Any]]) -> tuple[Tensor, int]:
    """All that evaluation needs of a dataset's item: masks of the ground truth stay in the process that loads."""
    return item[0], int(item[1]["image_id"])


def _measurable(coco: dict[str, Any], given: Sequence[IouType] | None) -> list[IouType]:
    """What both the annotations and the results have; what is empty (for results None) leaves it to the other."""
    records = coco["annotations"]
    types: list[IouType] = [
        iou_type
        for iou_type, key in RESULT_KEYS.items()
        if (given is None or iou_type in given) and (not records or any(record.get(key) for record in records))
    ]
    if not types:
        raise ValueError("the results have nothing that the annotations have: neither bbox, segmentation nor keypoints")
    return types


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
        plot: picture of the precision-recall curves (.png or .svg) to write.
        backend: who compares, pycocotools or the faster faster_coco_eval, with the same numbers.
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
    plot: Path | None = None
    backend: Backend = "pycocotools"


def run(config: EvaluateConfig) -> dict[IouType, CocoMetrics]:
    """Evaluate as configured, print the tables and return the metrics by IoU type.

    Under torchrun, each process takes its share of the images on a device of its own, and rank 0 prints and writes.

    Raises:
        ValueError: neither or both of checkpoint and results are given, or a checkpoint without images; or a plot or
            a backend that is impossible or not installed.
        FileNotFoundError: a file does not exist.
    """
    if (config.checkpoint is None) == (config.results is None):
        raise ValueError("give either a checkpoint to run or a results file to evaluate")
    check_backend(config.backend)
    if config.plot is not None:
        check_plot(config.plot)
    with process_group(config.device or default_device()) as device:
        metrics = _evaluate_file(config) if config.results is not None else _evaluate_checkpoint(config, device)
        if rank() > 0:
            return metrics
    for iou_type, numbers in metrics.items():
        print(f"{iou_type}\n{numbers.table()}")
        if len(numbers.classes) > 1:
            print(numbers.class_table())
    if config.plot is not None:
        print(f"precision-recall curves: {plot_precision_recall(metrics, config.plot)}")
    return metrics


def _evaluate_file(config: EvaluateConfig) -> dict[IouType, CocoMetrics]:
    assert config.results is not None
    iou_types: Sequence[IouType] | None = config.iou_types
    if iou_types is None:
        coco, results = load_json(config.annotations), load_json(config.results)
        readable = isinstance(coco, dict) and isinstance(results, list)
        # What is unreadable is for evaluate_coco to refuse, which names the file and the record.
        iou_types = _measurable(coco, _iou_types_in(results)) if readable else ["bbox"]
    return {
        iou_type: evaluate_coco(
            config.annotations,
            config.results,
            iou_type,
            max_detections=config.max_detections,
            use_categories=config.use_categories,
            backend=config.backend,
        )
        for iou_type in iou_types
    }


def _iou_types_in(results: list[dict[str, Any]]) -> list[IouType] | None:
    """What any of the records can be measured by; None if there are no records."""
    found: list[IouType] = [kind for kind, key in RESULT_KEYS.items() if any(record.get(key) for record in results)]
    return found if results else None


def _evaluate_checkpoint(config: EvaluateConfig, device: torch.device) -> dict[IouType, CocoMetrics]:
    assert config.checkpoint is not None
    if config.images is None:
        raise ValueError("a checkpoint needs images: give the folder of the images that the annotations name")
    # Read by a command only: whoever evaluates a model of their own needs none of the weight formats.
    from fastmrcnn.checkpoints import load_model

    model, info = load_model(config.checkpoint, device)
    masks = _has_masks(load_json(config.annotations))
    dataset = CocoDetection(config.images, config.annotations, masks=masks, channels=info.config.channels)
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
        backend=config.backend,
    )


def _has_masks(coco: Any) -> bool:
    """Whether any annotation has a mask; what is malformed is for the dataset to refuse, which names the record."""
    annotations = coco.get("annotations") if isinstance(coco, dict) else None
    return isinstance(annotations, list) and any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
