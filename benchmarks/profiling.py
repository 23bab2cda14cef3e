"""Where the time of a detection, or of a training step, goes on the device: kernels, gaps, conversions, copies.

    python -m benchmarks.profiling detection                       # the engine, and torchvision at its best
    python -m benchmarks.profiling training --batch 8 --json result.json --traces traces

Of each: time per call, the share of it in which the device is busy, the gaps in between, launches and waits, and the
kernels by kind and by name.  Conversions of memory layouts are told apart: there should be none, since maps stay
channels_last from the images to the heads.  On a CPU operators of PyTorch take the place of kernels.  `--traces` keeps
what was recorded, for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.detection_steps import SMALL_DETECTOR, Setting, contenders, detectors, photos
from benchmarks.end_to_end import of_image
from benchmarks.inputs import PHOTO
from benchmarks.measure import conditions, device_name, is_launch, is_wait
from benchmarks.report import markdown
from benchmarks.training_steps import AMP, CONTENDERS, SHIPPED, dataset, run_of
from benchmarks.training_steps import detector as training_detector
from fastmrcnn.files import write_json

WARM_UP, CALLS, FEW = 3, 5, 1
"""Calls before those that count; those that count; and either where it has to be quick."""
LONGEST = 12
"""Kernels that the table names."""
GAP = 2.0
"""Microseconds of an idle device from which on they count as a gap."""
KINDS = {
    "layout conversion": r"nchwtonhwc|nhwctonchw|transpose|aten::(clone|contiguous)\b",
    "ours": r"(?-i:^[a-z0-9_]+_kernel$)|fastmrcnn::",
    "convolution or product": r"conv|gemm|gemv|xmma|cutlass|cudnn|nvjet|cublas|[wd]grad|mkldnn|aten::(add|b)?mm\b",
    "copy or cast": r"memcpy|copy|aten::(_to_copy|to)\b",
    "fill": r"memset|fill|zero",
    "suppression": r"nms",
    "sort or top-k": r"sort|topk|radix|scan",
}
"""Of kernels, by what their names contain; the first that fits."""


class Span(NamedTuple):
    """A kernel, a copy, or an operator: what ran from when to when, in microseconds."""

    name: str
    start: float
    end: float


def kind(name: str) -> str:
    """Of a kernel."""
    return next((found for found, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def on_device(events: Iterable[dict[str, Any]]) -> list[Span]:
    """What the GPU did, of the events of a trace."""
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [Span(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in categories]
    return sorted(found, key=lambda span: span.start)


def on_host(events: Iterable[dict[str, Any]]) -> list[Span]:
    """What operators did by themselves, on each thread: the time of an operator without that of those it calls."""
    threads = defaultdict(list)
    for e in events:
        if e.get("cat") == "cpu_op" and "dur" in e:
            threads[e["tid"]].append(Span(e["name"], e["ts"], e["ts"] + e["dur"]))
    found = []
    for spans in threads.values():
        open_: list[list[Any]] = []  # operators within one another: name, end, from when on it is its own time
        for span in [*sorted(spans, key=lambda s: (s.start, -s.end)), Span("", float("inf"), float("inf"))]:
            while open_ and open_[-1][1] <= span.start:
                name, end, since = open_.pop()
                found.append(Span(name, since, end))
                if open_:
                    open_[-1][2] = end
            if open_:
                found.append(Span(open_[-1][0], open_[-1][2], span.start))
            open_.append([span.name, span.end, span.start])
    return sorted((span for span in found if span.end > span.start), key=lambda span: span.start)


def idle(spans: Sequence[Span]) -> list[float]:
    """Lengths of the gaps in which none of `spans`, ordered by their starts, runs; however short."""
    gaps, busy_until = [], spans[0].end
    for span in spans:
        if span.start > busy_until:
            gaps.append(span.start - busy_until)
        busy_until = max(busy_until, span.end)
    return gaps


def summarised(events: Sequence[dict[str, Any]], calls: int) -> dict[str, Any]:
    """What a trace of so many calls says, per call, in microseconds."""
    spans = on_device(events)
    of_gpu = bool(spans)
    spans = spans or on_host(events)
    gaps, by_kind, by_name = idle(spans), defaultdict(float), defaultdict(list)
    for span in spans:
        by_kind[kind(span.name)] += span.end - span.start
        by_name[span.name].append(span.end - span.start)
    whole = max(span.end for span in spans) - spans[0].start
    runtime = [e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    longest = sorted(by_name.items(), key=lambda pair: -sum(pair[1]))
    return {
        "of": "GPU" if of_gpu else "CPU",
        "us": round(whole / calls, 2),
        "busy": round(1 - sum(gaps) / whole, 4),
        "gaps": round(sum(gap >= GAP for gap in gaps) / calls, 1),
        "longest_gap_us": round(max(gaps, default=0.0), 2),
        "kernels": round(len(spans) / calls, 1),
        "launches": round(sum(map(is_launch, runtime)) / calls, 1),
        "waits": round(sum(map(is_wait, runtime)) / calls, 1),
        "kinds_us": {name: round(us / calls, 2) for name, us in sorted(by_kind.items(), key=lambda pair: -pair[1])},
        "longest": [
            {"name": name, "kind": kind(name), "us": round(sum(us) / calls, 2), "times": round(len(us) / calls, 1)}
            for name, us in longest[:LONGEST]
        ],
        "layout_conversions": sorted({span.name for span in spans if kind(span.name) == "layout conversion"}),
    }


def traced(call: Callable[[], object], warm_up: int, calls: int, keep: Path | None) -> list[dict[str, Any]]:
    """Events of so many of `call`, after some that are not counted."""
    for _ in range(warm_up):
        call()
    activities = [ProfilerActivity.CPU]
    if device_name() == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        if device_name() == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, gzip.open(keep, "wb") as target:
                shutil.copyfileobj(source, target)
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def table(name: str, found: dict[str, Any]) -> str:
    """What there is to say of a way to do it, in Markdown."""
    rows = [[kind_, f"{us:,.0f}", f"{us / found['us']:.0%}", ""] for kind_, us in found["kinds_us"].items()]
    rows += [
        [
            f"  {short(kernel['name'])}",
            f"{kernel['us']:,.0f}",
            f"{kernel['us'] / found['us']:.0%}",
            f"{kernel['times']:,.0f}",
        ]
        for kernel in found["longest"]
    ]
    said = (
        f"{found['kernels']:,.0f} on the {found['of']}, {found['launches']:,.0f} launches, {found['waits']:,.0f} waits"
    )
    said += f", busy {found['busy']:.0%}, {found['gaps']:,.0f} gaps, the longest {found['longest_gap_us']:,.0f} us"
    if found["of"] == "GPU" and found["layout_conversions"]:
        said += f"\nlayouts are converted by {', '.join(map(short, found['layout_conversions']))}"
    headline = f"{name}: {found['us']:,.0f} us"
    return f"{markdown([headline, 'us', 'share', 'times'], rows)}\n{said}\n"


def short(name: str) -> str:
    """Of the name of a kernel, whose templates can fill a page, what fits a line."""
    return name if len(name) <= 60 else name[:57] + "..."


def detection_calls(size: str, batch: int, masks: str, options: dict[str, int]) -> dict[str, Callable[[], object]]:
    """The engine, and torchvision's fastest way."""
    images = photos(None, [of_image(size, i) for i in range(batch)])
    half = torch.float16 if device_name() == "cuda" else torch.bfloat16
    theirs, ours = detectors("maskrcnn_resnet50_fpn", None, images[:2], **options)
    ways = contenders(theirs, ours, Setting(images, None if masks == "none" else masks, half))
    engine = f"fastmrcnn engine {str(half).removeprefix('torch.')}"
    return {name: ways[name] for name in ("torchvision AMP channels_last", engine)}


