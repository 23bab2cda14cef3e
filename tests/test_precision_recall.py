import dataclasses
import importlib.util
import os
import re

import numpy as np
import pytest
from coco_problems import random_problem
from PIL import Image

from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.precision_recall import plot_precision_recall


@pytest.fixture(scope="module")
def problem():
    truth, results = random_problem(2)
    for category, name in zip(truth["categories"], ("cat", "_a $name$ <&>", "x" * 80, "without objects"), strict=True):
        category["name"] = name
    return truth, results


@pytest.fixture(scope="module")
def metrics(problem):
    return {iou_type: evaluate_coco(*problem, iou_type) for iou_type in ("bbox", "segm")}


def texts(path):
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))


def test_png(metrics, tmp_path):
    path = plot_precision_recall(metrics, tmp_path / "new" / "curves.PNG")
    assert os.listdir(path.parent) == ["curves.PNG"]
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 500  # two panels side by side
    dark_blue = (np.abs(picture.astype(int) - (8, 48, 107)).sum(-1) < 30).any(0)
    assert dark_blue[: len(dark_blue) // 2].any()
    assert dark_blue[len(dark_blue) // 2 :].any()


def test_svg_names_every_curve_with_its_ap_and_is_the_same_again(metrics, tmp_path):
    path = plot_precision_recall(metrics, tmp_path / "a.svg")
    found = texts(path)
    for iou_type, title in (("bbox", "Boxes"), ("segm", "Masks")):
        numbers = metrics[iou_type]
        assert f"{title} ({iou_type})" in found
        for ap, iou in ((numbers.ap, "0.50:0.95"), (numbers.ap50, "0.50"), (numbers.ap75, "0.75")):
            assert f"{ap:.3f}  IoU {iou}" in found
        assert f"{numbers.per_class['cat']:.3f}  cat" in found
        assert f"{numbers.per_class['_a $name$ <&>']:.3f}  _a $name$ &lt;&amp;&gt;" in found
    assert any(text.endswith("  " + "x" * 35 + "…") for text in found)
    assert not any("without objects" in text for text in found)
    again = plot_precision_recall(metrics, tmp_path / "b.svg")
    assert again.read_bytes() == path.read_bytes()


def test_the_curves_go_through_the_points_of_the_metrics(tmp_path):
    # Precision 1 up to recall 0.5, then 0.25: the AP of the legend is the area below.
    precision = np.broadcast_to(np.where(np.arange(101) <= 50, 1, 0.25)[:, None], (10, 101, 1))
    truth, results = random_problem(0)
    plain = dataclasses.replace(evaluate_coco(truth, results, "bbox", use_categories=False), precision=precision)
    text = plot_precision_recall({"bbox": plain}, tmp_path / "a.svg").read_text(encoding="utf-8")
    curves = [
        curve for curve in re.findall(r'<path d="([^"]+)"[^>]*stroke: #(?:08306b|4292c6|9ecae1)', text) if "L" in curve
    ]
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", max(curves, key=len)), dtype=float)
    x = (points[:, 0] - points[0, 0]) / np.ptp(points[:, 0])
    bottom = points[0, 1] + np.ptp(points[:, 1]) / 0.75
    y = (bottom - points[:, 1]) / (bottom - points[0, 1])
    assert np.interp([0, 0.25, 0.5, 0.51, 1], x, y) == pytest.approx([1, 1, 1, 0.25, 0.25], abs=1e-3)


def test_many_classes_or_one_are_not_drawn(problem, tmp_path):
    truth, results = problem
    ids = [category["id"] for category in truth["categories"]]
    one = {**truth, "annotations": [{**a, "category_id": ids[0]} for a in truth["annotations"]]}
    many = {**truth, "categories": [*truth["categories"], *({"id": i, "name": f"c{i}"} for i in range(100, 110))]}
    many["annotations"] = [{**a, "category_id": 100 + i % 10} for i, a in enumerate(truth["annotations"])]
    for case in (one, many):
        path = plot_precision_recall({"bbox": evaluate_coco(case, results, "bbox")}, tmp_path / "a.svg")
        assert sum(bool(re.match(r"-?\d\.\d{3}  ", text)) for text in texts(path)) == 3


def test_no_ground_truth_is_said(problem, tmp_path):
    truth, results = problem
    empty = evaluate_coco({**truth, "annotations": []}, results, "bbox")
    assert "no ground truth" in texts(plot_precision_recall({"bbox": empty}, tmp_path / "a.svg"))


def test_what_cannot_be_drawn(metrics, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\.png or an \.svg.*a\.pdf"):
        plot_precision_recall(metrics, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_precision_recall({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_precision_recall({"bbox": dataclasses.replace(metrics["bbox"], precision=None)}, tmp_path / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"fastmrcnn\[plot\]\""):
        plot_precision_recall(metrics, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
