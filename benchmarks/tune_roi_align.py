"""The block sizes of the RoIAlign kernels, side by side: what each compiles to, what it moves, and how long it takes.

    python -m benchmarks.tune_roi_align [--quick] [--json out.json]

Without a GPU there are no times.  Bytes: `least` is what must pass between kernel and memory, every cell and bin once;
`read` is what the programs ask for, from whatever cache it comes.  For the forward pass "each cell of a RoI once" is
what a separable form would read at best.  Times are those of `benchmarks/measure.py`; a variant whose result differs
from torchvision's has none.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import compile_report, measure
from benchmarks.inputs import (
    CHANNELS,
    SCALES,
    SMALL,
    Pooling,
    bins_of_tiles,
    cells_of_rois,
    cells_read,
    pyramid,
    random_rois,
)
from benchmarks.report import markdown
from fastmrcnn.files import write_json
from fastmrcnn_kernels import torchvision_ops
from fastmrcnn_kernels.reference.roi_align import assign_levels
from fastmrcnn_kernels.sampler import Sampler
from fastmrcnn_kernels.triton import roi_align, roi_align_backward
from tests.tolerances import assert_within_budget

SAMPLER = Sampler(sampling_ratio=2, aligned=False)
BOUNDS = (112.0, 224.0, 448.0)


class Variant(NamedTuple):
    """Constants of a kernel's module in place of its own; LINE is the bytes of a block of channels."""

    module: ModuleType
    constants: dict[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.constants.items())

    def applied(self) -> ExitStack:
        """Context in which launches use them."""
        stack = ExitStack()
        for name, value in self.constants.items():
            stack.enter_context(mock.patch.object(self.module, name, value))
        return stack


FORWARD = [
    Variant(roi_align, {"BLOCK_BINS": bins, "LINE": line, "WARPS": warps})
    for bins, line, warps in (
        (32, 128, 4),
        (16, 128, 2),
        (16, 128, 4),
        (32, 128, 8),
        (64, 128, 4),
        (64, 128, 8),
        (16, 256, 4),
        (32, 256, 8),
        (8, 512, 4),
        (16, 512, 8),
    )
]
BACKWARD = [
    Variant(roi_align_backward, {"TILE": tile, "BLOCK_BINS": bins, "LINE": line, "WARPS": warps})
    for tile, bins, line, warps in (
        (8, 16, 128, 8),
        (8, 16, 128, 4),
        (8, 32, 128, 4),
        (8, 32, 128, 8),
        (8, 16, 256, 8),
        (8, 16, 256, 16),
        (4, 16, 128, 4),
        (4, 16, 256, 4),
        (16, 16, 128, 8),
    )
]
CASES = {
    "forward": [Pooling(1, 1000, 7), Pooling(1, 100, 14)],
    "backward": [Pooling(2, 512, 7), Pooling(2, 128, 14)],
}


class Problem:
    """One direction, size and dtype."""

    def __init__(self, direction: str, case: Pooling, dtype: torch.dtype) -> None:
        self.direction, self.case, self.dtype = direction, case, dtype
        self.maps, self.rois = pyramid(case, dtype), random_rois(case)
        shape = (len(self.rois), CHANNELS, case.bins, case.bins)
        generator = torch.Generator(measure.device_name()).manual_seed(1)
        pooled = torch.randn(shape, generator=generator, device=measure.device_name()).to(dtype)
        self.pooled = pooled.contiguous(memory_format=torch.channels_last)

    def __str__(self) -> str:
        return f"{self.direction}, {self.case}, {str(self.dtype).removeprefix('torch.')}"

    def launch(self) -> list[Tensor]:
        """The kernels' result, by the launchers alone."""
        return launch(self.direction, self.maps, self.rois, self.pooled, self.case.bins)

    def assert_equal_to_torchvision(self, found: list[Tensor]) -> None:
        """AssertionError where they differ by more than rounding."""
        expected, exact = self._by_torchvision(torch.float32), self._by_torchvision(torch.float64)
        for one, other, oracle in zip(found, expected, exact, strict=True):
            assert_within_budget(one, other.to(one.dtype), oracle)

    def _by_torchvision(self, dtype: torch.dtype) -> list[Tensor]:
        maps = [x.detach().to(dtype).requires_grad_() for x in self.maps]
        levels = assign_levels(self.rois[:, 1:], len(maps), 2, 224, 4)
        size = (self.case.bins, self.case.bins)
        pooled = torchvision_ops.multilevel_roi_align(maps, self.rois.to(dtype), levels, size, SCALES, 2, False)
        if self.direction == "forward":
            return [pooled.detach()]
        return list(torch.autograd.grad(pooled, maps, self.pooled.to(dtype)))

    def bytes_moved(self, variant: Variant) -> dict[str, int]:
        """At least, and as this variant asks for them."""
        cell, bins = CHANNELS * self.dtype.itemsize, len(self.rois) * self.case.bins**2
        if self.direction == "forward":
            least = (cells_read(self.maps, self.rois, self.case.bins) + bins) * cell
            once = cells_of_rois(self.maps, self.rois, self.case.bins) * cell
            return {"least": least, "read": bins * 2 * 2 * 4 * cell, "each cell of a RoI once": once}
        least = (sum(x[:, 0].numel() for x in self.maps) + bins) * cell
        read = bins_of_tiles(self.maps, self.rois, self.case.bins, variant.constants["TILE"])
        return {"least": least, "read": read * cell}


