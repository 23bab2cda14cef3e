"""A whole detection, ours and torchvision's in turn, in one process with the same weights and images.

    python -m benchmarks.end_to_end                       # 480x640, batch 1, the default model
    python -m benchmarks.end_to_end --images photos --builder fasterrcnn_resnet50_fpn --json result.json

Reports the p20, p50 and p80 of the times and of their ratio, pair by pair: on a machine whose speed drifts the ratio
holds where the times do not.  The run fails if the detections of the two differ.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import fastmrcnn
from benchmarks.detectors import agreement, calibrate
from benchmarks.measure import PERCENTILES, conditions, device_name, percentiles
from fastmrcnn.data import Shapes, image_files, load_image
from fastmrcnn.files import write_json


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builder", default="maskrcnn_resnet50_fpn", help="a torchvision detector")
    parser.add_argument("--images", type=Path, help="folder of photos; generated images otherwise")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="photos are resized")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--pairs", type=int, default=10, help="counted runs of each")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()

    images = load_images(options.images, tuple(options.size), options.batch)
    theirs, ours = models(options.builder, images)
    with torch.inference_mode():
        agreed = agreement(theirs(images), ours(images))
        times = paired_times({"torchvision": lambda: theirs(images), "fastmrcnn": lambda: ours(images)}, options.pairs)
    result = report(times) | {"agreement": agreed, "inputs": inputs(options), "conditions": conditions()}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    if agreed < 0.98:
        raise SystemExit(f"only {agreed:.1%} of the detections agree: the times mean nothing")


def models(builder: str, images: Sequence[Tensor], **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """torchvision's model and ours with equal random weights, scaled so that both detect as a trained model would."""
    torch.manual_seed(0)
    arguments |= {"weights": None, "weights_backbone": None}
    theirs = getattr(torchvision.models.detection, builder)(**arguments).to(device_name()).eval()
    calibrate(theirs, images)
    ours = getattr(fastmrcnn, builder)(**arguments).to(device_name()).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def load_images(folder: Path | None, size: tuple[int, int], count: int) -> list[Tensor]:
    """`count` images [3, H, W] of `size`, photos of `folder` or generated ones."""
    if folder is None:
        shapes = Shapes(count, image_size=size)
        return [shapes[i][0].to(device_name()) for i in range(count)]
    photos = [load_image(path) for path in image_files(folder)[:count]]
    resized = [functional.interpolate(photo[None], size=size, mode="bilinear", antialias=True)[0] for photo in photos]
    return [photo.clamp(0, 1).to(device_name()) for photo in resized]


def paired_times(calls: dict[str, Callable[[], object]], pairs: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each of `calls`, run in turn; the first of a pair alternates."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-warm_up, pairs):
        order = list(calls) if i % 2 == 0 else list(reversed(calls))
        for name in order:
            started = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles of each time, and of torchvision's time over ours."""
    ratio = torch.tensor(times["torchvision"]) / torch.tensor(times["fastmrcnn"])
    speedup = {f"p{p}": round(torch.quantile(ratio, p / 100).item(), 3) for p in PERCENTILES}
    return {name: percentiles(values) for name, values in times.items()} | {"speedup": speedup}


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """What was run."""
    images = "photos" if options.images else "generated"
    return {"builder": options.builder, "size": list(options.size), "batch": options.batch, "images": images}


if __name__ == "__main__":
    main()
