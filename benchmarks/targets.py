"""What this library aims at, and whether measurements reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.collected import Results
from benchmarks.inputs import PHOTO
from benchmarks.report import cases, fastest

SIZE = f"{PHOTO[0]}x{PHOTO[1]}"
HALVES = ("fastmrcnn float16", "fastmrcnn bfloat16")
FLOAT32 = ("fastmrcnn float32",)
MASKS = ("none", "bool")
"""What masks become where whole detections are compared: nothing, since there is no mask head, and pixels.  As RLE
torchvision's would have to be encoded on the CPU, beside which all else is nothing."""


class Measured(NamedTuple):
    """A number, and whether it is good enough."""

    says: str
    met: bool


class Target(NamedTuple):
    """What is aimed at.

    Args:
        what: is measured.
        against: whom.
        aim: in words.
        measure: function that finds it in results, or None if they do not have it.
    """

    what: str
    against: str
    aim: str
    measure: Callable[[Results], Measured | None]


def operation(
    op: str, wanted: list[str], ours_is: Sequence[str], ratio: float, *, floor: float | None = None
) -> Callable[[Results], Measured | None]:
    """How many times faster an operation is on a GPU than the fastest of all others, in each of some cases.

    Args:
        op: its name.
        wanted: cases.
        ours_is: our contenders, of which the fastest counts: those that do the same.
        ratio: that is aimed at.
        floor: how many times what a copy of the least bytes takes it may take.
    """

    def measure(results: Results) -> Measured | None:
        ratios, floors = [], []
        for case in wanted:
            found = cases(results.ops).get((op, case), []) if results.on_gpu else []
            ours = fastest([r for r in found if r["contender"] in ours_is], "ours")
            baseline = fastest(found, "shipped", "tuned")
            if ours is None or baseline is None:
                return None
            ratios.append(baseline["p50_us"] / ours["p50_us"])
            floors.append(1 / ours["share_of_copy_bandwidth"])
        says = " / ".join(f"{value:.1f}x" for value in ratios)
        if floor is None:
            return Measured(says, min(ratios) >= ratio)
        says += ", " + " / ".join(f"{value:.1f}x" for value in floors) + " the floor"
        return Measured(says, min(ratios) >= ratio and max(floors) <= floor)

    return measure


def detection(batch: int, ratio: float, milliseconds: float | None = None) -> Callable[[Results], Measured | None]:
    """How many times faster the engine is on a GPU than the fastest of all other ways, for each kind of masks."""

    def measure(results: Results) -> Measured | None:
        ratios, times = [], []
        for masks in MASKS:
            found = results.detection(SIZE, batch, masks) if results.on_gpu else None
            ran = {name: x["p50_us"] for name, x in (found or {}).items() if "p50_us" in x}
            ours = ran.get("fastmrcnn engine float16")
            if ours is None:
                return None
            ratios.append(min(us for name, us in ran.items() if not name.startswith("fastmrcnn")) / ours)
            times.append(ours / 1e3)
        says = " / ".join(f"{value:.1f}x" for value in ratios) + ", " + " / ".join(f"{ms:.1f}" for ms in times) + " ms"
        return Measured(says, min(ratios) >= ratio and (milliseconds is None or max(times) <= milliseconds))

    return measure


def training(batch: int, ratio: float, images_per_s: float) -> Callable[[Results], Measured | None]:
    """How many times faster a step in bfloat16 is than torchvision's under AMP on a GPU."""

    def measure(results: Results) -> Measured | None:
        found = (results.step(batch) if results.on_gpu else None) or {}
        steps = {name: x["stages"]["step"]["p50_us"] for name, x in found.items() if "stages" in x}
        ours, theirs = steps.get("fastmrcnn bfloat16"), steps.get("torchvision AMP channels_last")
        if ours is None or theirs is None:
            return None
        rate = 1e6 * batch / ours
        return Measured(f"{theirs / ours:.1f}x, {rate:.0f} img/s", theirs / ours >= ratio and rate >= images_per_s)

    return measure


def on_cpu(ratio: float) -> Callable[[Results], Measured | None]:
    """How many times faster the engine is than torchvision on a CPU in float32, median of pairs."""

    def measure(results: Results) -> Measured | None:
        found = None if results.on_gpu else results.detection("480x640", 1, "soft")
        if found is None or "p50_us" not in found.get("fastmrcnn engine float32", {}):
            return None
        reached = found["fastmrcnn engine float32"]["speedup"]["p50"]
        return Measured(f"{reached:.2f}x", reached >= ratio)

    return measure


FORWARD = [f"1 x 1000 RoIs, 7x7, {SIZE}", f"1 x 100 RoIs, 14x14, {SIZE}"]
BACKWARD = [f"2 x 512 RoIs, 7x7, {SIZE}", f"2 x 128 RoIs, 14x14, {SIZE}"]
PROPOSALS = [f"{n} x 1000 per level, clustered, {SIZE}" for n in (1, 2, 8)]
DETECTIONS = [f"{n} x 1000 proposals, 91 classes, clustered" for n in (1, 2, 8)]
MANY_MASKS = [f"100 masks, {SIZE}"]
TARGETS = [
    Target(
        "RoIAlign forward, 1000 RoIs 7x7 and 100 RoIs 14x14, 16 bits",
        "torchvision's `MultiScaleRoIAlign`",
        "8x, 3x the floor",
        operation("roi_align forward", FORWARD, HALVES, 8, floor=3),
    ),
    Target(
        "RoIAlign backward, 512 RoIs 7x7 and 128 RoIs 14x14, 2 images",
        "torchvision",
        "8x",
        operation("roi_align backward", BACKWARD, HALVES, 8),
    ),
    Target("proposals, batch 1, 2, 8", "`filter_proposals`", "8x", operation("proposals", PROPOSALS, FLOAT32, 8)),
    Target(
        "selection of detections, 91 classes, batch 1, 2, 8",
        "`postprocess_detections`",
        "8x",
        operation("detections", DETECTIONS, FLOAT32, 8),
    ),
    Target(
        f"pasting 100 masks, {SIZE}",
        "torchvision",
        "100x, 1.5x the floor",
        operation("paste", MANY_MASKS, ["fastmrcnn soft"], 100, floor=1.5),
    ),
    Target(
        f"pasting 100 masks as bool, {SIZE}",
        "detectron2's method",
        "5x, 1.5x the floor",
        operation("paste of detectron2", MANY_MASKS, ["fastmrcnn bool"], 5, floor=1.5),
    ),
    Target(
        f"100 masks to RLE, {SIZE}", "pasting and pycocotools", "100x", operation("rle", MANY_MASKS, ["fastmrcnn"], 100)
    ),
    Target(
        f"detection, R50-FPN, {SIZE}, batch 1, without and with masks",
        "torchvision at its best",
        "8x, 2.5 ms",
        detection(1, 8, 2.5),
    ),
    Target(
        f"detection, R50-FPN, {SIZE}, batch 8, without and with masks",
        "torchvision at its best",
        "2.5x",
        detection(8, 2.5),
    ),
    Target(f"training step, R50-FPN, {SIZE}, batch 8", "torchvision AMP", "4x, 180 img/s", training(8, 4, 180)),
    Target("detection on a CPU, R50-FPN, float32, soft masks", "torchvision", "1.3x", on_cpu(1.3)),
]
