"""Tests of the kernels under NVIDIA's compute-sanitizer: accesses out of bounds, and races in shared memory.

    python -m benchmarks.sanitize memcheck --outcomes memcheck.jsonl
    python -m benchmarks.sanitize racecheck --outcomes racecheck.jsonl

Only kernels of ours are watched, on few examples each, since it takes long.  Cut off, it goes on with the tests that
are left; what the tool has found stays in files beside the outcomes.  The run fails if it has found anything.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ROOT

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
OUR_KERNELS = "^[a-z0-9_]+_kernel$"
"""Names of kernels written in Triton: those of C++ are mangled, _ZN..., and others have capitals or another end."""
WITHOUT = "not cuda_graph"
"""Tests that cannot be watched: no memory can be allocated in a capture, if each tensor has its own."""
NOTHING = re.compile(r"SUMMARY: 0 (errors|hazards)")
FINDING = re.compile(r"^=+ +(Invalid|Error|Warning|.*SUMMARY|.*hazard|Misaligned|Program hit)", re.MULTILINE)


def findings(logs: list[Path]) -> list[str]:
    """Lines of the tool's logs that say that something is wrong."""
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if FINDING.match(line)]
    return [line for line in lines if not NOTHING.search(line)]


def command(tool: str, outcomes: Path) -> list[str]:
    """The tests under `tool`."""
    watched = [SANITIZER, "--tool", tool, "--kernel-name", f"regex={OUR_KERNELS}"]
    watched += ["--log-file", f"{outcomes.with_suffix('')}-%p.log", "--error-exitcode", "9"]
    if tool == "memcheck":  # PyTorch asks CUDA what may well fail
        watched += ["--report-api-errors", "no"]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.outcomes", "--outcomes", str(outcomes)]
    return [*watched, *tests, "--hypothesis-profile", "few", "-k", WITHOUT, "tests/kernels"]


def main() -> None:
    """Run the tests, and look at what the tool has said of all runs so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--outcomes", type=Path, required=True, help="file for the outcomes of tests; appended to")
    options = parser.parse_args()
    outcomes: Path = options.outcomes.resolve()
    if not outcomes.exists():  # a new run, to which findings of others do not belong
        for log in outcomes.parent.glob(f"{outcomes.stem}-*.log"):
            log.unlink()
    # Each tensor in memory of its own: what is read beyond one would be another's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = subprocess.run(command(options.tool, outcomes), cwd=ROOT, env=environment, check=False).returncode
    found = findings(sorted(outcomes.parent.glob(f"{outcomes.stem}-*.log")))
    print(*found[:20], f"{len(found)} findings of {options.tool}", sep="\n")
    if status or found:
        sys.exit(status or 1)


if __name__ == "__main__":
    main()
