"""The kernels as PyTorch operators, and what a process needs to import, run or compile them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import DEVICE
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels import library


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the paths of this process, installed or not, and without the interpreter of kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def small_call(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, *shape).to(DEVICE, dtype).requires_grad_() for shape in ((6, 9), (3, 4))]
    found = torch.tensor([[0, 1.0, 2, 20, 17], [-1, 0, 0, 0, 0]], device=DEVICE)
    return maps, found, None, [2, 3], [0.25, 0.125], 2, False, "bilinear", "average", 40.0, 4


def test_opcheck_forward() -> None:
    torch.library.opcheck(torch.ops.fastmrcnn.multilevel_roi_align.default, small_call())
    maps, found, _, *rest = small_call()
    levels = torch.tensor([1, 0], device=DEVICE)
    torch.library.opcheck(torch.ops.fastmrcnn.multilevel_roi_align.default, (maps, found, levels, *rest))


def test_opcheck_backward() -> None:
    maps, found, levels, size, *semantics = small_call()
    pooled = torch.randn(2, 3, *size, device=DEVICE)
    arguments = (pooled, found, levels, 2, [x.shape[2] for x in maps], [x.shape[3] for x in maps], *semantics)
    torch.library.opcheck(torch.ops.fastmrcnn.multilevel_roi_align_backward.default, arguments)


def test_opcheck_roi_pool() -> None:
    (maps, *_), found, *_ = small_call()
    torch.library.opcheck(torch.ops.fastmrcnn.roi_pool.default, (maps, found, [2, 3], 0.25))
    pooled, position = torch.ops.fastmrcnn.roi_pool(maps.detach(), found, [2, 3], 0.25)
    torch.library.opcheck(
        torch.ops.fastmrcnn.roi_pool_backward.default, (pooled, position, found, *maps.shape[::2], 9, 0.25)
    )


def detector_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator between the head of an RPN and detections."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(DEVICE)

    boxes = torch.cat((rand(2, 3, 9, 2) * 20, 20 + rand(2, 3, 9, 2) * 20), dim=3)
    scores, alive = rand(2, 3, 9).sort(dim=2, descending=True).values, rand(6, 9) < 0.9
    kept, counts = torch.arange(9, device=DEVICE).expand(2, 3, 9), torch.full((2, 3), 4, device=DEVICE)
    groups = torch.arange(54, device=DEVICE).view(6, 9) % 2
    sizes, counts_of_images = torch.full((2, 2), 40, device=DEVICE), torch.tensor([9, 4], device=DEVICE)
    return {
        "topk_anchors": ([rand(2, 3, 4, 4), rand(2, 3, 2, 2)], 15),
        "sorted_nms": (boxes.flatten(0, 1), alive, groups, None, 0.5, 5),
        "merge_levels": (boxes, scores, kept, counts, 7),
        "select_detections": (
            *(rand(2, 9, 4), rand(2, 9, 4, 4), boxes[:, 0], counts_of_images, sizes),
            *(0.05, 0.5, 7, 0.01, [10.0, 10.0, 5.0, 5.0], False),
        ),
    }


def mask_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator between the head of masks and images or text, or what it is to learn."""
    masks, boxes = torch.rand(2, 2, 5, 5, device=DEVICE), torch.rand(2, 2, 4, device=DEVICE) * 9
    sizes, counts = torch.tensor([[8, 9], [6, 7]], device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    bits = torch.randint(-(2**31), 2**31, (3, 4, 2), dtype=torch.int32, device=DEVICE)
    return {
        "paste_masks": (masks.requires_grad_(), boxes, 8, 9, sizes, counts, False, 1, 0.5, "soft"),
        "encode_masks": (masks.detach(), boxes, sizes, counts, 8, 9, 90, True, 1, 0.5),
        "encode_bool": (torch.rand(2, 8, 9, device=DEVICE) < 0.5, 90),
        "mask_iou": (bits, bits[:2], torch.tensor([True, False], device=DEVICE)),
        "mask_targets": (
            *(bits.flatten(), counts * 0, torch.tensor([[4, 60, 8, 9, 0, 0, 8, 9]] * 2, device=DEVICE)),
            *(boxes, counts.expand(2, 2) - 1, masks[..., 0, 0] < 0.9, 2),
        ),
    }


@pytest.mark.parametrize("op", ["paste_masks", "encode_masks", "encode_bool", "mask_iou", "mask_targets"])
def test_opcheck_of_masks(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastmrcnn, op).default, mask_calls()[op])


