"""The suite as a user runs it, on one small operation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PLUGIN = """
from fastmrcnn import ops
right = ops.roi_pool
ops.roi_pool = lambda *args, **kwargs: right(*args, **kwargs) + 1e-3
"""


def suite(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run in a process of its own, which sees no GPU and does not interpret kernels, and its result."""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    # It is no worker of this run, if this one is spread over processes: there benchmarks are not taken.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "benchmarks", f"--benchmark-json={tmp_path / 'result.json'}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    found = tmp_path / "result.json"
    return run, json.loads(found.read_text()) if found.exists() and found.stat().st_size else {}


def test_one_operation(tmp_path: Path) -> None:
    run, result = suite(tmp_path, "-k", "roi_pool and forward and not reference")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "left out, for want of a GPU: roi_pool at 800x1333" in run.stdout
    assert "left out, for want of a GPU: roi_pool in float16" in run.stdout
    assert "roi_pool forward, 1 x 100 RoIs, 7x7, 400x666" in run.stdout
    conditions = result["machine_info"]
    assert conditions["torch"] == torch.__version__
    assert conditions["copy_bandwidth"] > 1e8
    assert {"device", "clocks", "torchvision", "triton", "fastmrcnn", "date"} <= conditions.keys()
    assert "id" in result["commit_info"]
    assert [entry["extra_info"]["contender"] for entry in result["benchmarks"]] == [
        "fastmrcnn float32",
        "torchvision float32",
    ]
    for entry in result["benchmarks"]:
        record = entry["extra_info"]
        assert 0 < record["p20_us"] <= record["p50_us"] <= record["p80_us"]
        assert entry["stats"]["median"] * 1e6 == pytest.approx(record["p50_us"], abs=0.01)
        share = record["least_bytes"] / record["p50_us"] * 1e6 / conditions["copy_bandwidth"]
        assert record["share_of_copy_bandwidth"] == pytest.approx(share, rel=0.01, abs=1e-4)
    for text in (str(tmp_path), str(ROOT)):
        assert text not in json.dumps(result)


def test_a_wrong_result_has_no_time(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(PLUGIN)
    run, result = suite(tmp_path, "-p", "broken", "-k", "roi_pool and forward and not reference")
    assert run.returncode == 1
    assert "1 failed, 1 passed" in run.stdout
    assert [entry["extra_info"]["contender"] for entry in result["benchmarks"]] == ["torchvision float32"]
