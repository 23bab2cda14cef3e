"""Runs parts one after the other, each in a process of its own, and remembers which are done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import outcomes
from benchmarks.measure import ROOT, conditions
from benchmarks.parts import Part
from fastmrcnn.files import write_json

LIMIT = 9 * 60.0
"""Seconds that a part may take."""
GRACE = 45.0
"""Seconds that a part is given to end once it is asked to, before it is killed."""
STOPPED = 128 + signal.SIGTERM
LINES_SHOWN = 15
DONE, FAILED, UNFINISHED, LEFT_OUT = "done", "failed", "unfinished", "left out"
TO_DO, OUTDATED = "to do", "of other sources"


class Ended(NamedTuple):
    """How a part ended: in one of four ways, after so many seconds, and what there is to say of it."""

    state: str
    seconds: float
    says: str


class Runner:
    """Parts and what became of them, which `output`/run.json remembers.

    A part that is done, or failed, is not run again, unless the sources have changed since.  One that was cut off goes
    on, if it can, and otherwise begins anew.

    Args:
        output: folder of results and logs; made if missing.
        on_gpu: whether programs may use one.
        limit: seconds that a part may take.
    """

    def __init__(self, output: Path, *, on_gpu: bool, limit: float = LIMIT) -> None:
        self.output, self.on_gpu, self.limit = output, on_gpu, limit
        self.logs = output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.file = output / "run.json"
        self.sources = sources()
        self.ended: dict[str, dict[str, Any]] = json.loads(self.file.read_text())["parts"] if self.file.exists() else {}

    def state(self, part: Part) -> str:
        """What became of a part: one of four states, "to do", or "of other sources"."""
        known = self.ended.get(part.name)
        if known is None:
            return TO_DO
        return OUTDATED if known["sources"] != self.sources else str(known["state"])

    def due(self, part: Part) -> bool:
        """Whether there is anything to run: also once more, if it was cut off or could not run."""
        return self.state(part) not in (DONE, FAILED)

    def forget(self, parts: Sequence[Part]) -> None:
        """Begin them anew, whatever became of them."""
        for part in parts:
            self.ended.pop(part.name, None)
            self.discard(part)

    def discard(self, part: Part) -> None:
        """Remove what a part has written."""
        for path in (self.output / f"{part.name}{suffix}" for suffix in (".json", ".jsonl", ".svg")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.output / "runs" / part.name, ignore_errors=True)

    def run(self, part: Part, title: str) -> Ended:
        """Run a part, and remember how it ended."""
        goes_on = part.goes_on and self.state(part) == UNFINISHED
        if not goes_on:
            self.discard(part)
        if sys.stdout.isatty():
            print(title, end="", flush=True)
        found = self._run(part) if part.missing is None else Ended(LEFT_OUT, 0.0, part.missing)
        start = "\r" if sys.stdout.isatty() else ""
        print(f"{start}{title:<32} {found.state:<10} {found.seconds:5.0f} s  {found.says}", flush=True)
        before = self.ended[part.name]["seconds"] if goes_on else 0.0
        entry = {"state": found.state, "seconds": round(before + found.seconds, 1), "says": found.says}
        date = datetime.now(timezone.utc).isoformat(timespec="minutes")
        self.ended[part.name] = entry | {"sources": self.sources, "date": date}
        write_json(self.file, {"parts": self.ended, "conditions": conditions()})
        return found

    def _run(self, part: Part) -> Ended:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment
        if not self.on_gpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        # A part is no worker of the tests that may have started this, and kernels are not interpreted.
        others = ("PYTEST_", "TRITON_INTERPRET")
        environment = {key: value for key, value in environment.items() if not key.startswith(others)}
        started, cut = time.monotonic(), False
        log = self.logs / f"{part.name}.log"
        with log.open("w") as file, Live(started):
            process = subprocess.Popen(
                part.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                process.wait(self.limit)
            except subprocess.TimeoutExpired:
                cut = True
            finally:
                end(process)
        seconds = time.monotonic() - started
        if cut or process.returncode == STOPPED:
            said = "asked to end after its time; the next run goes on with it" if part.goes_on else "took too long"
            return Ended(UNFINISHED, seconds, f"{said} {self._says(part)}".rstrip())
        if process.returncode == 0:
            if part.kept is not None:
                for suffix in (".json", ".svg"):
                    shutil.copyfile(part.kept.with_suffix(suffix), self.output / f"{part.name}{suffix}")
            return Ended(DONE, seconds, self._says(part))
        lines = log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        print("\n" + "\n".join(f"    {line}" for line in lines))
        return Ended(FAILED, seconds, self._says(part) or f"exit status {process.returncode}, see {log}")

    def _says(self, part: Part) -> str:
        path = self.output / f"{part.name}.jsonl"
        return str(outcomes.summary(path)) if path.exists() else ""


class Live:
    """Shows on a terminal for how long a part runs; nothing elsewhere."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def _tell(self) -> None:
        while not self.over.wait(1.0):
            print(f"\x1b7 {time.monotonic() - self.started:4.0f} s\x1b8", end="", file=sys.stderr, flush=True)


def end(process: subprocess.Popen[Any]) -> None:
    """Ask a process that still runs to end, and after a while have no choice but to kill it and all it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sources() -> str:
    """A fingerprint of all Python of this repository, which says whether a result is of what is there now."""
    found = hashlib.sha256()
    for folder in ("benchmarks", "fastmrcnn", "kernels", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