def test_opcheck_of_images() -> None:
    pixels = torch.randint(0, 256, (300,), dtype=torch.uint8, device=DEVICE)
    offsets = torch.tensor([0, 100], device=DEVICE)
    views = torch.tensor([[4, 6, 8, 12, 0, 0, 8, 12], [5, 3, 7, 9, 1, 2, 6, 7]], device=DEVICE)
    arguments = pixels, offsets, views, 9, 13, [0.01, 0.02, 0.03], [-1.0, 0.0, 1.0], torch.float16
    torch.library.opcheck(torch.ops.fastmrcnn.resize_images.default, arguments)


@pytest.mark.parametrize("op", ["topk_anchors", "sorted_nms", "merge_levels", "select_detections"])
def test_opcheck_of_a_detector(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastmrcnn, op).default, detector_calls()[op])


def test_opcheck_nms() -> None:
    """As many indices as boxes are kept: a shape that depends on data, so not all of the checks apply."""
    boxes, _, groups, *_ = detector_calls()["sorted_nms"]
    arguments = (boxes[0], torch.rand(9, device=DEVICE), groups[0], 0.5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastmrcnn.nms.default, arguments, test_utils=checks)


def detect(logits: list[Tensor], deltas: list[Tensor], classes: Tensor, regression: Tensor) -> tuple[Tensor, ...]:
    """From head outputs to detections, by kernels alone."""
    base = [torch.tensor([[-9.0, -9, 9, 9], [-15, -6, 15, 6]], device=DEVICE)] * 2
    sizes = torch.full((2, 2), 40, device=DEVICE)
    scores, indices = ops.topk_anchors(logits, 6, impl="triton")
    boxes, valid = ops.decode_proposals(
        deltas, indices, base, [(10, 10), (20, 20)], sizes, scores=scores, impl="triton"
    )
    flat = (x.flatten(0, 1) for x in (boxes, scores, valid))
    kept, count = ops.padded_nms(*flat, 0.7, 6, presorted=True, impl="triton")
    kept, count = kept.view(2, 2, 6), count.view(2, 2)
    proposals, _, number = ops.merge_levels(boxes, scores, kept, count, 9, impl="triton")
    return ops.select_detections(classes, regression, proposals, number, sizes, max_detections=5, impl="triton")


def head_outputs() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = (
        [torch.randn(2, values, *shape, generator=generator).to(DEVICE) for shape in ((4, 4), (2, 2))]
        for values in (2, 8)
    )
    classes, regression = (torch.randn(2, 9, 4, *shape, generator=generator).to(DEVICE) for shape in ((), (4,)))
    return logits, deltas, classes, regression


def test_detection_compiles_without_graph_breaks() -> None:
    expected = detect(*head_outputs())
    assert expected[3].min() > 0
    found = torch.compile(detect, fullgraph=True, backend="aot_eager")(*head_outputs())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_detection_exports() -> None:
    class Detect(torch.nn.Module):
        def forward(self, *outputs: Any) -> tuple[Tensor, ...]:
            return detect(*outputs)

    program = torch.export.export(Detect(), head_outputs())
    found, expected = program.module()(*head_outputs()), detect(*head_outputs())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_cuda_graph_of_detection() -> None:
    outputs = head_outputs()
    detect(*outputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = detect(*outputs)
    outputs[2].neg_()
    outputs[0][0].neg_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, detect(*outputs), strict=True))


def pool(maps: list[Tensor], found: Tensor) -> Tensor:
    pooled = ops.multilevel_roi_align(maps, found, (2, 3), (0.25, 0.125), canonical_scale=40, impl="triton")
    return pooled.relu() + ops.roi_pool(maps[0], found, (2, 3), 0.25, impl="triton")


