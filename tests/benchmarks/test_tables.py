"""What README shows is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import CONDITIONS, cells, record, result

from benchmarks import tables
from benchmarks.collected import Results, collected
from benchmarks.targets import FORWARD, MANY_MASKS, TARGETS, Target

CPU = CONDITIONS | {"device": "x86_64, 2 threads", "cuda": None, "hip": None}
GPU = CONDITIONS | {"device": "NVIDIA H100", "cuda": "13.0", "hip": None}


def target(what: str) -> Target:
    (found,) = (target for target in TARGETS if f"{target.what}, against {target.against}".startswith(what))
    return found


def op(name: str, case: str, contender: str, role: str, us: float, share: float | None = None) -> dict[str, Any]:
    more = {} if share is None else {"share_of_copy_bandwidth": share}
    return record(contender, role, us, case, **more) | {"op": name}


def way(us: float, ratio: float = 1.0) -> dict[str, Any]:
    return {"p50_us": us, "speedup": {"p50": ratio}}


def detection(size: str, batch: int, masks: str, **ways: dict[str, Any]) -> dict[str, Any]:
    contenders = {name.replace("_", " "): found for name, found in ways.items()}
    return {"model": "R50", "size": size, "batch": batch, "masks": masks, "contenders": contenders}


def step(us: float) -> dict[str, Any]:
    return {"stages": {"step": {"p50_us": us}}, "peak_memory": 1 << 30}


def test_speed_of_operations() -> None:
    """The slowest ratio of all cases, ours of 16 bits, and torchvision's fastest."""
    forward = []
    for case, us in zip(FORWARD, (10.0, 5.0), strict=True):
        forward += [
            op("roi_align forward", case, "fastmrcnn float32", "ours", 1.0, 0.9),
            op("roi_align forward", case, "fastmrcnn float16", "ours", us, 0.4),
            op("roi_align forward", case, "torchvision float32", "shipped", 500.0),
            op("roi_align forward", case, "torchvision AMP", "tuned", 85.0),
        ]
    aim = target("RoIAlign forward")
    assert aim.measure(Results("", True, ops=forward)) == ("8.5x / 17.0x, 2.5x / 2.5x the floor", True)
    assert aim.measure(Results("", False, ops=forward)) is None
    assert aim.measure(Results("", True, ops=forward[:4])) is None
    forward[1]["p50_us"] = 11.0
    assert aim.measure(Results("", True, ops=forward)) == ("7.7x / 17.0x, 2.5x / 2.5x the floor", False)
    forward[1]["p50_us"] = 10.0
    forward[5]["share_of_copy_bandwidth"] = 0.25
    assert aim.measure(Results("", True, ops=forward)) == ("8.5x / 17.0x, 2.5x / 4.0x the floor", False)


def test_ours_is_what_does_the_same() -> None:
    pasting = [
        op("paste", MANY_MASKS[0], "fastmrcnn bits", "variant", 1.0, 0.9),
        op("paste", MANY_MASKS[0], "fastmrcnn soft", "ours", 100.0, 0.8),
        op("paste", MANY_MASKS[0], "torchvision", "shipped", 20_000.0),
    ]
    aim = target(f"pasting {MANY_MASKS[0]}, against torchvision")
    assert aim.measure(Results("", True, ops=pasting)) == ("200.0x, 1.2x the floor", True)


