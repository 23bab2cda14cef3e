"""The loading of training data alone, ours and that of torchvision's reference scripts, in turn, of the same images.

    python -m benchmarks.loader --images photos --annotations photos.json
    python -m benchmarks.loader --images photos --annotations photos.json --workers 0 4 8 --json result.json

Reports images per second by the number of workers, of the fastest epoch, and of ours the milliseconds of one core that
each stage takes.  Both read images and masks and mirror half of them.  Theirs are float32, with masks as bytes, and
resized by the model; ours are bytes, with masks as bits.  The run fails if images or masks of the two differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.end_to_end import paired_times
from benchmarks.measure import conditions
from fastmrcnn import ops
from fastmrcnn.data import (
    CocoDetection,
    HorizontalFlip,
    Resize,
    TrainingBatches,
    TrainingItems,
    collate_loaded,
    look_through,
    read_image,
    training_loader,
)
from fastmrcnn.files import write_json
from fastmrcnn_kernels.reference.rle import run_lengths_of

MIN_SIZE, MAX_SIZE = 800, 1333
CPU = torch.device("cpu")


def by_reference(images: Path, annotations: dict[str, Any], flip: float) -> Any:
    """Items as torchvision's `references/detection` reads them, of annotations whose run lengths are numbers."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(annotations, file)
        file.flush()
        dataset = torchvision.datasets.CocoDetection(images, file.name)
    steps = [v2.ToImage(), v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    dataset.transforms = v2.Compose(steps)
    wanted = ["boxes", "labels", "masks", "image_id", "iscrowd"]
    return torchvision.datasets.wrap_dataset_for_transforms_v2(dataset, target_keys=wanted)


def with_numbers(coco: dict[str, Any]) -> dict[str, Any]:
    """Annotations with compressed run lengths as numbers, the only ones that torchvision reads."""
    changed = []
    for annotation in coco["annotations"]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
            runs = run_lengths_of([segmentation])[0].tolist()
            annotation = annotation | {"segmentation": segmentation | {"counts": runs}}
        changed.append(annotation)
    return coco | {"annotations": changed}


def paired(batch: list[Any]) -> tuple[Any, ...]:
    """The collate function of torchvision's references."""
    return tuple(zip(*batch, strict=True))


def differing(ours: CocoDetection, theirs: Any, count: int) -> int:
    """How many of the first `count` images, as bytes, or their masks differ, all mirrored."""
    items = TrainingItems(ours, 0, HorizontalFlip(1.0), Resize([MIN_SIZE], MAX_SIZE))
    found = 0
    for i in range(count):
        sample, (image, target) = items[0, 0, i], theirs[i]
        same = torch.equal(sample.image, (image * 255).round().byte())
        if "masks" in target:
            masks = target["masks"][torch.as_tensor(target["iscrowd"]) == 0]
            same = same and torch.equal(ops.unpack_bits(sample.words, sample.image.shape[2]), masks.bool())
        found += not same
    return found


def consumed(batches: Iterable[Any]) -> int:
    """Bytes of all tensors of all batches, which are what workers have to send."""

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    return sum(size(list(batch if isinstance(batch, tuple) else vars(batch).values())) for batch in batches)


def stages(dataset: CocoDetection, batch_size: int) -> dict[str, float]:
    """Milliseconds per image that each stage of ours keeps this process computing."""
    flip, view = HorizontalFlip(0.5), Resize([MIN_SIZE], MAX_SIZE)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = call()
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - started
        return result

    items = TrainingItems(dataset, 0, flip, view)
    batches = TrainingBatches(dataset, batch_size)
    for batch in batches:
        for key in batch:
            path, size = dataset.image_path(key.item), dataset.image_size(key.item)
            timed("decode", lambda path=path, size=size: read_image(path, size=size))
            image, target = timed("decode and rasterise", lambda key=key: dataset[key.item])
            image, target = timed("transforms", lambda image=image, target=target: flip(image, target))
            timed("view", lambda size=size, target=target: look_through(target, view(*size)))
            timed("pack masks", lambda target=target: ops.pack_bits(target["masks"].view(torch.bool)))
        samples = timed("all of a sample", lambda batch=batch: [items[key] for key in batch])
        timed("collate", lambda samples=samples: collate_loaded(samples))
    seconds["rasterise"] = seconds.pop("decode and rasterise") - seconds["decode"]
    count = len(batches) * batch_size
    return {name: round(1e3 * value / count, 3) for name, value in seconds.items()}


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--annotations", type=Path, required=True, help="their COCO annotation file")
    parser.add_argument("--batch", type=int, default=4, help="images per batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of processes")
    parser.add_argument("--pairs", type=int, default=3, help="counted epochs of each")
    parser.add_argument("--limit", type=int, help="number of images, by default all")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()

    torch.set_num_threads(1)  # as in workers
    dataset = CocoDetection(options.images, options.annotations, as_bytes=True)
    if options.limit is not None:
        del dataset.image_ids[options.limit :]
    annotations = with_numbers(dataset.coco)
    differs = differing(dataset, by_reference(options.images, annotations, 1.0), min(100, len(dataset)))
    theirs = by_reference(options.images, annotations, 0.5)
    batches = TrainingBatches(dataset, options.batch)
    items = TrainingItems(dataset, 0, HorizontalFlip(0.5), Resize([MIN_SIZE], MAX_SIZE))
    order = [[key.item for key in batch] for batch in batches]
    count = len(batches) * options.batch

    rates: dict[str, Any] = {}
    for workers in options.workers:
        shared: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        loaders: dict[str, DataLoader[Any]] = {
            "torchvision": DataLoader(theirs, batch_sampler=order, collate_fn=paired, **shared),
            "fastmrcnn": training_loader(items, batches, workers=workers, device=CPU),
        }
        times = paired_times({name: lambda x=x: consumed(x) for name, x in loaders.items()}, options.pairs, warm_up=1)
        rates[f"{workers} workers"] = {name: round(count / min(seconds), 1) for name, seconds in times.items()}
        if workers == options.workers[0]:
            rates["bytes per image"] = {name: consumed(x) // count for name, x in loaders.items()}
    result = {
        "images per second": rates,
        "milliseconds per image": stages(dataset, options.batch),
        "differing images": differs,
        "inputs": {"images": count, "objects": len(annotations["annotations"]), "batch": options.batch},
        "conditions": conditions(),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    if differs:
        raise SystemExit(f"{differs} images or their masks differ: the times mean nothing")


if __name__ == "__main__":
    main()