def test_compile_without_graph_breaks() -> None:
    maps, found, *_ = small_call()
    expected = pool(maps, found)
    expected_gradients = torch.autograd.grad(expected.sum(), maps)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    pooled = compiled(maps, found)
    assert torch.equal(pooled, expected)
    for a, b in zip(torch.autograd.grad(pooled.sum(), maps), expected_gradients, strict=True):
        assert torch.equal(a, b)


def test_export() -> None:
    class Pool(torch.nn.Module):
        def forward(self, maps: list[Tensor], found: Tensor) -> Tensor:
            return pool(maps, found)

    maps, found, *_ = small_call()
    maps = [x.detach() for x in maps]
    program = torch.export.export(Pool(), (maps, found))
    assert torch.equal(program.module()(maps, found), pool(maps, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_leaves_dtypes_alone(dtype: torch.dtype) -> None:
    maps, found, *_ = small_call(dtype)
    expected = pool(maps, found)
    with torch.autocast(DEVICE, torch.bfloat16):
        pooled = pool(maps, found)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, expected)
    assert all(gradient.dtype == dtype for gradient in torch.autograd.grad(pooled.sum(), maps))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_cuda_graph() -> None:
    maps, found, *_ = small_call()
    maps = [x.detach() for x in maps]
    pool(maps, found)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = pool(maps, found)
    maps[0].mul_(2)
    graph.replay()
    assert torch.equal(pooled, pool(maps, found))


def test_fastmrcnn_imports_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastmrcnn, torch\n"
        "from fastmrcnn import ops\n"
        "assert not any(name.startswith('fastmrcnn_kernels.triton') for name in sys.modules)\n"
        "print(ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0, 1.0, 1, 3, 3]]), 1).item())\n"
    )
    run = python("-c", script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1.0"]


def test_a_cpu_without_the_interpreter_is_an_error() -> None:
    script = (
        "import torch\nfrom fastmrcnn import ops\n"
        "ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0, 1.0, 1, 3, 3]]), 1, impl='triton')\n"
    )
    run = python("-c", script)
    assert "ValueError: impl='triton': tensors are on 'cpu', kernels need a CUDA or ROCm device" in run.stderr


def test_kernels_compile_ahead_of_time() -> None:
    """A subset of the matrix that `benchmarks/compile_report.py` covers, in a process that does not interpret."""
    script = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"
    run = python(str(script), "--targets", "sm_90", "--only", "bfloat16 14x14")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if "sm_90" in line]
    assert len(rows) == 3
    forward = next(row for row in rows if "_roi_align_fwd_kernel" in row)
    assert forward.split()[8:10] == ["128", "128"]  # bits of the widest load and store


def test_kernels_of_segments_compile_ahead_of_time() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"
    run = python(str(script), "--targets", "sm_90", "--only", "nms 5 x 1000")
    assert run.returncode == 0, run.stdout + run.stderr
    assert len([line for line in run.stdout.splitlines() if "sm_90" in line]) == 2


