"""Parts run in processes of their own: what becomes of them is known, also after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.parts import Part
from benchmarks.runner import DONE, FAILED, LEFT_OUT, OUTDATED, TO_DO, UNFINISHED, Runner

SLEEPS = "import time; print('begun', flush=True); time.sleep(60)"


def part(code: str, name: str = "ops-a", **options: object) -> Part:
    return Part(name, [sys.executable, "-c", code], **options)


def run(output: Path, found: Part, limit: float = 60.0) -> runner.Ended:
    """By a runner that knows nothing but what is in `output`."""
    return Runner(output, on_gpu=False, limit=limit).run(found, found.name)


def state(output: Path, found: Part) -> str:
    return Runner(output, on_gpu=False).state(found)


def test_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = part("print('hello')")
    assert state(tmp_path, found) == TO_DO
    assert run(tmp_path, found).state == DONE
    assert state(tmp_path, found) == DONE
    assert not Runner(tmp_path, on_gpu=False).due([found])
    assert "hello" in (tmp_path / "logs" / "ops-a.log").read_text()
    shown = capsys.readouterr().out
    assert "ops-a" in shown
    assert "hello" not in shown
    known = json.loads((tmp_path / "run.json").read_text())
    assert {"sources", "seconds", "date", "state", "says"} == set(known["parts"]["ops-a"])
    assert "torch" in known["conditions"]


def test_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last lines are shown, and it is not tried again before anything has changed."""
    found = part("print('first'); print(*range(100), sep='\\n'); raise SystemExit('too bad')")
    ended = run(tmp_path, found)
    assert ended.state == FAILED
    assert "exit status 1, see" in ended.says
    shown = capsys.readouterr().out
    assert "too bad" in shown
    assert "first" not in shown
    assert not Runner(tmp_path, on_gpu=False).due([found])


def test_left_out(tmp_path: Path) -> None:
    """Until it can run."""
    found = part("raise AssertionError", missing="needs a GPU")
    assert run(tmp_path, found) == (LEFT_OUT, 0.0, "needs a GPU")
    assert Runner(tmp_path, on_gpu=False).due([found]) == [found]


def test_what_cannot_run_again_keeps_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops-a.json"
    run(tmp_path, part(f"import pathlib; pathlib.Path({str(path)!r}).write_text('x')"))
    monkeypatch.setattr(runner, "sources", lambda: "other")
    assert run(tmp_path, part("", missing="no data")).state == LEFT_OUT
    assert path.read_text() == "x"
    assert state(tmp_path, part("")) == OUTDATED


def test_too_long(tmp_path: Path) -> None:
    """It is stopped, and so is what it has started."""
    child = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); print(p.pid, flush=True)"
    )
    ended = run(tmp_path, part(f"{child}; p.wait()"), limit=3.0)
    assert ended.state == UNFINISHED
    assert "there was no time left" in ended.says
    number = int((tmp_path / "logs" / "ops-a.log").read_text().split()[0])
    for _ in range(100):
        if not alive(number):
            break
        time.sleep(0.1)
    assert not alive(number)


def test_all_its_time_was_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it would never be: others have their turn."""
    monkeypatch.setattr(runner, "LIMIT", 2.0)
    assert run(tmp_path, part(SLEEPS), limit=2.0)[::2] == (FAILED, "took longer than 2 s")
    assert run(tmp_path, part(SLEEPS, "tests-b", goes_on=True), limit=2.0).state == UNFINISHED


def test_what_was_cut_off_comes_last(tmp_path: Path) -> None:
    parts = [part(SLEEPS, "ops-a"), part("1", "ops-b"), part("1", "ops-c"), part("1", "ops-d", missing="no GPU")]
    run(tmp_path, parts[0], limit=2.0)
    run(tmp_path, parts[1])
    run(tmp_path, parts[3])
    due = Runner(tmp_path, on_gpu=False).due(parts)
    assert [one.name for one in due] == ["ops-c", "ops-d", "ops-a"]


def test_killed_with_all(tmp_path: Path) -> None:
    """What it was doing is to be gone on with, and does not go on by itself."""
    code = f"""
from pathlib import Path
from benchmarks.parts import Part
from benchmarks.runner import Runner
import sys
part = Part("ops-a", [sys.executable, "-c", "import os; print(os.getpid(), flush=True); " + {SLEEPS!r}], goes_on=True)
Runner(Path({str(tmp_path)!r}), on_gpu=False).run(part, "a")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=runner.ROOT)
    log = tmp_path / "logs" / "ops-a.log"
    for _ in range(600):
        if log.exists() and "begun" in log.read_text():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    number = int(log.read_text().split()[0])
    for _ in range(100):
        if not alive(number):
            break
        time.sleep(0.1)
    assert not alive(number)
    known = json.loads((tmp_path / "run.json").read_text())["parts"]["ops-a"]
    assert (known["state"], known["says"]) == (UNFINISHED, "was killed")


