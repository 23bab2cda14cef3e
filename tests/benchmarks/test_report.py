"""Tables and plots of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def record(contender: str, role: str, p50: float, case: str = "small", **more: Any) -> dict[str, Any]:
    times = {"p20_us": p50 - 1, "p50_us": p50, "p80_us": p50 + 1}
    return {"op": "pool", "case": case, "contender": contender, "role": role, **times, **more}


RECORDS = [
    record("ours bfloat16", "ours", 10.0, share_of_copy_bandwidth=0.5, least_bytes=16_500_000, host_us=7.25),
    record("ours float32", "ours", 16.0),
    record("theirs float32", "shipped", 80.0),
    record("theirs AMP", "tuned", 40.0),
    record("reference", "reference", 1000.0),
    record("ours float32", "ours", 5.0, case="alone"),
]
CONDITIONS = {"device": "a GPU", "torch": "2.11", "torchvision": "0.26", "triton": None, "date": "2026-01-02"}


def result(path: Path, records: list[dict[str, Any]]) -> Path:
    """A result file as pytest-benchmark writes it."""
    machine = CONDITIONS | {"copy_bandwidth": 3.3e12, "clocks": {}}
    content = {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [{"extra_info": r} for r in records],
    }
    path.write_text(json.dumps(content))
    return path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_summary() -> None:
    header, rule, *rows = cells(report.summary_table(RECORDS))
    assert header[-3:] == ["speed-up", "of the best", "bandwidth"]
    assert set("".join(rule)) == {"-", ":"}
    ours, theirs, best = "10.0 (ours bfloat16)", "80.0 (theirs float32)", "40.0 (theirs AMP)"
    assert rows[0] == ["pool, small", ours, theirs, best, "8.00x", "4.00x", "50%"]
    assert rows[1] == ["pool, alone", "5.0 (ours float32)", "-", "-", "-", "-", "-"]


def test_contenders() -> None:
    rows = cells(report.contenders_table(RECORDS))[2:]
    assert [row[0] for row in rows[:6]] == [
        "pool, small",
        "ours bfloat16",
        "ours float32",
        "theirs AMP",
        "theirs float32",
        "reference",
    ]
    assert rows[1][1:] == ["9.0", "10.0", "11.0", "7.2", "16.50", "5.0", "50%", "8.00x"]
    assert rows[5][1:] == ["999.0", "1,000.0", "1,001.0", "-", "-", "-", "-", "0.08x"]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()
    return capsys.readouterr().out


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = result(tmp_path / "a.json", RECORDS)
    printed = run(monkeypatch, capsys, path, "--svg", tmp_path / "a.svg")
    assert printed.startswith("a GPU, copy 3,300 GB/s, torch 2.11, torchvision 0.26, 012345678, 2026-01-02\n\n| case")
    drawn = (tmp_path / "a.svg").read_text()
    assert "<svg" in drawn
    for text in ("8.0x", "4.0x", "pool, small", "at its best", "a GPU"):
        assert f">{text}" in drawn
    assert "theirs AMP" in run(monkeypatch, capsys, path, "--all")
    other = result(tmp_path / "b.json", [record("ours bfloat16", "ours", 5.0), record("new", "ours", 1.0)])
    rows = cells(run(monkeypatch, capsys, path, other))
    assert ["pool, small, ours bfloat16", "10.0", "5.0", "2.00x"] in rows
    assert ["pool, small, new", "-", "1.0", "-"] in rows
    assert ["pool, small, theirs AMP", "40.0", "-", "-"] in rows


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"machine_info": {}}'])
def test_a_file_that_is_no_result(
    content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, tmp_path / "x.json")
    assert "x.json: not a result of `pytest benchmarks" in capsys.readouterr().err


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot(RECORDS[-1:], tmp_path / "x.svg", "")
