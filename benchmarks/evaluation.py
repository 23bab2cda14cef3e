"""Evaluation of detections, ours and the loop of torchvision's reference scripts, in turn, on the same detections.

    python -m benchmarks.evaluation                      # 100 images of 480x640, 100 detections each
    python -m benchmarks.evaluation --images 20 --json result.json

What is measured is what comes after the network: pasting masks, encoding them, matching them, and the numbers.  The
network is one that knows its answers, small masks in boxes.  The run fails if the two find different numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torchvision
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastmrcnn
from benchmarks.end_to_end import paired_times, speedup
from benchmarks.measure import conditions, device_name, percentiles
from fastmrcnn.batches import DetectionBatch, ImageBatch
from fastmrcnn.data import Shapes, collate
from fastmrcnn.evaluate import evaluate
from fastmrcnn.files import write_json

CELLS, DETECTIONS, SIZE = 28, 100, (480, 640)
Numbers = dict[str, np.ndarray[Any, Any]]


class Remembered(Shapes):
    """Images of shapes, made once, without their masks; and detections of them, in boxes that are a little off."""

    def __init__(self, count: int) -> None:
        super().__init__(count, image_size=SIZE, max_objects=12)
        self.images, self.detections = [], []
        generator = torch.Generator().manual_seed(0)
        for image, target in (super(Remembered, self).__getitem__(i) for i in range(count)):
            self.images.append((image, {"image_id": target["image_id"]}))
            self.detections.append(perturbed(target, generator))

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        return self.images[i]


def perturbed(target: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """`DETECTIONS` of the objects of an image: boxes [D, 4], labels, descending scores, and masks [D, 1, 28, 28]."""
    which = torch.arange(DETECTIONS) % len(target["boxes"])
    boxes = target["boxes"][which]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    limits = torch.tensor([SIZE[1], SIZE[0]]).repeat(2)
    boxes = boxes + torch.randn(DETECTIONS, 4, generator=generator) * sides * 0.06
    boxes = torch.minimum(boxes.clamp(min=0), limits.float())
    rois = torch.cat((which[:, None].float(), boxes), dim=1)
    masks = torchvision.ops.roi_align(target["masks"][:, None].float(), rois, CELLS, aligned=True)
    scores = torch.rand(DETECTIONS, generator=generator).sort(descending=True).values
    return {"boxes": boxes, "labels": target["labels"][which], "scores": scores, "masks": masks}


def knowing(dataset: Remembered) -> tuple[nn.Module, nn.Module]:
    """torchvision's model and ours, which leave images at their size, and detect what is known of them, in turn."""
    options = {"weights": None, "weights_backbone": None, "min_size": SIZE[0], "max_size": SIZE[1], "num_classes": 4}
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(**options).to(device_name()).eval()
    ours = fastmrcnn.maskrcnn_resnet50_fpn(**options).to(device_name()).eval()
    known = [{name: value.to(device_name()) for name, value in found.items()} for found in dataset.detections]
    batched = {name: torch.stack([found[name] for found in known]) for name in known[0]}

    def forward(self: Any, images: list[Tensor]) -> list[dict[str, Tensor]]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _ = self.transform(images)
        found = [dict(x) for x in known[self.at : self.at + len(images)]]
        self.at = (self.at + len(images)) % len(known)
        return self.transform.postprocess(found, batch.image_sizes, sizes)

    def detect(self: Any, images: ImageBatch) -> DetectionBatch:
        part = slice(self.at, self.at + len(images.sizes))
        self.at = (self.at + len(images.sizes)) % len(known)
        found = {name: value[part].clone() for name, value in batched.items()}
        found["masks"] = found["masks"][:, :, 0]
        return DetectionBatch(**found, count=torch.full((len(images.sizes),), DETECTIONS, device=images.sizes.device))

    theirs.at = ours.at = 0
    theirs.forward, ours.detect = MethodType(forward, theirs), MethodType(detect, ours)
    return theirs, ours