def test_speed_of_detections() -> None:
    ways = {
        "torchvision": way(30_000.0),
        "torchvision_AMP": way(20_000.0),
        "fastmrcnn": way(1.0),
        "fastmrcnn_engine_float16": way(2_400.0),
    }
    single = target("detection, R50-FPN, 800x1333, batch 1")
    fast = detection("800x1333", 1, "none", **ways)
    slow = detection("800x1333", 1, "bool", **ways | {"fastmrcnn_engine_float16": way(2_600.0)})
    assert single.measure(Results("", True, detections=[fast, fast | {"masks": "bool"}])) == (
        "8.3x / 8.3x, 2.4 / 2.4 ms",
        True,
    )
    assert single.measure(Results("", True, detections=[fast, slow])) == ("8.3x / 7.7x, 2.4 / 2.6 ms", False)
    assert single.measure(Results("", True, detections=[fast])) is None
    assert single.measure(Results("", False, detections=[fast, slow])) is None
    broken = detection("800x1333", 1, "bool", **ways | {"fastmrcnn_engine_float16": {"error": "no"}})
    assert single.measure(Results("", True, detections=[fast, broken])) is None
    best = detection("800x1333", 1, "bool", **ways | {"detectron2's_pasting": way(12_000.0)})
    assert single.measure(Results("", True, detections=[fast, best])) == ("8.3x / 5.0x, 2.4 / 2.4 ms", False)
    assert target("detection, R50-FPN, 800x1333, batch 8").measure(Results("", True, detections=[fast])) is None
    ways = {"torchvision": way(3e6), "fastmrcnn_engine_float32": way(2e6, 1.4)}
    results = Results("", False, detections=[detection("480x640", 1, "soft", **ways)])
    assert target("detection on a CPU").measure(results) == ("1.40x", True)


def test_speed_of_training() -> None:
    contenders = {"fastmrcnn bfloat16": step(40_000.0), "torchvision AMP channels_last": step(160_000.0)}
    case = {"model": "R50", "batch": 8, "size": [800, 1333], "contenders": contenders}
    assert target("training step").measure(Results("", True, steps=[case])) == ("4.0x, 200 img/s", True)
    broken = case | {"contenders": contenders | {"fastmrcnn bfloat16": {"error": "learns something else"}}}
    assert target("training step").measure(Results("", True, steps=[broken])) is None
    contenders["fastmrcnn bfloat16"] = step(50_000.0)
    assert target("training step").measure(Results("", True, steps=[case])) == ("3.2x, 160 img/s", False)
    assert target("training step").measure(Results("", False, steps=[case])) is None


def test_missed_targets_say_so() -> None:
    ways = {"torchvision": way(3e6), "fastmrcnn_engine_float32": way(2e6, 1.2)}
    slow = Results("", False, detections=[detection("480x640", 1, "soft", **ways)])
    rows = {row[0]: row[-2:] for row in cells(tables.targets_table([slow]))}
    assert rows["detection on a CPU, R50-FPN, float32, soft masks"] == ["1.20x", "**missed**"]
    assert rows["training step, R50-FPN, 800x1333, batch 8"] == ["not measured", "open"]
    ways["fastmrcnn_engine_float32"] = way(2e6, 1.3)
    fast = Results("", False, detections=[detection("480x640", 1, "soft", **ways)])
    rows = {row[0]: row[-2:] for row in cells(tables.targets_table([fast]))}
    assert rows["detection on a CPU, R50-FPN, float32, soft masks"] == ["1.30x", "met"]


def folder(path: Path, conditions: dict[str, Any]) -> Path:
    """Results of all kinds."""
    small, large = op("nms", "10", "ours", "ours", 1.0), op("nms", "1000", "ours", "ours", 10.0)
    result(path / "ops-nms.json", [small, op("nms", "10", "theirs", "shipped", 3.0)])
    result(path / "ops-more.json", [large, op("nms", "1000", "theirs", "shipped", 20.0)])
    for file in path.glob("ops-*.json"):
        content = json.loads(file.read_text())
        content["machine_info"] |= conditions | {"device": f"{conditions['device']} of a brand"}
        file.write_text(json.dumps(content))
    ways = {"torchvision": way(3e6), "fastmrcnn": way(2e6, 1.5), "broken": {"error": "no"}}
    cases = [detection("480x640", n, "soft", **ways) for n in (1, 8)]
    contenders = {"fastmrcnn float32": step(4e5), "torchvision float32": step(8e5), "other": {"error": "no"}}
    steps = [{"model": "R50", "batch": 2, "size": [240, 320], "contenders": contenders}]
    inputs = {"images": 100, "size": [480, 640], "detections": 100, "batch": 1}
    evaluation = {"torchvision": way(9e6), "fastmrcnn": way(3e6), "speedup": {"p50": 3.1}, "inputs": inputs}
    epochs = [{"epoch": 1}, {"epoch": 2, "metrics": {"bbox": {"AP": 0.5}, "segm": {"AP": 0.25}}}]
    runs = {name: {"epochs": epochs} for name in ("fastmrcnn", "torchvision")}
    seconds = {"fastmrcnn": {"p50": 0.25}, "torchvision": {"p50": 0.5}, "speedup": {"p50": 2.1}}
    contents = {
        "detection-a": {"cases": cases[:1]},
        "detection-b": {"cases": cases[1:]},
        "training-a": {"cases": steps},
        "evaluation": evaluation,
        "runs-nuclei-float32": {"runs": runs, "seconds_per_image": seconds},
    }
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content | {"conditions": conditions}))
    return path


