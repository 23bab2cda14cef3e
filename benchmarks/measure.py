"""How time is measured, and what a measurement depends on."""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastmrcnn

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 0.5  # spent on the counted runs of one call
RUNS = (3, 200)  # fewest and most of them
PERCENTILES = (20, 50, 80)


def device_name() -> str:
    """PyTorch's name of the device that is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def times(call: Callable[[], object], seconds: float = SECONDS) -> list[float]:
    """Seconds of each of some runs of `call`, which ran before; on a GPU between events, with a cold L2 cache.

    Before each run a gigabyte is overwritten.  That empties the cache, and takes the GPU longer than the host needs to
    launch what `call` launches, so that time between the events is the GPU's, unless `call` waits for the GPU itself.
    """
    once = _events if torch.cuda.is_available() else _wall_clock
    estimate = min(once(call, 2))
    return once(call, min(max(int(seconds / estimate), RUNS[0]), RUNS[1]))


def _wall_clock(call: Callable[[], object], runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def _events(call: Callable[[], object], runs: int) -> list[float]:
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        _overwritten().zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]


@cache
def _overwritten() -> torch.Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def host_time(call: Callable[[], object], runs: int = 20, seconds: float = SECONDS) -> float:
    """Seconds that the host needs for one `call`: on a GPU to launch it, and to wait for it where it does.

    The mean of `runs`, or of as many as fit into `seconds`.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    done = 0
    while done == 0 or (done < runs and time.perf_counter() - started < seconds):
        call()
        done += 1
    elapsed = time.perf_counter() - started
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return elapsed / done


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do, views left out, and how often a value is read, or a shape depends on one.

    For each of the latter a program waits for its GPU.
    """

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.namespace != "prim"
        name = func.name().removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        self.reads += masks or name == "where" or name.startswith(self.READS)  # `where` of a condition alone
        return func(*args, **(kwargs or {}))


def is_launch(name: str) -> bool:
    """Whether a call of CUDA's or HIP's interface launches kernels."""
    return "LaunchKernel" in name or "GraphLaunch" in name


def is_wait(name: str) -> bool:
    """Whether it waits for the GPU; for all of it waits only who measures."""
    return "StreamSynchronize" in name or "EventSynchronize" in name


def demands(call: Callable[[], object]) -> dict[str, int]:
    """What `call`, which ran before, asks of the device: operations, values; on a GPU also launches, and waits."""
    with Operations() as operations:
        call()
    found = {"operations": operations.count, "reads": operations.reads}
    if device_name() == "cuda":
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
        names = [event.name for event in profiler.events()]
        found["launches"] = sum(is_launch(name) for name in names)
        found["waits"] = sum(is_wait(name) for name in names)
    return found


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within it convolutions of float32 are that on a GPU, too, whose results otherwise are those of 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1e6
    return {f"p{p}_us": round(torch.quantile(values, p / 100).item(), 2) for p in PERCENTILES}


@cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy much larger than the caches: what memory allows."""
    size = (1 << 30) if torch.cuda.is_available() else (1 << 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device_name())
    target = source.clone()
    return 2 * size / percentiles(times(lambda: target.copy_(source)))["p50_us"] * 1e6


def clocks() -> dict[str, str]:
    """Clocks, power, temperature and driver of the GPU, as its management tool states them; empty without one."""
    fields = ["clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit"]
    fields += ["temperature.gpu", "pstate", "driver_version"]
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    values = run.stdout.splitlines()[torch.cuda.current_device()].split(", ") if run.returncode == 0 else []
    return dict(zip(fields, values, strict=False))


def conditions() -> dict[str, Any]:
    """What numbers depend on: the device and its state, versions, date."""
    on_gpu = torch.cuda.is_available()
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else threads,
        "clocks": clocks(),
        "fastmrcnn": fastmrcnn.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        "hip": torch.version.hip if on_gpu else None,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def commit() -> str | None:
    """Of what is measured, "with changes" if something of it is in none; None outside of a clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=9", "HEAD"], ["status", "--porcelain", "--", "*.py"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" with changes" if changes else "")


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
