"""A whole detection, from bytes to results on the CPU: torchvision's, step by step to ours, in turn.

    python -m benchmarks.end_to_end                             # what suits the device, batch 1
    python -m benchmarks.end_to_end --size 800x1333 mixed --batch 1 8 --masks none bool rle --compiled
    python -m benchmarks.end_to_end --checkpoint best.pt --images photos --json result.json

One process, equal weights, the same images.  For each way (`benchmarks.detection_steps`): the p20, p50 and p80 of its
times and of its ratio to torchvision as shipped, pair by pair, which holds where the speed of a machine drifts; what it
asks of the device per image (operations, values read, and on a GPU launches and waits); and how far it agrees with
torchvision in float32, strictly and within what 16 bits blur: that without TF32, which times are with.  Weights are
random unless a checkpoint is given: enough for float32, but in 16 bits random networks agree with nobody, not even
torchvision's with itself.  The run fails if ours does not run, or in float32 differs.  Times are without compilation,
which the first call includes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection_steps import SMALL_DETECTOR, Setting, agreements, contenders, detectors, photos
from benchmarks.measure import PERCENTILES, conditions, demands, device_name, percentiles, without_tf32
from benchmarks.report import markdown
from fastmrcnn.files import write_json

MIXED = ((480, 640), (640, 480), (427, 640), (500, 375), (375, 500), (612, 612), (640, 426), (333, 500))
BASELINE = "torchvision"
ENOUGH = 5
"""Pairs that are as many as needed, where they take long."""
LEAST = 0.98
"""Share of the detections in float32 that have to have twins."""


def main() -> None:
    """Run the benchmark of the command line."""
    on_gpu = device_name() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builder", default="maskrcnn_resnet50_fpn", help="a torchvision detector, of random weights")
    parser.add_argument("--checkpoint", type=Path, help="of ours, instead")
    parser.add_argument("--images", type=Path, help="folder of photos, which are resized; generated images otherwise")
    sizes = ["480x640", "800x1333", "mixed"] if on_gpu else ["480x640"]
    parser.add_argument("--size", nargs="+", default=sizes, metavar="HxW", help="of the images; or mixed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8] if on_gpu else [1], help="images per call")
    masks = ["none", "soft", "bool", "bits", "rle"]
    parser.add_argument("--masks", nargs="+", default=["none", "bool", "rle"] if on_gpu else ["soft"], choices=masks)
    parser.add_argument("--pairs", type=int, default=30 if on_gpu else 5, help="counted runs of each")
    parser.add_argument("--seconds", type=float, default=150, help="after which no more runs follow, if there are some")
    parser.add_argument("--small", action="store_true", help="images are made small and boxes few, to see that it runs")
    parser.add_argument("--compiled", action="store_true", help="torchvision's networks by torch.compile, too")
    parser.add_argument("--half", default="float16" if on_gpu else "bfloat16", choices=["float16", "bfloat16"])
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()

    cases: list[dict[str, Any]] = []
    result = {"images": "photos" if options.images else "generated", "cases": cases, "conditions": conditions()}
    for size in options.size:
        for batch in options.batch:
            images = photos(options.images, [of_image(size, i) for i in range(batch)])
            small = SMALL_DETECTOR if options.small else {}
            theirs, ours = detectors(options.builder, options.checkpoint, images[:2], **small)
            for masks in options.masks:
                wanted: Any = None if masks == "none" else masks
                setting = Setting(images, wanted, getattr(torch, options.half))
                case = {"model": options.checkpoint.name if options.checkpoint else options.builder}
                case |= {"size": size, "batch": batch, "masks": masks}
                ways = contenders(theirs, ours, setting, compiled=options.compiled)
                case |= measured(ways, batch, options.pairs, options.seconds)
                cases.append(case)
                print(table(case), flush=True)
                if options.json:
                    write_json(options.json, result)
    if not options.json:
        print(json.dumps(result["conditions"]))
    if wrong := disagreements(cases):
        raise SystemExit(f"{'; '.join(wrong)}: the times mean nothing")


def of_image(size: str, number: int) -> tuple[int, int]:
    """Height and width of image `number`, by an option of the command line."""
    if size == "mixed":
        return MIXED[number % len(MIXED)]
    try:
        height, width = map(int, size.split("x"))
    except ValueError:
        raise SystemExit(f"--size {size}: expected HEIGHTxWIDTH, such as 480x640, or mixed") from None
    return height, width


def measured(calls: dict[str, Callable[[], Any]], images: int, pairs: int, seconds: float = math.inf) -> dict[str, Any]:
    """What there is to say of each way to detect; of those that do not run here, why."""
    found, running = {}, {}
    with without_tf32():
        expected = calls[BASELINE]()
    for name, call in calls.items():
        started = time.perf_counter()
        try:
            with without_tf32():
                result = call()
            first = time.perf_counter() - started
            call()  # which captures a graph, where that is another one with TF32
        except Exception as error:  # of any kind: the others are measured all the same
            found[name] = {"error": ": ".join((type(error).__name__, *str(error).splitlines()[:1]))}
            continue
        asked = {f"{what} per image": round(count / images, 1) for what, count in demands(call).items()}
        found[name] = {"agreement": agreements(expected, result), "first_call_s": round(first, 2), **asked}
        running[name] = call
    times = paired_times(running, pairs, seconds=seconds)
    for name, taken in times.items():
        rate = round(images / statistics.median(taken), 2)
        found[name] |= percentiles(taken) | {"speedup": speedup(times[BASELINE], taken), "images_per_s": rate}
    return {"detections": sum(len(image["boxes"]) for image in expected), "contenders": found}


def table(case: dict[str, Any]) -> str:
    """Milliseconds, ratios, counts and agreement, a row for each way, in Markdown."""
    rows = []
    for name, found in case["contenders"].items():
        if "error" in found:
            rows.append([name, found["error"], *[""] * 4])
            continue
        times = " / ".join(f"{found[f'p{p}_us'] / 1e3:,.1f}" for p in PERCENTILES)
        ratios = " / ".join(f"{value:.2f}x" for value in found["speedup"].values())
        counts = [f"{value:,.0f}" for key, value in found.items() if key.endswith("per image")]
        agreed = " / ".join(f"{share:.1%}" for share in found["agreement"].values())
        rows.append([name, times, ratios, f"{found['first_call_s']:.1f}", " / ".join(counts), agreed])
    keys = next(found for found in case["contenders"].values() if "error" not in found)
    counted = " / ".join(key.removesuffix(" per image") for key in keys if key.endswith("per image"))
    header = [f"{case['model']}, {case['batch']} x {case['size']}, masks: {case['masks']}", "ms", "torchvision over it"]
    header.append("first call, s")
    return markdown([*header, f"{counted} per image", "agreement"], rows) + "\n"


def disagreements(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Ours that do not run, or in float32 do not agree with torchvision's."""
    wrong = []
    for name, found in (pair for case in cases for pair in case["contenders"].items()):
        ours = name.startswith("fastmrcnn")
        exact = not ("AMP" in name or "float16" in name)
        if ours and "error" in found:
            wrong.append(f"{name} does not run: {found['error']}")
        elif ours and exact and (share := found["agreement"]["strictly"]) < LEAST:
            wrong.append(f"{name} agrees in {share:.1%} of the detections")
    return wrong


def paired_times(
    calls: dict[str, Callable[[], object]], pairs: int, warm_up: int = 2, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each of `calls`, run in turn; the first of a pair alternates.

    After `seconds` there are no more than `ENOUGH`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    for i in range(-warm_up, pairs):
        if i >= ENOUGH and time.perf_counter() > until:
            break
        order = list(calls) if i % 2 == 0 else list(reversed(calls))
        for name in order:
            started = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def speedup(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles of the ratio of two lists of times, pair by pair."""
    ratio = torch.tensor(baseline) / torch.tensor(seconds)
    return {f"p{p}": round(torch.quantile(ratio, p / 100).item(), 3) for p in PERCENTILES}


if __name__ == "__main__":
    main()
