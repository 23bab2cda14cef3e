import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_evaluate import Echo, Repeating

import fastmrcnn.results_file
from fastmrcnn.data import Shapes
from fastmrcnn.distributed import all_gather, broadcast, process_group, rank, world_size
from fastmrcnn.evaluate import EvaluateConfig, evaluate, run

ROOT = Path(__file__).resolve().parents[1]


def evaluate_everything(folder, name):
    """All that is compared between one process and several: files, numbers and what the model was shown."""
    shapes = Shapes(length=7, image_size=(64, 64), seed=0)
    found = {}
    for case, dataset in (("plain", shapes), ("repeating", Repeating(shapes)), ("one", Shapes(1, image_size=(64, 64)))):
        for backend in ("pycocotools", "faster_coco_eval"):
            model = Echo(shapes if len(dataset) > 1 else dataset, limit=2)
            path = folder / f"{name}_{case}_{backend}.json"
            metrics = evaluate(
                model, dataset, batch_size=2, max_detections=2, results_path=path, backend=backend, progress=False
            )
            found[case, backend] = metrics, model.calls
    path = folder / f"{name}_plain_pycocotools.json"
    run(EvaluateConfig(annotations=folder / "annotations.json", results=path, plot=folder / f"{name}.svg"))
    return found


def main(folder):
    """What each of several processes does."""
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert world_size() == 2
        assert all_gather(rank()) == [0, 1]
        assert broadcast(rank()) == 0
        with process_group("cpu"):  # joined already: nothing happens, not even at its end
            pass
        assert world_size() == 2
        fastmrcnn.results_file._CHUNK = 3  # of the four images that rank 0 has: two rounds
        found = evaluate_everything(folder, "several")
        (folder / f"{rank()}.pickle").write_bytes(pickle.dumps(found))
    assert world_size() == 1


@pytest.mark.filterwarnings("ignore:1 images of the annotations")
def test_two_processes_give_the_numbers_and_the_file_of_one(tmp_path, capsys):
    (tmp_path / "annotations.json").write_text(json.dumps(Shapes(length=7, image_size=(64, 64), seed=0).coco))
    alone = evaluate_everything(tmp_path, "alone")
    printed = capsys.readouterr().out.count("Average Precision")
    places = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*launcher, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    found = [pickle.loads((tmp_path / f"{i}.pickle").read_bytes()) for i in range(2)]
    for case, (metrics, calls) in alone.items():
        assert found[0][case][0] == found[1][case][0] == metrics
        assert metrics["segm"].ap > 0
        # Each image goes to one process: 4 and 3 of 7, and none is added to make the shares equal.
        assert [sum(ranks[case][1]) for ranks in found] == [-(-sum(calls) // 2), sum(calls) // 2]
        name = "_".join(case)
        assert (tmp_path / f"several_{name}.json").read_bytes() == (tmp_path / f"alone_{name}.json").read_bytes()
    assert process.stdout.count("Average Precision") == printed > 0
    assert process.stderr.count("1 images of the annotations") == 1  # of rank 0
    assert (tmp_path / "several.svg").read_bytes() == (tmp_path / "alone.svg").read_bytes()


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert (rank(), world_size()) == (0, 1)
        assert all_gather("a") == ["a"]
        assert broadcast("a") == "a"
        assert not torch.distributed.is_initialized()


def test_several_processes_cannot_share_a_gpu(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("3", "4", "3", "4", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes need as many GPUs, there are 2"), process_group("cuda"):
        pytest.fail("must not be entered")
    with pytest.raises(ValueError, match="give cuda, not cuda:1"), process_group("cuda:1"):
        pytest.fail("must not be entered")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
