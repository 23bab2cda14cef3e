"""Runs parts, each in a process of its own, and remembers which are done."""

from __future__ import annotations

import contextlib
import ctypes
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

    A part that is done, or failed, is not run again, unless the sources have changed since.  One that was cut off, be
    it with this process, goes on, if it can, and otherwise begins anew; it has failed if it had all its time.

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

    def due(self, parts: Sequence[Part]) -> list[Part]:
        """Those of which there is anything to run: what was cut off, or could not run, once more, after the others."""
        found = [part for part in parts if self.state(part) not in (DONE, FAILED)]
        return sorted(found, key=lambda part: self.state(part) == UNFINISHED)

    def forget(self, parts: Sequence[Part]) -> None:
        """Begin them anew, whatever became of them."""
        for part in parts:
            self.ended.pop(part.name, None)
            self.discard(part)

    def discard(self, part: Part) -> None:
        """Remove what a part has written."""
        written = [self.output / f"{part.name}{suffix}" for suffix in (".json", ".jsonl", ".svg")]
        for path in [*written, self.logs / f"{part.name}.log"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.output / "runs" / part.name, ignore_errors=True)

    def run(self, part: Part, title: str) -> Ended:
        """Run a part, and remember how it ended; if it cannot run here, an earlier result stays."""
        if part.missing is not None:
            left_out = Ended(LEFT_OUT, 0.0, part.missing)
            print(said(title, left_out), flush=True)
            if part.name not in self.ended:
                self.note(part, left_out)
            return left_out
        goes_on = part.goes_on and self.state(part) == UNFINISHED
        before = self.ended[part.name]["seconds"] if goes_on else 0.0
        if not goes_on:
            self.discard(part)
        self.note(part, Ended(UNFINISHED, before, "was killed"))  # unless it comes to say anything else
        if sys.stdout.isatty():
            print(title, end="", flush=True)
        found = self._run(part)
        print(said(title, found), flush=True)
        self.note(part, found._replace(seconds=before + found.seconds))
        return found

    def note(self, part: Part, ended: Ended) -> None:
        """Remember what became of a part."""
        entry = {"state": ended.state, "seconds": round(ended.seconds, 1), "says": ended.says, "sources": self.sources}
        date = datetime.now(timezone.utc).isoformat(timespec="minutes")
        self.ended[part.name] = entry | {"date": date}
        write_json(self.file, {"parts": self.ended, "conditions": conditions()})

    def _run(self, part: Part) -> Ended:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment
        if not self.on_gpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        # A part is no worker of the tests that may have started this, and kernels are not interpreted.
        others = ("PYTEST_", "TRITON_INTERPRET")
        environment = {key: value for key, value in environment.items() if not key.startswith(others)}
        started, cut = time.monotonic(), False
        log = self.logs / f"{part.name}.log"
        with log.open("a" if part.goes_on else "w") as file:
            process = subprocess.Popen(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        with Live(started):
            try:
                process.wait(self.limit)
            except subprocess.TimeoutExpired:
                cut = True
            finally:
                end(process)
        seconds = time.monotonic() - started
        if cut and not part.goes_on and self.limit >= LIMIT:
            return self._failed(part, Ended(FAILED, seconds, f"took longer than {self.limit:.0f} s"))
        if cut or process.returncode == STOPPED:
            why = "the next run goes on with it" if part.goes_on else "there was no time left"
            return Ended(UNFINISHED, seconds, f"{why}; {self._says(part)}".rstrip("; "))
        if process.returncode == 0:
            self._keep(part)
            return Ended(DONE, seconds, self._says(part))
        lines = log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        print("\n" + "\n".join(f"    {line}" for line in lines))
        why = self._says(part) or f"exit status {process.returncode}, see {log}"
        return self._failed(part, Ended(FAILED, seconds, why))

    def _failed(self, part: Part, ended: Ended) -> Ended:
        """Put aside the result of a part that failed, unless it is of those of its cases that did not."""
        result = self.output / f"{part.name}.json"
        if part.some_counts:
            self._keep(part)
        elif result.exists():
            result.replace(self.logs / f"{part.name}-failed.json")
        return ended

    def _keep(self, part: Part) -> None:
        """Copy a result that is elsewhere; an empty file is of a program that did not come to write it."""
        for suffix in (".json", ".svg") if part.kept is not None else ():
            source = part.kept.with_suffix(suffix)
            if source.exists() and source.stat().st_size:
                shutil.copyfile(source, self.output / f"{part.name}{suffix}")

    def _says(self, part: Part) -> str:
        path = self.output / f"{part.name}.jsonl"
        return str(outcomes.summary(path)) if path.exists() else ""


def said(title: str, ended: Ended) -> str:
    """A line on how a part ended, which on a terminal takes the place of its title."""
    start = "\r" if sys.stdout.isatty() else ""
    return f"{start}{title:<32} {ended.state:<10} {ended.seconds:5.0f} s  {ended.says}"


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


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