def alive(process: int) -> bool:
    """Whether it runs; one that has ended, but was not waited for, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_if_it_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.5)
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
    started = time.monotonic()
    assert run(tmp_path, part(deaf), limit=2.0).state == UNFINISHED
    assert time.monotonic() - started < 30


GOES_ON = """
import pathlib, sys, time
path = pathlib.Path({path!r})
seen = path.read_text() if path.exists() else ""
path.write_text(seen + "x")
if len(seen) < 1:
    time.sleep(60)
"""


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_was_cut_off_goes_on_or_begins_anew(tmp_path: Path, goes_on: bool) -> None:
    """The file that it goes on from is its result, which otherwise is removed."""
    path = tmp_path / "ops-a.json"
    found = part(GOES_ON.format(path=str(path)), goes_on=goes_on)
    assert run(tmp_path, found, limit=2.0).state == UNFINISHED
    assert Runner(tmp_path, on_gpu=False).due([found]) == [found]
    assert run(tmp_path, found, limit=2.0).state == (DONE if goes_on else UNFINISHED)
    assert path.read_text() == ("xx" if goes_on else "x")
    if goes_on:  # the time of both
        assert json.loads((tmp_path / "run.json").read_text())["parts"]["ops-a"]["seconds"] > 2.0


def test_asked_to_end(tmp_path: Path) -> None:
    """What ends by itself, as it was asked to, is to be gone on with."""
    assert run(tmp_path, part(f"raise SystemExit({runner.STOPPED})", goes_on=True)).state == UNFINISHED


def test_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is of the sources that it was measured with, and what was cut off is not gone on with by others."""
    path = tmp_path / "ops-a.json"
    found = part(f"import pathlib; pathlib.Path({str(path)!r}).open('a').write('x')", goes_on=True)
    assert run(tmp_path, found).state == DONE
    monkeypatch.setattr(runner, "sources", lambda: "other")
    assert state(tmp_path, found) == OUTDATED
    assert Runner(tmp_path, on_gpu=False).due([found]) == [found]
    assert run(tmp_path, found).state == DONE
    assert path.read_text() == "x"


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    for folder in ("benchmarks", "fastmrcnn", "kernels", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    first = runner.sources()
    (tmp_path / "kernels" / "a.txt").write_text("1")
    assert runner.sources() == first
    (tmp_path / "kernels" / "a.py").write_text("2")
    second = runner.sources()
    (tmp_path / "kernels" / "a.py").rename(tmp_path / "tests" / "a.py")
    assert len({first, second, runner.sources()}) == 3


def test_again(tmp_path: Path) -> None:
    path = tmp_path / "ops-a.json"
    found = part(f"import pathlib; pathlib.Path({str(path)!r}).write_text('x')")
    run(tmp_path, found)
    again = Runner(tmp_path, on_gpu=False)
    again.forget([found])
    assert again.due([found])
    assert not path.exists()


def test_what_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "ops-a" / "comparison"
    code = f"import pathlib; p = pathlib.Path({str(kept)!r}); p.parent.mkdir(parents=True)"
    code += "; [p.with_suffix(s).write_text(s) for s in ('.json', '.svg')]"
    assert run(tmp_path, part(code, kept=kept)).state == DONE
    assert (tmp_path / "ops-a.json").read_text() == ".json"
    assert (tmp_path / "ops-a.svg").read_text() == ".svg"


def test_an_empty_result_is_none(tmp_path: Path) -> None:
    kept = tmp_path / "logs" / "ops-a"
    code = f"import pathlib; pathlib.Path({str(kept)!r}).with_suffix('.json').touch()"
    assert run(tmp_path, part(code, kept=kept)).state == DONE
    assert not (tmp_path / "ops-a.json").exists()


@pytest.mark.parametrize("some_counts", [False, True])
def test_results_of_what_failed(tmp_path: Path, some_counts: bool) -> None:
    """They count only if they are of what did not."""
    path = tmp_path / "ops-a.json"
    code = f"import pathlib; pathlib.Path({str(path)!r}).write_text('x'); raise SystemExit(1)"
    assert run(tmp_path, part(code, some_counts=some_counts)).state == FAILED
    assert path.exists() == some_counts
    assert (tmp_path / "logs" / "ops-a-failed.json").exists() != some_counts


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is a worker of the tests that started it, interprets kernels, or sees a GPU that it should not."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SOMETHING", "1")
    run(tmp_path, part("import os; print(dict(os.environ))", environment={"MORE": "2"}))
    shown = (tmp_path / "logs" / "ops-a.log").read_text()
    assert "PYTEST_" not in shown
    assert "TRITON_INTERPRET" not in shown
    assert all(text in shown for text in ("'SOMETHING': '1'", "'MORE': '2'", "'CUDA_VISIBLE_DEVICES': ''"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    Runner(tmp_path, on_gpu=True).run(part("import os; print(dict(os.environ))"), "a")
    assert "'CUDA_VISIBLE_DEVICES': '3'" in (tmp_path / "logs" / "ops-a.log").read_text()
    assert os.environ["TRITON_INTERPRET"] == "1"
