"""Compile every kernel ahead of time for the GPUs we care about, without one, and report what became of it.

    python benchmarks/compile_report.py [--targets sm_90,gfx942] [--only roi_align] [--json out.json]

Each case calls a launcher on fake tensors and records the launches, so what is compiled is exactly what would run.  The
table gives registers per thread, spilled bytes per thread (stack), shared memory, the widest global load and store that
the assembly holds, and how many blocks fit on one multiprocessor.  Exit status 1 if anything fails to compile, spills,
or reads 16-bit features of C a multiple of 8 by less than 128 bits at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from fastmrcnn_kernels.sampler import Sampler
from fastmrcnn_kernels.triton.box_coding import decode_boxes, decode_proposals, encode_boxes
from fastmrcnn_kernels.triton.canvases import clear_beyond_
from fastmrcnn_kernels.triton.detections import select_detections
from fastmrcnn_kernels.triton.images import resize_images
from fastmrcnn_kernels.triton.mask_iou import mask_iou
from fastmrcnn_kernels.triton.mask_targets import mask_targets
from fastmrcnn_kernels.triton.matching import match_boxes
from fastmrcnn_kernels.triton.merge import merge_levels
from fastmrcnn_kernels.triton.nms import sorted_nms
from fastmrcnn_kernels.triton.paste import paste_masks
from fastmrcnn_kernels.triton.rle import encode_bool, encode_masks
from fastmrcnn_kernels.triton.roi_align import roi_align_forward
from fastmrcnn_kernels.triton.roi_align_backward import roi_align_backward
from fastmrcnn_kernels.triton.roi_pool import roi_pool_backward, roi_pool_forward
from fastmrcnn_kernels.triton.soft_nms import padded_soft_nms
from fastmrcnn_kernels.triton.topk import topk_anchors

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS_PER_SM, THREADS_PER_SM, BLOCKS_PER_SM = 65536, 2048, 32
SHARED_PER_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}


SHAPES = [(200, 334), (100, 167), (50, 84), (25, 42)]
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
BOUNDS = (112.0, 224.0, 448.0)


def roi_align(
    dtype: torch.dtype,
    bins: int,
    *,
    channels: int = 256,
    ratio: int = 2,
    bicubic: bool = False,
    corner: bool = False,
) -> None:
    """Forward and backward on the pyramid of an 800 x 1333 image."""
    features = [torch.empty(2, channels, *shape, dtype=dtype) for shape in SHAPES]
    rois = torch.empty(100, 5)
    semantics = (SCALES, Sampler(ratio, False, bicubic, corner), BOUNDS)
    pooled = roi_align_forward(features, rois, None, (bins, bins), *semantics)
    heights, widths = zip(*SHAPES, strict=True)
    roi_align_backward(pooled, rois, None, 2, heights, widths, *semantics)


def canvases(dtype: torch.dtype) -> None:
    """Of two images, in maps and in a slice of them; and pooling of what belongs to each."""
    size = torch.ones(2, 2, dtype=torch.int64)
    maps = torch.empty(2, 256, 200, 336, dtype=dtype).contiguous(memory_format=torch.channels_last)
    clear_beyond_(maps, size, 4, 0.0)
    clear_beyond_(maps[:, :3], size, 4, -torch.inf)
    features, semantics = (
        [torch.empty(2, 256, *shape, dtype=dtype) for shape in SHAPES],
        Sampler(2, False, False, False),
    )
    extents = torch.ones(2, 4, 2, dtype=torch.int64)
    roi_align_forward(features, torch.empty(100, 5), None, (7, 7), SCALES, semantics, BOUNDS, extents)


def roi_pool(dtype: torch.dtype) -> None:
    """Forward and backward on the coarsest map of a backbone without a pyramid."""
    features, rois = torch.empty(2, 256, 50, 84, dtype=dtype), torch.empty(100, 5)
    pooled, position = roi_pool_forward(features, rois, (7, 7), 1 / 16)
    roi_pool_backward(pooled, position, rois, 2, 50, 84, 1 / 16)


def nms(segments: int, num_boxes: int, max_keep: int, *, grouped: bool = False) -> None:
    """Sorted segments, as the region proposal network has them, or one flat segment of several groups."""
    boxes, alive = torch.empty(segments, num_boxes, 4), torch.ones(segments, num_boxes, dtype=torch.bool)
    index = torch.empty(segments, num_boxes, dtype=torch.int64) if grouped else None
    sorted_nms(boxes, alive, index, index, 0.7, max_keep)


def proposals(dtype: torch.dtype) -> None:
    """Top-k and decoding of the five levels of an 800 x 1344 canvas, and their merging."""
    shapes = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
    logits, deltas = ([torch.empty(1, a, *shape, dtype=dtype) for shape in shapes] for a in (3, 12))
    scores, indices = topk_anchors(logits, 1000)
    base, strides = [torch.empty(3, 4)] * 5, [4, 8, 16, 32, 64]
    size = torch.ones(1, 2, dtype=torch.int64)
    boxes, _ = decode_proposals(
        deltas, indices, scores, base, strides, strides, None, size, 1e-3, 0.0, (1.0, 1.0, 1.0, 1.0)
    )
    merge_levels(boxes, scores, indices, torch.empty(1, 5, dtype=torch.int64), 1000)


def box_coding(dtype: torch.dtype) -> None:
    """Deltas of 1,000 proposals and 91 classes to boxes, and boxes to deltas."""
    boxes, weights = torch.empty(2, 1000, 4), (10.0, 10.0, 5.0, 5.0)
    decode_boxes(torch.empty(2, 1000, 91, 4, dtype=dtype), boxes, weights)
    encode_boxes(boxes, boxes, weights)


def matching(num_boxes: int, *, shared: bool) -> None:
    """Of two images with 20 objects each; of boxes that are shared, as anchors are, all that are best for some."""
    boxes, count = torch.empty(1 if shared else 2, num_boxes, 4), torch.ones(2, dtype=torch.int64)
    match_boxes(boxes, torch.empty(2, 20, 4), count, 0.7, 0.3, shared)


def soft_nms(segments: int, num_boxes: int, *, gaussian: bool, grouped: bool = False) -> None:
    """The 100 best boxes of each segment."""
    boxes, scores = torch.empty(segments, num_boxes, 4), torch.empty(segments, num_boxes)
    groups = torch.empty(segments, num_boxes, dtype=torch.int64) if grouped else None
    valid = torch.ones(segments, num_boxes, dtype=torch.bool)
    padded_soft_nms(boxes, scores, valid, groups, gaussian, 0.5, 0.5, 1e-3, 100)


def detections(dtype: torch.dtype, num_classes: int) -> None:
    """Of 1000 proposals."""
    logits, deltas = (torch.empty(1, 1000, num_classes, *shape, dtype=dtype) for shape in ((), (4,)))
    rest = (torch.empty(1, 1000, 4), torch.ones(1, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    select_detections(logits, deltas, *rest, 0.05, 0.5, 100, 0.01, (10.0, 10.0, 5.0, 5.0), False)


def paste(out: str, *, detectron2: bool) -> None:
    """100 masks on a canvas of 800 x 1333."""
    masks, boxes, sizes = torch.empty(1, 100, 28, 28), torch.empty(1, 100, 4), torch.ones(1, 2, dtype=torch.int64)
    paste_masks(masks, boxes, 800, 1333, sizes, torch.ones(1, dtype=torch.int64), detectron2, 1, 0.5, out)


def rle(*, detectron2: bool) -> None:
    """100 masks in an image of 800 x 1333."""
    masks, boxes, sizes = torch.empty(1, 100, 28, 28), torch.empty(1, 100, 4), torch.ones(1, 2, dtype=torch.int64)
    encode_masks(masks, boxes, sizes, torch.ones(1, dtype=torch.int64), 800, 1333, 160_000, detectron2, 1, 0.5)


def overlaps(*, crowds: bool) -> None:
    """Of 100 x 100 packed masks of an 800 x 1333 image."""
    bits = torch.empty(100, 800, 42, dtype=torch.int32)
    mask_iou(bits, bits, torch.empty(100, dtype=torch.bool) if crowds else None)


def targets(size: int) -> None:
    """Of 128 boxes in each of two images."""
    words, index = torch.empty(1 << 20, dtype=torch.int32), torch.empty(2, 128, dtype=torch.int64)
    mask_targets(words, index[:, 0], index[:, :8], torch.empty(2, 128, 4), index, index > 0, size)


def images(dtype: torch.dtype, channels: int) -> None:
    """Eight images on canvases of 800 x 1344."""
    numbers = [1.0] * channels
    views = torch.empty(8, 8, dtype=torch.int64)
    resize_images(torch.empty(1 << 20, dtype=torch.uint8), views[:, 0], views, 800, 1344, numbers, numbers, dtype)


def _cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = f"roi_align {str(dtype).removeprefix('torch.')}"
        for bins in (7, 14):
            cases[f"{name} {bins}x{bins}"] = lambda d=dtype, b=bins: roi_align(d, b)
        cases[f"{name} 7x7 adaptive"] = lambda d=dtype: roi_align(d, 7, ratio=0)
        cases[f"{name} 7x7 bicubic"] = lambda d=dtype: roi_align(d, 7, bicubic=True)
        cases[f"{name} 7x7 corner"] = lambda d=dtype: roi_align(d, 7, corner=True)
        cases[f"{name} 7x7 C=100"] = lambda d=dtype: roi_align(d, 7, channels=100)
        cases[f"{name.replace('align', 'pool')} 7x7"] = lambda d=dtype: roi_pool(d)
    cases["nms 5 x 1000"] = lambda: nms(5, 1000, 1000)
    cases["nms 10 x 2000"] = lambda: nms(10, 2000, 2000)
    cases["nms 5000 in groups"] = lambda: nms(1, 5_000, 5_000, grouped=True)
    cases["nms 100 of 10000 in groups"] = lambda: nms(1, 10_000, 100, grouped=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        cases[f"proposals {name}"] = lambda d=dtype: proposals(d)
        cases[f"detections {name} 91 classes"] = lambda d=dtype: detections(d, 91)
        cases[f"box coding {name}"] = lambda d=dtype: box_coding(d)
        cases[f"resize_images {name}"] = lambda d=dtype: images(d, 3)
        cases[f"canvases {name}"] = lambda d=dtype: canvases(d)
    for name, gaussian in (("linear", False), ("gaussian", True)):
        cases[f"soft_nms {name} 2 x 1000"] = lambda g=gaussian: soft_nms(2, 1000, gaussian=g)
        cases[f"soft_nms {name} 2 x 10000 in groups"] = lambda g=gaussian: soft_nms(2, 10_000, gaussian=g, grouped=True)
    for semantics in ("torchvision", "detectron2"):
        for out in ("soft", "bool", "bits"):
            cases[f"paste {out} {semantics}"] = lambda o=out, s=semantics: paste(o, detectron2=s == "detectron2")
        cases[f"rle {semantics}"] = lambda s=semantics: rle(detectron2=s == "detectron2")
    cases["resize_images bfloat16 C=16"] = lambda: images(torch.bfloat16, 16)
    cases["match_boxes 268569"] = lambda: matching(268_569, shared=True)
    cases["match_boxes 2000"] = lambda: matching(2000, shared=False)
    for size in (14, 28, 56):
        cases[f"mask_targets {size}x{size}"] = lambda s=size: targets(s)
    cases["mask_iou"] = lambda: overlaps(crowds=False)
    cases["mask_iou with crowds"] = lambda: overlaps(crowds=True)
    cases["rle of images"] = lambda: encode_bool(torch.empty(100, 800, 1333, dtype=torch.bool), 160_000)
    cases["detections bfloat16 1204 classes"] = lambda: detections(torch.bfloat16, 1204)
    return cases


CASES = _cases()


@dataclass(frozen=True)
class Report:
    """One kernel of one case on one target."""

    case: str
    kernel: str
    target: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    load_bits: int = 0
    store_bits: int = 0
    blocks: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Launch:
    """What a launcher asked for: a kernel and its arguments, tensors replaced by their dtypes."""

    kernel: jit.JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, which runs on fake CUDA tensors."""
    launches = []

    def run(kernel: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, tuple(map(without_data, args)), kwargs))

    original, jit.JITFunction.run = jit.JITFunction.run, run
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            call()
    finally:
        jit.JITFunction.run = original
    return launches