def launch(direction: str, maps: list[Tensor], rois: Tensor, pooled: Tensor, bins: int) -> list[Tensor]:
    """Run one pass with two samples per bin and axis."""
    if direction == "forward":
        return [roi_align.roi_align_forward(maps, rois, None, (bins, bins), SCALES, SAMPLER, BOUNDS)]
    heights, widths = zip(*(x.shape[2:] for x in maps), strict=True)
    return roi_align_backward.roi_align_backward(
        pooled, rois, None, len(maps[0]), heights, widths, SCALES, SAMPLER, BOUNDS
    )


def examined(problem: Problem, variant: Variant, target: str) -> dict[str, Any]:
    """What the main kernel of a variant compiles to: the last one launched."""

    def on_fake_tensors() -> None:
        maps = [torch.empty(x.shape, dtype=x.dtype) for x in problem.maps]
        rois, pooled = (torch.empty(x.shape, dtype=x.dtype) for x in (problem.rois, problem.pooled))
        launch(problem.direction, maps, rois, pooled, problem.case.bins)

    return asdict(compile_report.examine(compile_report.record(on_fake_tensors)[-1], str(variant), target))


def tried(problem: Problem, variant: Variant, target: str) -> dict[str, Any]:
    """All that is known of a variant."""
    row = {"problem": str(problem), "variant": str(variant), **problem.bytes_moved(variant)}
    with variant.applied():
        row["compiled"] = examined(problem, variant, target)
        if torch.cuda.is_available() and not row["compiled"]["problem"]:
            try:
                problem.assert_equal_to_torchvision(problem.launch())
            except AssertionError as error:
                row["compiled"]["problem"] = str(error)
            else:
                row.update(measure.percentiles(measure.times(problem.launch)))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """One line per variant, fastest first where there are times."""
    header = ["variant", "p50, us", "of copy", "least, MB", "read, MB", "regs", "spill", "blocks/SM", "problem"]
    lines = []
    for row in sorted(rows, key=lambda r: r.get("p50_us", 0)):
        took = row.get("p50_us")
        bandwidth = f"{row['least'] / took * 1e6 / measure.copy_bandwidth():.0%}" if took else "-"
        compiled = row["compiled"]
        found = [str(compiled[key]) for key in ("registers", "spilled", "blocks", "problem")]
        moved = [f"{row[key] / 1e6:.1f}" for key in ("least", "read")]
        lines.append([row["variant"], f"{took:.1f}" if took else "-", bandwidth, *moved, *found])
    return markdown(header, lines)


def main() -> None:
    """See the text of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=here(), choices=compile_report.TARGETS, help="compiled for")
    parser.add_argument("--quick", action="store_true", help="two variants of each, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    results, dtypes = [], (torch.float32,) if options.quick else (torch.bfloat16, torch.float32)
    for direction, variants in (("forward", FORWARD), ("backward", BACKWARD)):
        for case in [Pooling(1, 20, 7, SMALL)] if options.quick else CASES[direction]:
            for dtype in dtypes:
                problem = Problem(direction, case, dtype)
                rows = [
                    tried(problem, v, options.target)
                    for v in tqdm(variants[: 2 if options.quick else None], str(problem), leave=False, disable=None)
                ]
                results += rows
                print(f"{problem}, on {options.target}", table(rows), sep="\n\n", end="\n\n", flush=True)
                if direction == "forward":
                    once = rows[0]["each cell of a RoI once"] / 1e6
                    print(f"A form that reads each cell of a RoI once would read {once:.1f} MB.\n")
    if options.json:
        bandwidth = round(measure.copy_bandwidth())
        write_json(options.json, {"conditions": measure.conditions() | {"copy_bandwidth": bandwidth}, "rows": results})


def here() -> str:
    """The target that is nearest to the GPU of this machine; sm_90 without one."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    capability = 10 * torch.cuda.get_device_capability()[0]
    return f"sm_{capability}" if f"sm_{capability}" in compile_report.TARGETS else "sm_80"


if __name__ == "__main__":
    main()
