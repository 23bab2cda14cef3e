import os
import re
import struct
import sys
import time

import pytest
import torch
from coco_problems import random_problem

import fastmrcnn.training.progress
from fastmrcnn.coco_eval import evaluate_coco
from fastmrcnn.training.best import Best, main_metric
from fastmrcnn.training.progress import Progress, say, status, summary_line
from fastmrcnn.training.speed import Speed, Speedometer, peak_memory

RECORD = {
    "losses": {
        "loss_objectness": 0.5,
        "loss_rpn_box_reg": 0.25,
        "loss_classifier": 1.0,
        "loss_box_reg": 0.125,
        "loss_mask": 2.0,
        "loss_keypoint": 4.0,
        "loss_of_mine": 8.0,
    },
    "lr": 0.0125,
    "skipped": 0,
    "images_per_second": 83.25,
    "data_wait": 0.071,
    "peak_memory_mb": 2560.0,
}
STATUS = (
    "loss 15.875 obj 0.500 rpn 0.250 cls 1.000 box 0.125 mask 2.000 kpt 4.000 of_mine 8.000 "
    "83.2 img/s data 7% lr 0.013 2.5 GiB"
)


@pytest.fixture
def terminal(monkeypatch):
    """Make stderr and stdout a terminal of a given width; returns a function that says what it was sent since."""
    fcntl = pytest.importorskip("fcntl", reason="terminals like this are POSIX")
    termios = pytest.importorskip("termios", reason="terminals like this are POSIX")
    opened = []

    def make(columns):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        file = os.fdopen(theirs, "w")
        opened.extend([file, os.fdopen(ours, "rb", buffering=0)])
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(sys, "stdout", file)

        def sent():
            file.write("<end>")
            file.flush()
            text = b""
            while not text.endswith(b"<end>"):
                text += os.read(ours, 1 << 16)
            return text.decode().removesuffix("<end>").replace("\r\n", "\n")

        return sent

    yield make
    for file in opened:
        file.close()


def test_a_terminal_shows_a_bar_that_messages_leave_whole(terminal):
    sent = terminal(220)
    with Progress("epoch 3/26", 8, first=2) as progress:
        first = sent()
        progress.update(3)
        progress.show(RECORD)
        say("a message")
        middle = sent()
    assert re.search(r"^\repoch 3/26 +25%\|.+\| 2/8 \[00:00<", first)
    # The bar is wiped, the message has a line of its own, and the bar is there again with the numbers.
    wiped, shown = re.fullmatch(r"\r( *)\ra message\n\r(.+)", middle, re.DOTALL).groups()
    assert len(wiped) > 100
    assert re.fullmatch(r"epoch 3/26 +62%\|.+\| 5/8 \[00:00<\d\d:\d\d\], " + re.escape(STATUS) + " *", shown)
    assert sent().endswith("\n")


def test_a_narrow_terminal_has_the_time_left_and_the_loss_in_one_line(terminal):
    sent = terminal(80)
    with Progress("epoch 3/26", 8) as progress:
        progress.update(4)
        progress.show(RECORD)
    line = sent().rstrip("\n").split("\r")[-1]
    assert re.match(r"epoch 3/26 +50%\|.+\| 4/8 \[00:00<00:00\], loss 15.875 obj 0.500", line)
    assert len(line) <= 80


def test_a_terminal_that_has_no_size_gets_lines(terminal):
    sent = terminal(0)
    with Progress("epoch 1/2", 8) as progress:
        progress.update()
        progress.show(RECORD)
    assert re.fullmatch(r"epoch 1/2 step 1/8 .+GiB\n", sent())


def test_without_a_terminal_each_reading_is_a_line(capfd, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("epoch 3/26", 20, first=4) as progress:
        for _ in range(2):
            progress.update(4)
            now[0] += 30
            progress.show(RECORD)
        say("a message")
        progress.update(8)
    out, err = capfd.readouterr()
    assert out == "a message\n"
    # 4 steps in 30 seconds leave 12 to do, in 90 seconds; then 8 in 60.
    assert err.splitlines() == [
        f"epoch 3/26 step 8/20 [00:30<01:30], {STATUS}",
        f"epoch 3/26 step 12/20 [01:00<01:00], {STATUS}",
    ]


def test_other_processes_are_silent(terminal, monkeypatch):
    monkeypatch.setattr(fastmrcnn.training.progress, "rank", lambda: 1)
    sent = terminal(100)
    with Progress("epoch 1/2", 8) as progress:
        progress.update()
        progress.show(RECORD)
        say("a message")
    assert sent() == ""


def test_status():
    assert status(RECORD) == STATUS
    lost = {**RECORD, "losses": {"loss_mask": None}, "skipped": 3, "peak_memory_mb": None}
    assert status(lost) == "loss - skipped 3 83.2 img/s data 7% lr 0.013"
    assert status({**lost, "losses": {}, "skipped": 0}).startswith("loss - 83.2")


@pytest.fixture(scope="module")
def metrics():
    problem = random_problem(2)
    return {iou_type: evaluate_coco(*problem, iou_type) for iou_type in ("bbox", "keypoints", "segm")}


def test_summary_line(metrics):
    box, points, mask = (f"{kind} AP {numbers.ap:.3f} AP50 {numbers.ap50:.3f}" for kind, numbers in metrics.items())
    assert summary_line(7, metrics) == f"epoch 7: {box}, {points}, {mask}"


def test_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def loader():
        for images in (4, 4, 2):
            now[0] += 0.5
            yield images

    speedometer = Speedometer("cpu")
    now[0] = 50.0  # such as an evaluation: watch starts anew
    speeds = []
    for images in speedometer.watch(loader()):
        now[0] += 1.5
        speedometer.count(images)
        if images == 4:
            speeds.append(speedometer.read())
    now[0] += 2.0
    speeds.append(speedometer.read())
    assert [speed[:2] for speed in speeds] == [(2.0, 0.25), (2.0, 0.25), (0.5, 0.125)]
    assert speedometer.read()[:2] == (0.0, 0.0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_memory_of_the_process():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**27, dtype=torch.uint8)  # 128 MiB, written
    assert 100 < before < 100_000
    assert before <= peak_memory(torch.device("cpu")) < before + 256
    assert Speedometer("cpu").read() == Speed(0.0, 0.0, pytest.approx(peak_memory(torch.device("cpu")), rel=0.1))
    del held


def test_main_metric(metrics):
    assert main_metric(metrics) == metrics["segm"].ap
    assert main_metric({kind: metrics[kind] for kind in ("bbox", "keypoints")}) == metrics["keypoints"].ap
    assert main_metric({"bbox": metrics["bbox"]}) == metrics["bbox"].ap


def scored(metrics, ap):
    numbers = metrics["segm"]
    return {"bbox": metrics["bbox"], "segm": type(numbers)("segm", 100, (ap, *numbers.stats[1:]))}


def test_best_and_patience(metrics):
    best = Best(patience=2)
    seen = []
    for evaluation, ap in enumerate((-1.0, 0.2, 0.2, 0.3, 0.1, 0.3, 0.4)):
        if evaluation == 5:  # of a resumed run
            state, best = best.state_dict(), Best(patience=2)
            best.load_state_dict(state)
        seen.append((best.improved(scored(metrics, ap)), best.exhausted()))
    expected = [True, True, False, True, False, False, True]
    assert [better for better, _ in seen] == expected
    assert [end for _, end in seen] == [False, False, False, False, False, True, False]
    patient = Best()
    for _ in range(100):
        patient.improved(scored(metrics, 0.5))
    assert not patient.exhausted()
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        Best(patience=0)
