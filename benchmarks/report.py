"""Tables and a plot of benchmark results, as `pytest benchmarks --benchmark-json=FILE` writes them.

python -m benchmarks.report result.json                     # Markdown: ours beside torchvision
python -m benchmarks.report result.json --all               # every contender
python -m benchmarks.report result.json --svg speedup.svg   # and a plot
python -m benchmarks.report before.json after.json          # two results side by side
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def load(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Conditions and records of a result file; ValueError if it is none."""
    try:
        result = json.loads(path.read_text())
        commit = result["commit_info"]["id"][:9] + (" with changes" if result["commit_info"]["dirty"] else "")
        return result["machine_info"] | {"commit": commit}, [entry["extra_info"] for entry in result["benchmarks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of `pytest benchmarks --benchmark-json=...` ({error!r})") from error


def cases(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records by operation and case, in order of appearance."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["op"], record["case"]), []).append(record)
    return groups


def fastest(records: Iterable[Record], *roles: str) -> Record | None:
    """The record of least median time among those of `roles`, if there is one."""
    return min((r for r in records if r["role"] in roles), key=lambda r: r["p50_us"], default=None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, readable as it is: first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def microseconds(record: Record | None) -> str:
    """Median time, and who needs it."""
    return "-" if record is None else f"{record['p50_us']:,.1f} ({record['contender']})"


def times_faster(slow: Record | None, fast: Record | None) -> str:
    """Ratio of the medians."""
    return "-" if slow is None or fast is None else f"{slow['p50_us'] / fast['p50_us']:.2f}x"


def share(record: Record) -> str:
    """Of the bandwidth of a copy, what the least possible traffic of an operation makes."""
    found = record.get("share_of_copy_bandwidth")
    return "-" if found is None else f"{found:.0%}"


def summary_table(records: Sequence[Record]) -> str:
    """One line per case: our fastest against torchvision as shipped and at its best."""
    header = [
        "case",
        "ours, us",
        "torchvision as shipped, us",
        "at its best, us",
        "speed-up",
        "of the best",
        "bandwidth",
    ]
    rows = []
    for (op, case), found in cases(records).items():
        ours, shipped, best = fastest(found, "ours"), fastest(found, "shipped"), fastest(found, "shipped", "tuned")
        if ours is not None:
            ratios = [times_faster(shipped, ours), times_faster(best, ours), share(ours)]
            rows.append([f"{op}, {case}", *map(microseconds, (ours, shipped, best)), *ratios])
    return markdown(header, rows)


def contenders_table(records: Sequence[Record]) -> str:
    """One line per contender; "as shipped" tells how many times faster than torchvision as shipped it is.

    The floor is what a copy of the least bytes takes that have to be read and written.
    """
    header = ["", "p20, us", "p50, us", "p80, us", "host, us", "least, MB", "floor, us", "bandwidth", "as shipped"]
    rows = []
    for (op, case), found in cases(records).items():
        rows.append([f"{op}, {case}", *[""] * 8])
        for record in sorted(found, key=lambda r: r["p50_us"]):
            times = [
                f"{record[key]:,.1f}" if key in record else "-" for key in ("p20_us", "p50_us", "p80_us", "host_us")
            ]
            ratio = times_faster(fastest(found, "shipped"), record)
            floor = ["-", "-"]
            if "least_bytes" in record:
                microseconds_at_least = record["share_of_copy_bandwidth"] * record["p50_us"]
                floor = [f"{record['least_bytes'] / 1e6:,.2f}", f"{microseconds_at_least:,.1f}"]
            rows.append([f"  {record['contender']}", *times, *floor, share(record), ratio])
    return markdown(header, rows)


def comparison_table(before: Sequence[Record], after: Sequence[Record]) -> str:
    """Medians of two results side by side, for contenders that either has, and how many times faster the second is."""

    def keyed(records: Iterable[Record]) -> dict[tuple[str, str, str], Record]:
        return {(r["op"], r["case"], r["contender"]): r for r in records}

    first, second = keyed(before), keyed(after)
    rows = []
    for key in first | second:
        pair = first.get(key), second.get(key)
        medians = ["-" if record is None else f"{record['p50_us']:,.1f}" for record in pair]
        rows.append([", ".join(key), *medians, times_faster(*pair)])
    return markdown(["", "first, us", "second, us", "speed-up"], rows)


def described(conditions: dict[str, Any]) -> str:
    """The conditions of a result in one line."""
    versions = [f"{name} {conditions[name]}" for name in ("torch", "torchvision", "triton") if conditions.get(name)]
    bandwidth = f"copy {conditions['copy_bandwidth'] / 1e9:,.0f} GB/s"
    return ", ".join([conditions["device"], bandwidth, *versions, conditions["commit"], conditions["date"]])


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Bars of how many times faster we are than torchvision as shipped and at its best, as an SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    bars = []
    for (op, case), found in cases(records).items():
        ours, shipped, best = fastest(found, "ours"), fastest(found, "shipped"), fastest(found, "shipped", "tuned")
        if ours and shipped and best:
            ratios = (shipped["p50_us"] / ours["p50_us"], best["p50_us"] / ours["p50_us"])
            bars.append((f"{op}, {case}", ratios))
    if not bars:
        raise ValueError("nothing to plot: no case has both ours and torchvision's time")
    with pyplot.rc_context({"svg.hashsalt": "fastmrcnn", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(bars)), layout="constrained")
        for i, (name, color) in enumerate((("as shipped", "#9ecae1"), ("at its best", "#08519c"))):
            positions = [row + 0.4 * i for row in range(len(bars))]
            drawn = axes.barh(positions, [ratios[i] for _, ratios in bars], 0.4, color=color, label=name)
            axes.bar_label(drawn, fmt="%.1fx", padding=3, fontsize=8)
        axes.set_yticks([row + 0.2 for row in range(len(bars))], [name for name, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12, y=0.01)
        axes.set_xlabel("times faster than torchvision")
        figure.suptitle(title, fontsize=7)
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """See the text of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="one result, or two to compare")
    parser.add_argument("--all", action="store_true", help="every contender")
    parser.add_argument("--svg", type=Path, help="file for a plot of the last result")
    options = parser.parse_args()
    if len(options.results) > 2:
        parser.error("expected one result or two")
    try:
        loaded = [load(path) for path in options.results]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for conditions, _ in loaded:
        print(described(conditions), end="\n\n")
    conditions, records = loaded[-1]
    if len(loaded) == 2:
        print(comparison_table(loaded[0][1], records))
    else:
        print((contenders_table if options.all else summary_table)(records))
    if options.svg:
        plot(records, options.svg, described(conditions))


if __name__ == "__main__":
    main()
