"""What README shows of results, made from their files.

    python -m benchmarks.tables                  # writes the tables of all results into README.md, between its marks
    python -m benchmarks.tables FOLDER ...       # prints those of some folders, as `python -m benchmarks` writes them

With --svg FILE the ways to detect are drawn, too, those of the last folder.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.collected import Results, collected
from benchmarks.measure import ROOT
from benchmarks.report import Record, cases, fastest, markdown, summary_table
from benchmarks.targets import TARGETS
from fastmrcnn.files import write_atomically

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- tables: begin (python -m benchmarks.tables) -->", "<!-- tables: end -->"
BASELINE = "torchvision"
STEP_BASELINES = ("torchvision AMP channels_last", "torchvision float32")


def tables(found: Sequence[Results]) -> str:
    """What is aimed at and what was reached, and then what each device has measured, in Markdown."""
    parts = [targets_table(found)]
    for results in found:
        of_device = [ops_table(results), *waterfalls(results), evaluation_table(results)]
        of_device += [steps_table(results), runs_table(results)]
        parts += [f"### {results.device}", *filter(None, of_device)]
    return "\n\n".join(parts)


def targets_table(found: Sequence[Results]) -> str:
    """Targets, and the measurements of all devices that have them."""
    rows = []
    for target in TARGETS:
        measured = [value for results in found if (value := target.measure(results)) is not None]
        verdict = "met" if all(value.met for value in measured) else "**missed**"
        said = "; ".join(value.says for value in measured)
        rows.append([target.what, target.against, target.aim, said or "not measured", verdict if measured else "open"])
    return markdown(["what", "against", "target", "measured", ""], rows)


def ops_table(results: Results) -> str:
    """One case of each operation."""
    records = in_the_middle(results)
    return summary_table(records) if records else ""


def in_the_middle(results: Results) -> list[Record]:
    """Of the cases of each operation that torchvision does, too, the records of the one in the middle by its time."""
    times: dict[str, list[tuple[float, str]]] = defaultdict(list)
    by_case = cases(results.ops)
    for (op, case), records in by_case.items():
        shipped = fastest(records, "shipped")
        if shipped is not None and fastest(records, "ours") is not None:
            times[op].append((shipped["p50_us"], case))
    middle = [(op, sorted(found)[len(found) // 2][1]) for op, found in times.items()]
    return [record for key in middle for record in by_case[key]]


def waterfalls(results: Results) -> Iterator[str]:
    """For each kind of masks a table of the ways to detect, a column for each number and size of images."""
    for masks in dict.fromkeys(case["masks"] for case in results.detections):
        found = {f"{c['batch']} x {c['size']}": c["contenders"] for c in results.detections if c["masks"] == masks}
        names = dict.fromkeys(name for contenders in found.values() for name in contenders)
        model = next(case["model"] for case in results.detections)
        header = [f"{model}, masks: {masks}; ms (times faster)", *found]
        yield markdown(header, [[name, *(detection_cell(c.get(name)) for c in found.values())] for name in names])


def detection_cell(found: dict[str, Any] | None) -> str:
    """Milliseconds of a way to detect, and how many times faster than torchvision as shipped it is."""
    if found is None or "p50_us" not in found:
        return "-" if found is None else "does not run"
    return f"{found['p50_us'] / 1e3:,.1f} ({found['speedup']['p50']:.2f}x)"


def evaluation_table(results: Results) -> str:
    """Seconds of an evaluation, without the network."""
    found = results.evaluation
    if found is None:
        return ""
    given, ratios = found["inputs"], {"torchvision": 1.0, "fastmrcnn": found["speedup"]["p50"]}
    size = f"{given['size'][0]}x{given['size'][1]}"
    title = f"evaluation of {given['images']} images of {size}, {given['detections']} detections each"
    rows = [[name, f"{found[name]['p50_us'] / 1e6:,.1f}", f"{ratio:.2f}x"] for name, ratio in ratios.items()]
    return markdown([title, "s", "times faster"], rows)


def steps_table(results: Results) -> str:
    """A step of training: images per second, times faster, and memory, a column for each number of images."""
    found = {f"{case['batch']} x {case['size'][0]}x{case['size'][1]}": case for case in results.steps}
    names = dict.fromkeys(name for case in found.values() for name in case["contenders"])
    rows = []
    for name in names:
        rows.append([name])
        for case in found.values():
            us = {n: c["stages"]["step"]["p50_us"] for n, c in case["contenders"].items() if "stages" in c}
            if name not in us:
                rows[-1].append("-" if name not in case["contenders"] else "learns something else")
                continue
            baseline = next(us[n] for n in STEP_BASELINES if n in us)
            memory = case["contenders"][name]["peak_memory"] / 2**30
            rows[-1].append(f"{1e6 * case['batch'] / us[name]:,.2f} ({baseline / us[name]:.2f}x), {memory:.2f} GiB")
    model = next((case["model"] for case in results.steps), "")
    return (
        markdown([f"training of {model}; images per second (times faster), peak memory", *found], rows) if rows else ""
    )


def runs_table(results: Results) -> str:
    """Whole runs: average precision at their ends, and images per second of training."""
    rows = []
    for precision, run in results.runs.items():
        for name, one in run["runs"].items():
            metrics = next((e["metrics"] for e in reversed(one["epochs"]) if "metrics" in e), {})
            precisions = [f"{metrics[kind]['AP']:.3f}" if kind in metrics else "-" for kind in ("bbox", "segm")]
            rate = 1 / run["seconds_per_image"][name]["p50"]
            ratio = run["seconds_per_image"]["speedup"]["p50"] if name == "fastmrcnn" else 1.0
            rows.append([f"{name} {precision}", *precisions, f"{rate:,.2f}", f"{ratio:.2f}x"])
    epochs = max((len(one["epochs"]) for run in results.runs.values() for one in run["runs"].values()), default=0)
    header = [f"training on nuclei, {epochs} epochs", "box AP", "mask AP", "images per second", "times faster"]
    return markdown(header, rows) if rows else ""


def plot(results: Results, path: Path) -> None:
    """The ways to detect, a bar of milliseconds for each, a panel for each case, as an SVG.

    Raises:
        ValueError: no detection was measured.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if not results.detections:
        raise ValueError("nothing to plot: no detection was measured")
    with mpl.rc_context({"svg.hashsalt": "fastmrcnn", "svg.fonttype": "none"}):
        count = len(results.detections)
        figure = Figure(figsize=(9, 0.6 + 2.4 * count), layout="constrained")
        for axes, case in zip(figure.subplots(count, 1, squeeze=False)[:, 0], results.detections, strict=True):
            ran = {name: found for name, found in case["contenders"].items() if "p50_us" in found}
            colors = ["#08519c" if name.startswith("fastmrcnn") else "#e6550d" for name in ran]
            bars = axes.barh(list(ran), [found["p50_us"] / 1e3 for found in ran.values()], color=colors)
            axes.bar_label(bars, [detection_cell(found) for found in ran.values()], padding=3, fontsize=8)
            axes.invert_yaxis()
            axes.margins(x=0.2)
            axes.tick_params(labelsize=8)
            axes.set_title(f"{case['model']}, {case['batch']} x {case['size']}, masks: {case['masks']}", fontsize=9)
            axes.set_xlabel("ms", fontsize=8)
        figure.suptitle(results.device, fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def replaced(text: str, new: str) -> str:
    """`text` with `new` between its marks.

    Raises:
        ValueError: the marks are not there, once each and in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    return f"{before}{begin}\n{new}\n{end}{after}"


def committed() -> list[Results]:
    """The results of all devices in `RESULTS`, GPUs first."""
    found = [collected(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    return sorted(filter(None, found), key=lambda results: not results.on_gpu)


def main() -> None:
    """See the text of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="*", help="of results, to print; all, into README.md, if none is given"
    )
    parser.add_argument("--svg", type=Path, help="file for a plot of the ways to detect")
    options = parser.parse_args()
    try:
        found = [results for folder in options.folders if (results := collected(folder))] or committed()
    except ValueError as error:
        parser.error(str(error))
    if options.folders:
        print(tables(found))
    else:
        text = replaced(README.read_text(encoding="utf-8"), tables(found))
        write_atomically(README, lambda path: path.write_text(text, encoding="utf-8"))
    if options.svg:
        write_atomically(options.svg, lambda path: plot(found[-1], path))


if __name__ == "__main__":
    main()
