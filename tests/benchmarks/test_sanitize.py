"""What compute-sanitizer says is understood, and which kernels it is to look at."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from benchmarks import profiling, sanitize
from benchmarks.measure import ROOT

CLEAN = """========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _paste_kernel+0x1e0 in paste.py:40
=========     Address 0x7f0 is out of bounds
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _topk_kernel+0x70 and Read access at _topk_kernel+0x90
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (CLEAN, 0),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"), 0),
        (MEMCHECK, 2),
        (RACECHECK, 2),
        (MEMCHECK.rpartition("========= ERROR")[0], 1),
    ],
)
def test_findings(tmp_path: Path, text: str, count: int) -> None:
    log = tmp_path / "a.log"
    log.write_text(text)
    assert len(sanitize.findings([log])) == count


TOOL = """#!/bin/sh
echo "$@" > {folder}/arguments
printf '{text}' > {folder}/memcheck-123.log
touch {folder}/memcheck.jsonl
exit {status}
"""


def use(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = "", status: int = 0) -> None:
    """Run the program with a tool that says `text`."""
    tool = folder / sanitize.SANITIZER
    tool.write_text(TOOL.format(folder=folder, text=text, status=status))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr("sys.argv", ["sanitize", "memcheck", "--outcomes", str(folder / "memcheck.jsonl")])
    sanitize.main()


def test_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(tmp_path, monkeypatch)
    assert "0 findings of memcheck" in capsys.readouterr().out
    given = (tmp_path / "arguments").read_text()
    assert given.startswith("--tool memcheck --kernel-name regex=^[a-z0-9_]+_kernel$ --log-file ")
    assert "-m pytest -q -p benchmarks.outcomes" in given


def test_what_was_found_before_it_was_cut_off_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memcheck.jsonl").touch()
    (tmp_path / "memcheck-7.log").write_text(MEMCHECK)
    with pytest.raises(SystemExit) as ended:
        use(tmp_path, monkeypatch)
    assert ended.value.code == 1
    (tmp_path / "memcheck.jsonl").unlink()  # a new run
    use(tmp_path, monkeypatch)
    assert not (tmp_path / "memcheck-7.log").exists()


def test_a_failing_test_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        use(tmp_path, monkeypatch, status=9)
    assert ended.value.code == 9


def test_our_kernels() -> None:
    """All that are launched, and none of PyTorch's; the profiler knows them by the same names."""
    sources = [path.read_text() for path in (ROOT / "kernels" / "fastmrcnn_kernels" / "triton").glob("*.py")]
    launched = {name for text in sources for name in re.findall(r"^ +(\w+)\[", text, re.MULTILINE)}
    jitted = {name for text in sources for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+)", text)}
    kernels = launched & jitted
    assert len(kernels) > 15
    for name in kernels:
        assert re.search(sanitize.OUR_KERNELS, name), name
        assert profiling.kind(name) == "ours"
    for name in (
        "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctor",
        "_ZN3cub17DeviceScanKernel_kernel",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32",
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT",
    ):
        assert not re.search(sanitize.OUR_KERNELS, name), name
