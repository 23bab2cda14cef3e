"""Precision-recall curves as a picture."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastmrcnn.coco_metrics import CocoMetrics
from fastmrcnn.coco_records import IouType
from fastmrcnn.files import write_atomically

__all__ = ["check_plot", "plot_precision_recall"]

_TITLES: dict[IouType, str] = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}
_RECALLS = np.linspace(0, 1, 101)
# One per class, none like the blue of the means. More lines than these could not be told apart.
_CLASS_COLORS = ("#e6550d", "#31a354", "#9467bd", "#7f7f7f", "#e377c2", "#bcbd22", "#8c564b", "#d62728")
_LONGEST_NAME = 36


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a plot cannot be written: neither .png nor .svg, or matplotlib is missing."""
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"a plot is a .png or an .svg file, got {os.fspath(path)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('a plot needs the package matplotlib: pip install "fastmrcnn[plot]"')


def plot_precision_recall(metrics: Mapping[IouType, CocoMetrics], path: str | os.PathLike[str]) -> Path:
    """Draw interpolated precision over recall, a panel per IoU type.

    The mean over the classes that have objects at IoU 0.50, at 0.75 and averaged over 0.50:0.95; and of up to eight
    classes also the last of each class, as thin lines. The legend gives the areas below, which are the AP.

    Args:
        metrics: what an evaluation returned.
        path: a .png or .svg file; missing parent folders are made. The same metrics give the same SVG.

    Returns:
        ``path``.

    Raises:
        ValueError: another suffix, matplotlib is not installed, or there is nothing to draw.
    """
    check_plot(path)
    if not metrics or any(numbers.precision is None for numbers in metrics.values()):
        raise ValueError("nothing to plot: metrics with their precision are needed, such as evaluate returns")
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "svg.hashsalt": "fastmrcnn",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.edgecolor": "#888888",
    }
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    with mpl.rc_context(style):
        rows = max(3 + len(_thin_lines(numbers)) for numbers in metrics.values())
        figure = Figure(figsize=(4.4 * len(metrics), 4.3 + 0.2 * rows), layout=layout)
        panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for panel, (iou_type, numbers) in zip(panels, metrics.items(), strict=True):
            _draw(panel, numbers)
            panel.set_title(f"{_TITLES[iou_type]} ({iou_type})", fontsize=11)
        panels[0].set_ylabel("precision")

        def save(temporary: Path) -> None:
            metadata = {"Date": None} if temporary.suffix.lower() == ".svg" else {}
            figure.savefig(temporary, dpi=150, metadata=metadata)

        return write_atomically(path, save)


def _draw(axes: Any, numbers: CocoMetrics) -> None:
    precision = numbers.precision
    assert precision is not None
    measured = precision[..., precision[0, 0] > -1]
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not measured.size:
        axes.text(0.5, 0.5, "no ground truth", ha="center", color="#7f7f7f")
        return
    # Drawn in the order of the legend, yet the first on top.
    for thresholds, iou, color, ap, layer in (
        (slice(None), "0.50:0.95", "#08306b", numbers.ap, 5),
        (slice(5, 6), "0.75", "#4292c6", numbers.ap75, 4),
        (slice(0, 1), "0.50", "#9ecae1", numbers.ap50, 3),
    ):
        mean = measured[thresholds].mean((0, 2))
        axes.plot(_RECALLS, mean, color=color, lw=2.2, zorder=layer, label=f"{ap:.3f}  IoU {iou}")
    for color, (k, name) in zip(_CLASS_COLORS, _thin_lines(numbers).items(), strict=False):
        short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        label = f"{numbers.classes[name].ap:.3f}  {short}"
        axes.plot(_RECALLS, precision[:, :, k].mean(0), color=color, lw=1.1, zorder=2.5, label=label)
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.13)}
    legend = axes.legend(title="AP", alignment="left", frameon=False, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a class may be called $


def _thin_lines(numbers: CocoMetrics) -> dict[int, str]:
    """Position and name of the classes to draw; one alone is its own mean."""
    classes = {k: name for k, (name, of_class) in enumerate(numbers.classes.items()) if of_class.ap > -1}
    return classes if 1 < len(classes) <= len(_CLASS_COLORS) else {}