SPECIALISATIONS = """
import torch
from collections import defaultdict
from itertools import product
from benchmarks.compile_report import TARGETS, record
from fastmrcnn_kernels.sampler import Sampler
from fastmrcnn_kernels.triton import box_coding, canvases, detections, images as resize, mask_iou, merge, nms, paste
from fastmrcnn_kernels.triton import mask_targets, matching, rle, roi_align, roi_align_backward, roi_pool, topk
from triton.compiler import make_backend
from triton.runtime import jit

WEIGHTS = (10.0, 10.0, 5.0, 5.0)

def detect(images, count, height, width):
    maps = [torch.empty(images, 32, height // s, width // s) for s in (4, 8, 16)]
    rois, semantics = torch.empty(count, 5), ((0.25, 0.125, 0.0625), Sampler(2, False, False, False), (112.0, 224.0))
    pooled = roi_align.roi_align_forward(maps, rois, None, (7, 7), *semantics)
    sides = [[x.shape[i] for x in maps] for i in (2, 3)]
    roi_align_backward.roi_align_backward(pooled, rois, None, images, *sides, *semantics)
    pooled, position = roi_pool.roi_pool_forward(maps[0], rois, (7, 7), 0.25)
    roi_pool.roi_pool_backward(pooled, position, rois, images, *maps[0].shape[2:], 0.25)
    logits, deltas = ([torch.empty(images, a, *x.shape[2:]) for x in maps] for a in (3, 12))
    scores, indices = topk.topk_anchors(logits, count)
    sizes, strides = torch.empty(images, 2, dtype=torch.int64), [4, 8, 16]
    base = [torch.empty(3, 4)] * 3
    canvases.clear_beyond_(maps[0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), sizes, 4, 0.0)
    extents = torch.empty(images, 3, 2, dtype=torch.int64)
    roi_align.roi_align_forward(maps, rois, None, (7, 7), *semantics, extents)
    boxes, valid = box_coding.decode_proposals(
        deltas, indices, scores, base, strides, strides, None, sizes, 0.001, 0.0, (1.0, 1.0, 1.0, 1.0)
    )
    kept, counts = nms.sorted_nms(boxes.flatten(0, 1), valid.flatten(0, 1), None, None, 0.7, count)
    boxes, _, counts = merge.merge_levels(boxes, scores, kept.view_as(scores), counts.view(images, 3), count)
    classes = torch.empty(images, count, 91)
    regression = torch.empty(images, count, 91, 4)
    box_coding.decode_boxes(regression, boxes, WEIGHTS)
    box_coding.encode_boxes(boxes, boxes, WEIGHTS)
    detections.select_detections(classes, regression, boxes, counts, sizes, 0.05, 0.5, 100, 0.01, WEIGHTS, False)
    masks = torch.empty(images, count, 28, 28)
    paste.paste_masks(masks, boxes, height, width, sizes, counts, False, 1, 0.5, "soft")
    rle.encode_masks(masks, boxes, sizes, counts, height, width, count * width, False, 1, 0.5)
    views, numbers = torch.empty(images, 8, dtype=torch.int64), (float(images), count / 7, 1.0)
    pixels = torch.empty(count, dtype=torch.uint8)
    resize.resize_images(pixels, sizes[:, 0], views, height, width, numbers, numbers, torch.float16)
    for some in (boxes, boxes[:1]):
        matching.match_boxes(some, boxes[:, :height // 32], counts, count / 2000, 0.3, True)
    bits = torch.empty(count, height, width // 32, dtype=torch.int32)
    mask_iou.mask_iou(bits, bits[:images], None)
    matched = torch.empty(images, count, dtype=torch.int64)
    mask_targets.mask_targets(bits.flatten(), sizes[:, 0], views, boxes, matched, matched > 0, 28)

backend, seen = make_backend(TARGETS["sm_90"]), defaultdict(set)
for images, count, side in product((1, 3, 16), (960, 1000, 1001), ((800, 1344), (1024, 1024), (333, 517))):
    for launch in record(lambda: detect(images, count, *side)):
        bind = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        seen[launch.kernel.__name__].add(str(bind(*launch.args, debug=False, **launch.kwargs)[1]))
print({name: len(found) for name, found in sorted(seen.items()) if name != "_topk_count_kernel"})
print(len(seen["_topk_count_kernel"]))
"""


def test_nothing_is_compiled_for_another_size() -> None:
    """Of images, batches or lists of boxes.  Triton tells kernels apart by what it knows of their arguments.

    The passes of the radix select are four kernels.
    """
    run = python("-c", SPECIALISATIONS)
    assert run.returncode == 0, run.stderr
    found, passes = run.stdout.splitlines()
    counts = ast.literal_eval(found)
    assert counts.pop("_roi_align_fwd_kernel") == 2  # with extents and without
    assert len(counts) == 26
    assert set(counts.values()) == {1}, counts
    assert passes == "4"


def test_library_functions_have_the_defaults_of_the_public_ones() -> None:
    maps, found, *_ = small_call()
    one = library.roi_align(maps[0], found, (2, 2), 0.25, 2, False)
    assert torch.equal(one, ops.roi_align(maps[0], found, 2, 0.25, 2, impl="triton"))