def test_tables(tmp_path: Path) -> None:
    results = collected(folder(tmp_path, CPU))
    assert results is not None
    assert results.device == "x86_64, 2 threads of a brand, torch 2.11, torchvision 0.26, 2026-01-02"
    _, rule, row = cells(tables.ops_table(results))
    assert row == ["nms, 1000", "10.0 (ours)", "20.0 (theirs)", "20.0 (theirs)", "2.00x", "2.00x", "-"]
    (waterfall,) = tables.waterfalls(results)
    assert cells(waterfall)[2:] == [
        ["torchvision", "3,000.0 (1.00x)", "3,000.0 (1.00x)"],
        ["fastmrcnn", "2,000.0 (1.50x)", "2,000.0 (1.50x)"],
        ["broken", "does not run", "does not run"],
    ]
    assert cells(waterfall)[0] == ["R50, masks: soft; ms (times faster)", "1 x 480x640", "8 x 480x640"]
    assert cells(tables.steps_table(results))[2:] == [
        ["fastmrcnn float32", "5.00 (2.00x), 1.00 GiB"],
        ["torchvision float32", "2.50 (1.00x), 1.00 GiB"],
        ["other", "learns something else"],
    ]
    assert cells(tables.evaluation_table(results))[2:] == [
        ["torchvision", "9.0", "1.00x"],
        ["fastmrcnn", "3.0", "3.10x"],
    ]
    assert cells(tables.runs_table(results))[2:] == [
        ["fastmrcnn float32", "0.500", "0.250", "4.00", "2.10x"],
        ["torchvision float32", "0.500", "0.250", "2.00", "1.00x"],
    ]
    text = tables.tables([results])
    assert text.count("### ") == 1
    assert rule[0].startswith("-")


def test_results_of_several_devices_are_not_mixed(tmp_path: Path) -> None:
    folder(tmp_path, CPU)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    for changed in ({"conditions": GPU}, {"conditions": CPU | {"torch": "2.15"}}):
        (tmp_path / "evaluation.json").write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match="several devices or versions"):
            collected(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert collected(tmp_path) is None
    assert tables.tables([Results("nothing", False)]).endswith("### nothing")
    with pytest.raises(ValueError, match="no detection was measured"):
        tables.plot(Results("nothing", False), tmp_path / "x.svg")


def test_plot(tmp_path: Path) -> None:
    results = collected(folder(tmp_path, CPU))
    assert results is not None
    tables.plot(results, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert "2,000.0 (1.50x)" in drawn
    assert "broken" not in drawn


def test_replaced() -> None:
    text = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
    assert tables.replaced(text, "new") == f"a\n{tables.BEGIN}\nnew\n{tables.END}\nb\n"
    for wrong in ("", text + text, text.replace(tables.BEGIN, ""), text.replace(tables.END, "")):
        with pytest.raises(ValueError, match="once each, in this order"):
            tables.replaced(wrong, "new")


def test_readme_shows_what_was_measured() -> None:
    """`python -m benchmarks.tables` would change nothing."""
    text = tables.README.read_text(encoding="utf-8")
    assert tables.replaced(text, tables.tables(tables.committed())) == text