def without_data(value: Any) -> Any:
    """An argument as the compiler sees it: a tensor is its dtype and an aligned address."""
    if isinstance(value, tuple):
        return tuple(map(without_data, value))
    return jit.MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel of `launch`, compiled for `target` with the specialisation that a real launch would have."""
    kernel, backend = launch.kernel, make_backend(target)
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **launch.kwargs}
    bound, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def report(case: str, target: str) -> list[Report]:
    """All kernels of a case on one target."""
    return [examine(launch, case, target) for launch in record(CASES[case])]


def examine(launch: Launch, case: str, target: str) -> Report:
    """What became of one kernel."""
    name = launch.kernel.__name__
    try:
        binary = compiled(launch, TARGETS[target])
    except Exception as error:  # whatever the compiler raises is a row of the table, and exit status 1
        return Report(case, name, target, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    found = measure_amd(binary) if target.startswith("gfx") else measure_nvidia(binary)
    threads = binary.metadata.num_warps * (64 if target.startswith("gfx") else 32)
    shared = binary.metadata.shared
    limits = [BLOCKS_PER_SM, THREADS_PER_SM // threads, SHARED_PER_SM[target] // max(shared + 1024, 1)]
    registers_per_sm = REGISTERS_PER_SM * (2 if target.startswith("gfx") else 1)
    limits.append(registers_per_sm // (-(-max(found["registers"], 1) // 8) * 8 * threads))
    problems = [f"spills {found['spilled']} bytes"] if found["spilled"] else []
    if "_fwd_" in name and "float16" in case and "C=" not in case and found["load_bits"] < 128:
        problems.append(f"reads features by {found['load_bits']} bits")
    return Report(case, name, target, shared=shared, blocks=min(limits), problem=", ".join(problems), **found)


def measure_nvidia(binary: Any) -> dict[str, int]:
    """Resources and widths of memory accesses, from the binary and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = tool("nvdisasm", file.name)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "load_bits": widest(re.findall(r"\bLDG(?:STS)?\.E([.\w]*)", assembly)),
        "store_bits": widest(re.findall(r"\bSTG\.E([.\w]*)", assembly)),
    }


