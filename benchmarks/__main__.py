"""Everything, part by part: tests, kernels, operations, detections, steps and runs of training, profiles; a summary.

    python -m benchmarks                            # what suits this machine, into benchmark-results/DEVICE
    python -m benchmarks --nuclei data/nuclei       # training on nuclei among it
    python -m benchmarks --device cpu --quick       # whether all of it runs, in a few minutes; the numbers mean nothing
    python -m benchmarks --only ops training        # groups, or parts; --list names them

No part takes longer than nine minutes.  Stopped, by --minutes or however, it goes on where it was when called again;
parts that ended are not repeated unless the sources have changed, or by --again.  Each writes a file of JSON;
ops.svg and detection.svg are drawn of them.  What the programs print is in OUTPUT/logs.  Exit status 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks import report, tables
from benchmarks.collected import collected
from benchmarks.inputs import shapes_folder
from benchmarks.measure import ROOT, conditions
from benchmarks.parts import Part, Plan, parts
from benchmarks.report import markdown
from benchmarks.runner import DONE, FAILED, GRACE, LEFT_OUT, LIMIT, STOPPED, Runner
from fastmrcnn.files import write_atomically

STARTED = time.monotonic()
LEAST = 60.0
"""Seconds that have to be left for another part to begin."""


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="by default cuda, which is also AMD's, if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="the least of each part, to see that it runs")
    parser.add_argument("--output", type=Path, help="folder of results; by default benchmark-results/DEVICE")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups or parts")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--minutes", type=float, help="end after so many, to go on another time")
    parser.add_argument("--images", type=Path, help="folder of photos to detect in; generated images otherwise")
    parser.add_argument("--nuclei", type=Path, help="folder of nuclei, as the README has it; by default data/nuclei")
    parser.add_argument(
        "--scratch", action="store_true", help="train from random weights, where none can be downloaded"
    )
    parser.add_argument("--list", action="store_true", help="name the parts and what became of them, and run none")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU; --device cpu measures the CPU")
    for name in ("images", "nuclei"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name} {folder}: no such folder")
    if options.nuclei is None and (ROOT / "data" / "nuclei").is_dir():
        options.nuclei = ROOT / "data" / "nuclei"
    return options


def planned(options: argparse.Namespace) -> Plan:
    """What the command line asks for; what a quick run learns from is generated."""
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if on_gpu else "cpu"
    default = ROOT / "benchmark-results" / (f"{name}-quick" if options.quick else name)
    output = (options.output or default).resolve()
    nuclei = shapes_folder(output / "shapes") if options.quick else options.nuclei and options.nuclei.resolve()
    return Plan(on_gpu, options.quick, output, options.images and options.images.resolve(), nuclei, options.scratch)


def chosen(found: list[Part], wanted: list[str] | None) -> list[Part]:
    """The parts of some names or groups; all, if none is given."""
    if wanted is None:
        return found
    if unknown := [name for name in wanted if not any(part.name == name or part.group == name for part in found)]:
        groups = ", ".join(dict.fromkeys(part.group for part in found))
        raise SystemExit(f"--only {' '.join(unknown)}: no such part; groups are {groups}, and --list names the parts")
    return [part for part in found if part.name in wanted or part.group in wanted]


def main() -> None:
    """See the text of this module."""
    options = arguments()
    plan = planned(options)
    found = chosen(parts(plan), options.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # so that the part that runs is ended, too
    runner = Runner(plan.output, on_gpu=plan.on_gpu)
    if options.list:
        print(summary(found, runner))
        return
    print(f"{conditions()['device']}: {len(found)} parts, into {plan.output}", flush=True)
    if options.again:
        runner.forget(found)
    until = STARTED + 60 * options.minutes - GRACE if options.minutes else float("inf")
    for part in runner.due(found):
        runner.limit = min(LIMIT, until - time.monotonic())
        if runner.limit < LEAST:
            print("no time is left; called again, it goes on from here")
            break
        runner.run(part, f"[{found.index(part) + 1}/{len(found)}] {part.name}")
    finish(found, runner, plan.output)
    if any(runner.state(part) == FAILED for part in found):
        sys.exit(1)


def finish(found: list[Part], runner: Runner, output: Path) -> None:
    """Plots, tables, and the summary."""
    try:
        results = collected(output)
    except ValueError as error:
        print(f"\nno tables: {error}")
        results = None
    if results is not None and results.ops:
        records = tables.in_the_middle(results)
        write_atomically(output / "ops.svg", lambda path: report.plot(records, path, results.device))
    if results is not None and results.detections:
        write_atomically(output / "detection.svg", lambda path: tables.plot(results, path))
    if results is not None:
        print(f"\n{tables.tables([results])}")
    print(f"\n{summary(found, runner)}")
    states = [runner.state(part) for part in found]
    done = f"{states.count(DONE)} of {len(found)} parts are done, {states.count(LEFT_OUT)} left out"
    wrong = [part.name for part in found if part.group == "tests" and runner.state(part) == FAILED]
    print(f"\n{done}" + (f"; {', '.join(wrong)} failed: no number above counts until that is mended" if wrong else ""))


def summary(found: list[Part], runner: Runner) -> str:
    """What became of each part, in Markdown."""
    rows = []
    for part in found:
        ended = runner.ended.get(part.name, {"state": "to do", "seconds": 0.0, "says": part.missing or ""})
        rows.append([part.name, runner.state(part), f"{ended['seconds']:,.0f}", ended["says"]])
    return markdown(["part", "", "seconds", ""], rows)


if __name__ == "__main__":
    main()