def training_calls(size: str, batch: int, *, small: bool) -> dict[str, Callable[[], object]]:
    """A step of ours, and of torchvision's, in bfloat16 on a GPU."""
    data = dataset(batch, of_image(size, 0))
    model = training_detector([data[i][0] for i in range(batch)], small=small)
    chosen = (AMP, CONTENDERS[1]) if device_name() == "cuda" else (SHIPPED, CONTENDERS[0])
    runs = {str(x): run_of(x, model, data) for x in chosen}
    return {name: (lambda run=run: run.step(run.load())) for name, run in runs.items()}


def main() -> None:
    """Record, and say where the time went."""
    on_gpu = device_name() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["detection", "training"])
    default = f"{PHOTO[0]}x{PHOTO[1]}" if on_gpu else "240x320"
    parser.add_argument("--size", default=default, metavar="HxW", help="of the images")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--masks", default="rle", choices=["none", "soft", "bool", "bits", "rle"], help="of detections")
    parser.add_argument("--small", action="store_true", help="a small network on small images, to see that it runs")
    parser.add_argument("--traces", type=Path, help="folder for what was recorded")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    warm_up, count = (FEW, FEW) if options.small else (WARM_UP, CALLS)
    if options.what == "detection":
        calls = detection_calls(options.size, options.batch, options.masks, SMALL_DETECTOR if options.small else {})
    else:
        calls = training_calls(options.size, options.batch, small=options.small)
    case = {"what": options.what, "size": options.size, "batch": options.batch, "contenders": {}}
    for name, call in calls.items():
        trace = f"{options.what}-{options.size}-{options.batch}-{name.replace(' ', '-')}.json.gz"
        path = options.traces and options.traces / trace
        case["contenders"][name] = summarised(traced(call, warm_up, count, path), count)
        print(table(f"{options.what}, {options.batch} x {options.size}, {name}", case["contenders"][name]), flush=True)
    if options.json:
        write_json(options.json, case | {"conditions": conditions()})


if __name__ == "__main__":
    main()
