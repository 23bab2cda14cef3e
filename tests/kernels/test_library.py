"""The kernels as PyTorch operators, and what a process needs to import, run or compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn_kernels import library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def test_library_functions_have_the_defaults_of_the_public_ones() -> None:
    maps, found, *_ = small_call()
    one = library.roi_align(maps[0], found, (2, 2), 0.25, 2, False)
    assert torch.equal(one, ops.roi_align(maps[0], found, 2, 0.25, 2, impl="triton"))