def widest(suffixes: list[str]) -> int:
    """Bits of the widest access, by the suffixes of its instruction: .128, .64, .U16, .U8; none is 32."""
    sizes = [int((re.findall(r"\.(?:BYPASS\.)?[US]?(128|64|16|8)\b", suffix) or ["32"])[0]) for suffix in suffixes]
    return max(sizes, default=0)


def measure_amd(binary: Any) -> dict[str, int]:
    """The same, from AMD's assembly listing."""
    assembly = binary.asm["amdgcn"]
    widths = {"load": 0, "store": 0}
    for kind, size in re.findall(
        r"\b(?:global|buffer)_(load|store)_(dwordx\d|dword|b\d+|[us]?short|[us]?byte)", assembly
    ):
        bits = 32 * int(size[6:] or 1) if size.startswith("dword") else 16 if "short" in size else 8
        widths[kind] = max(widths[kind], bits)
    return {
        "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[-1]),
        "spilled": int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[-1]),
        "load_bits": widths["load"],
        "store_bits": widths["store"],
    }


def tool(name: str, *arguments: str) -> str:
    """Output of one of the binary utilities that come with Triton."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def reports(cases: list[str], targets: list[str]) -> Iterator[Report]:
    """All of them, in processes side by side, as they come."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(report, [c for c in cases for _ in targets], targets * len(cases)):
            yield from found


def main() -> None:
    """Print the table; see the text of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated: " + ", ".join(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    cases = [name for name in CASES if arguments.only in name]
    if not cases:
        parser.error(f"--only {arguments.only}: no case has that in its name, such as {next(iter(CASES))}")
    rows = []
    print(f"{'case':44} {'kernel':24} {'target':7} {'regs':>4} {'spill':>5} {'shared':>6} load store blocks/SM")
    for row in reports(cases, arguments.targets.split(",")):
        rows.append(row)
        print(
            f"{row.case:44} {row.kernel:24} {row.target:7} {row.registers:4} {row.spilled:5} {row.shared:6} "
            f"{row.load_bits:4} {row.store_bits:5} {row.blocks:6}  {row.problem}",
            flush=True,
        )
    if arguments.json:
        today = datetime.now(timezone.utc).date().isoformat()
        content = {"triton": triton.__version__, "date": today, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(row.problem for row in rows))


if __name__ == "__main__":
    main()
