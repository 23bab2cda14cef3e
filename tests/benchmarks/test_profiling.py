"""What a trace says, by traces written by hand as the profiler writes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import profiling


def event(cat: str, name: str, start: float, duration: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "tid": thread}


OURS = "_roi_align_fwd_kernel"
CONVERSION = "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>(...)"
TRACE = [
    event("cpu_op", "aten::conv2d", 0, 50),
    event("cuda_runtime", "cudaLaunchKernel", 5, 1),
    event("cuda_runtime", "cuLaunchKernelEx", 6, 1),
    event("cuda_runtime", "cudaGraphLaunch", 7, 1),
    event("cuda_runtime", "cudaStreamSynchronize", 90, 100),
    event("kernel", CONVERSION, 100, 10),
    event("kernel", "sm90_xmma_fprop_implicit_gemm_f16f16", 110, 40),
    event("kernel", OURS, 145, 15),  # beside the one before
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 161, 5),  # after a microsecond
    event("kernel", OURS, 186, 14),
    {"ph": "M", "name": "process_name", "ts": 0},
]


def test_gpu() -> None:
    found = profiling.summarised(TRACE, 2)
    assert found["of"] == "GPU"
    assert found["us"] == 50.0
    assert found["busy"] == pytest.approx(1 - 21 / 100)
    assert (found["gaps"], found["longest_gap_us"]) == (0.5, 20.0)
    assert (found["kernels"], found["launches"], found["waits"]) == (2.5, 1.5, 0.5)
    assert found["kinds_us"] == {
        "convolution or product": 20.0,
        "ours": 14.5,
        "layout conversion": 5.0,
        "copy or cast": 2.5,
    }
    assert found["longest"][1] == {"name": OURS, "kind": "ours", "us": 14.5, "times": 1.0}
    assert found["layout_conversions"] == [CONVERSION]
    text = profiling.table("a step", found)
    assert "a step: 50 us" in text
    assert "layouts are converted by void cudnn::ops::nchwToNhwcKernel" in text


def test_a_short_kernel_beside_a_long_one_ends_nothing() -> None:
    spans = [profiling.Span("long", 0, 100), profiling.Span("short", 10, 20), profiling.Span("next", 110, 120)]
    assert profiling.idle(spans) == [10]


def test_operators_on_a_cpu() -> None:
    """Of one within another only the time that is its own, on each thread by itself."""
    events = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::addmm", 10, 60),
        event("cpu_op", "aten::copy_", 20, 10),
        event("cpu_op", "aten::copy_", 75, 5),
        event("cpu_op", "aten::sort", 50, 200, thread=2),
    ]
    found = profiling.summarised(events, 1)
    times = {kernel["name"]: kernel["us"] for kernel in found["longest"]}
    assert times == {"aten::sort": 200, "aten::addmm": 50, "aten::linear": 35, "aten::copy_": 15}
    assert found["of"] == "CPU"
    assert (found["us"], found["busy"]) == (250, 1.0)
    assert "layouts" not in profiling.table("x", found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_paste_kernel", "ours"),
        ("_Z13some_kernelPf", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "fill"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copy or cast"),
        ("void cub::DeviceRadixSortOnesweepKernel<>", "sort or top-k"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "convolution or product"),
        ("void vision::ops::nms_kernel_impl<float>", "suppression"),
        ("void cudnn::ops::nhwcToNchwKernel<>", "layout conversion"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert profiling.kind(name) == kind


def test_recording(tmp_path: Path) -> None:
    import torch

    x, calls = torch.ones(64, 64), []

    def call() -> None:
        calls.append(x @ x)

    kept = tmp_path / "traces" / "a.json.gz"
    events = profiling.traced(call, 2, 3, kept)
    assert len(calls) == 5
    assert sum(e.get("name") == "aten::mm" for e in events) == 3
    with gzip.open(kept) as file:
        assert json.load(file)["traceEvents"] == events