def by_reference(model: nn.Module, dataset: Remembered, batch_size: int) -> Numbers:
    """What torchvision's `references/detection` does: soft masks to the CPU, one encoded after the other, and matched.

    Its evaluation is that of each batch by pycocotools, whose matches are put together at the end.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset.coco)
        truth.createIndex()
        evaluators = {kind: COCOeval(truth, iouType=kind) for kind in ("bbox", "segm")}
        matches: dict[str, list[Any]] = {kind: [] for kind in evaluators}
        ids: list[int] = []
        for images, targets in DataLoader(dataset, batch_size, collate_fn=collate):
            with torch.inference_mode():
                outputs = model([image.to(device_name()) for image in images])
            found = {t["image_id"]: {k: v.cpu() for k, v in x.items()} for t, x in zip(targets, outputs, strict=True)}
            ids += found
            for kind, evaluator in evaluators.items():
                records = [record for image_id, x in found.items() for record in records_of(x, image_id, kind)]
                evaluator.cocoDt = truth.loadRes(records)
                evaluator.params.imgIds = list(found)
                evaluator.evaluate()
                shape = (-1, len(evaluator.params.areaRng), len(found))
                matches[kind].append(np.asarray(evaluator.evalImgs, dtype=object).reshape(shape))
        for kind, evaluator in evaluators.items():
            evaluator.evalImgs = list(np.concatenate(matches[kind], axis=2).flatten())
            evaluator.params.imgIds = ids
            evaluator._paramsEval = copy.deepcopy(evaluator.params)
            evaluator.accumulate()
            evaluator.summarize()
    return {kind: evaluator.stats for kind, evaluator in evaluators.items()}


def records_of(output: dict[str, Tensor], image_id: int, kind: str) -> list[dict[str, Any]]:
    """COCO results of an image: boxes, or masks encoded one by one."""
    scores, labels = output["scores"].tolist(), output["labels"].tolist()
    if kind == "bbox":
        x1, y1, x2, y2 = output["boxes"].unbind(1)
        regions = torch.stack((x1, y1, x2 - x1, y2 - y1), dim=1).tolist()
    else:
        regions = []
        for mask in (output["masks"] > 0.5)[:, 0, :, :, None].numpy():
            rle = pycocotools_mask.encode(np.array(mask, dtype=np.uint8, order="F"))[0]
            regions.append(rle | {"counts": rle["counts"].decode("utf-8")})
    key = "bbox" if kind == "bbox" else "segmentation"
    return [
        {"image_id": image_id, "category_id": label, key: region, "score": score}
        for label, region, score in zip(labels, regions, scores, strict=True)
    ]


def contenders(count: int, batch_size: int) -> dict[str, Callable[[], Numbers]]:
    """Evaluation of `count` images, each as a call that returns COCO's twelve numbers for boxes and for masks."""
    dataset = Remembered(count)
    theirs, ours = knowing(dataset)

    def by_us() -> Numbers:
        metrics = evaluate(ours, dataset, batch_size=batch_size, progress=False)
        return {kind: np.array(numbers.stats) for kind, numbers in metrics.items()}

    return {"torchvision": lambda: by_reference(theirs, dataset, batch_size), "fastmrcnn": by_us}


def difference(first: Numbers, second: Numbers) -> float:
    """The largest between two results."""
    assert first.keys() == second.keys()
    return max(float(np.abs(first[kind] - second[kind]).max()) for kind in first)


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1, help="images per call of the network")
    parser.add_argument("--pairs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    calls = contenders(options.images, options.batch)
    numbers = {name: call() for name, call in calls.items()}
    differs = difference(*numbers.values())
    times = paired_times(calls, options.pairs, warm_up=0)
    inputs = {"images": options.images, "size": list(SIZE), "detections": DETECTIONS, "batch": options.batch}
    ap = {kind: round(float(stats[0]), 4) for kind, stats in numbers["fastmrcnn"].items()}
    result: dict[str, Any] = {name: percentiles(seconds) for name, seconds in times.items()}
    result |= {"speedup": speedup(times["torchvision"], times["fastmrcnn"]), "AP": ap, "difference": differs}
    result |= {"inputs": inputs, "conditions": conditions()}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    if differs > 1e-9:
        raise SystemExit(f"the numbers differ by up to {differs}: the times mean nothing")


if __name__ == "__main__":
    main()
