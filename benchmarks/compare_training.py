"""Training to the end, ours and torchvision's in turn: do both become as good, and how long does each take?

    python -m benchmarks.compare_training --config configs/nuclei_small.yaml --epochs 10
    python -m benchmarks.compare_training --data.train_images photos --data.train_annotations photos.json ...

The options are those of `fastmrcnn train`.  Ours is `fastmrcnn.train` itself, into the folder `output`.  torchvision's
is the loop of its reference scripts, with its own detector from the same initial weights: float32 images and byte masks
from a DataLoader, resized by the model; the same batches in the same order with the same augmentation, learning rate of
each step, momentum, decay and clipping, average of the weights, and as many loading processes.  Only the anchors and
proposals that are sampled are others, and, if there are several, the sizes that images are resized to.

The two take turns, epoch by epoch, in one process, so that a machine whose speed drifts is as slow for both.  After
each epoch OUTPUT/comparison.json and comparison.svg hold what there is so far: losses, average precision by the same
evaluation, and seconds per image of training alone, data loading included.  Asked to end, by SIGTERM, the run does so
after the epoch, and `--resume auto` goes on with it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from benchmarks.measure import PERCENTILES, conditions
from benchmarks.training_steps import TorchvisionLearner, as_torchvision, on_device
from fastmrcnn import train
from fastmrcnn.data import DetectionDataset, Key, collate
from fastmrcnn.data.sampling import mixed_seed
from fastmrcnn.data.types import Target
from fastmrcnn.distributed import world_size
from fastmrcnn.evaluate import evaluate
from fastmrcnn.files import write_atomically, write_json
from fastmrcnn.train import Metrics, TrainConfig, Training
from fastmrcnn.training.augmentation import transforms
from fastmrcnn.training.failures import EXIT_STATUS
from fastmrcnn.training.optim import WeightAverage, build_optimizer
from fastmrcnn.training.progress import say, summary_line
from fastmrcnn.training.state import Stateful
from fastmrcnn.training.step import seed_all

OURS, THEIRS = "fastmrcnn", "torchvision"
COLORS = {OURS: "#08519c", THEIRS: "#e6550d"}
TITLES: dict[str, str] = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}


class FloatItems(Dataset[tuple[Tensor, Target]]):
    """Items of a data set by `Key`, augmented as `TrainingItems` does it: float32 images and targets."""

    def __init__(self, dataset: DetectionDataset, config: TrainConfig) -> None:
        self.dataset, self.seed = dataset, config.seed
        self.transforms = transforms(config.augment, dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, key.epoch, key.position))
            image, target = self.dataset[key.item]
            if self.transforms is not None:
                image, target = self.transforms(image, target)
        return functional.to_dtype(image, torch.float32, scale=True), target


class TorchvisionTraining:
    """torchvision's detector, trained by the loop of its reference scripts.

    Args:
        ours: the run to do as; the weights are copied, so it must not have begun.
        train_set: what is learned.
    """

    def __init__(self, ours: Training, train_set: DetectionDataset) -> None:
        config = self.config = ours.config
        self.ours, self.device = ours, ours.device
        self.model = as_torchvision(ours.model).to(memory_format=torch.contiguous_format)
        optimizer = build_optimizer(self.model, config.optim, ours.lr)
        self.learner = TorchvisionLearner(self.model, optimizer, config.precision, config.optim.clip_norm)
        average = config.optim.ema
        self.average = None if average is None else WeightAverage(self.model, average)
        self.sizes = self.model.transform.min_size, tuple(config.augment.min_sizes or self.model.transform.min_size)
        self.batches = copy.copy(ours.batches)
        workers = config.data.workers
        self.loader = DataLoader(
            FloatItems(train_set, config),
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )
        self.step = 0
        self.losses: list[dict[str, float]] = []

    def train_epoch(self, epoch: int, end: int) -> None:
        """The steps of an epoch, from 0, up to step `end` of the run; their losses are appended to `losses`.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        self.model.train()
        self.model.transform.min_size = self.sizes[1]  # of which it takes one at random
        self.batches.set_position(epoch)
        for images, targets in self.loader:
            if self.step == end:
                break
            for group in self.learner.optimizer.param_groups:
                group["lr"] = self.ours.lr * self.ours.factor(self.step)
            seed_all(self.config.seed, self.step)
            losses = self.learner.learn(*on_device(images, targets, self.device))
            if self.average is not None:
                self.average.update(self.model)
            self.losses.append({name: loss.item() for name, loss in losses.items()})
            self.step += 1
            if not all(map(math.isfinite, self.losses[-1].values())):
                raise FloatingPointError(f"torchvision's losses of step {self.step} are not finite: {self.losses[-1]}")

    @contextlib.contextmanager
    def measured(self) -> Iterator[nn.Module]:
        """The model as it is evaluated: of average weights, if there are such, and resizing to one size."""
        self.model.transform.min_size = self.sizes[0]
        with contextlib.nullcontext() if self.average is None else self.average.swapped(self.model):
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        """All that an epoch changes."""
        learner, average = self.learner, self.average
        stored = {"model": self.model, "optimizer": learner.optimizer, "scaler": learner.scaler, "average": average}
        states = {name: part.state_dict() for name, part in stored.items() if part is not None}
        return states | {"step": self.step, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.losses = state["step"], list(state["losses"])


class Comparison(Training):
    """Our run, whose epochs take turns with those of torchvision's."""

    def __init__(self, config: TrainConfig, train_set: DetectionDataset, *rest: Any) -> None:
        refuse(config)
        super().__init__(config, train_set, *rest)
        self.theirs = TorchvisionTraining(self, train_set)
        self.losses: list[dict[str, Tensor]] = []
        self.epochs_of: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}

    def parts(self) -> dict[str, Stateful]:
        """Both runs, and what is known of them."""
        return {**super().parts(), "theirs": self.theirs, "comparison": self}

    def state_dict(self) -> dict[str, Any]:
        """What is known of both."""
        return {"losses": self.losses_of_ours(), "epochs": self.epochs_of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.losses = [{name: torch.tensor(value) for name, value in step.items()} for step in state["losses"]]
        self.epochs_of = {name: list(epochs) for name, epochs in state["epochs"].items()}

    def asked_to_end(self, due: bool) -> bool:
        """Not within an epoch."""
        return False

    def train_epoch(self) -> None:
        """An epoch of each; who begins alternates."""
        epoch = self.progressed.epoch
        end = min(self.steps, (epoch + 1) * self.progressed.steps_per_epoch)
        turns: dict[str, Callable[[], None]] = {
            OURS: super().train_epoch,
            THEIRS: partial(self.theirs.train_epoch, epoch, end),
        }
        first = self.progressed.step
        if first == end:  # the run was ended while it was measured
            return
        for name in list(turns) if epoch % 2 == 0 else list(reversed(turns)):
            self.synchronize()
            started = time.perf_counter()
            turns[name]()
            self.synchronize()
            seconds = time.perf_counter() - started
            images = (end - first) * self.config.batch_size
            self.epochs_of[name].append({"epoch": epoch + 1, "step": end, "seconds_per_image": seconds / images})

    def note(self, values: dict[str, Tensor], image_ids: list[int]) -> None:
        """Keep the losses of a step, on the device."""
        super().note(values, image_ids)
        self.losses.append({name: value for name, value in values.items() if name.startswith("loss")})

    def measure(self, val_set: DetectionDataset) -> tuple[Metrics, dict[str, Image.Image]]:
        """Average precision of both; returns that of ours."""
        of_ours, pictures = super().measure(val_set)
        with self.theirs.measured() as model:
            of_theirs = evaluate(
                model,
                val_set,
                batch_size=self.config.batch_size,
                max_detections=self.config.max_detections,
                workers=self.config.data.workers,
            )
        for name, metrics in ((OURS, of_ours), (THEIRS, of_theirs)):
            self.epochs_of[name][-1]["metrics"] = {kind: found.as_dict() for kind, found in metrics.items()}
        say(f"{THEIRS}, {summary_line(self.progressed.epoch + 1, of_theirs)}")
        return of_ours, pictures

    def end_epoch(self) -> None:
        """Measure both, and write down how they compare."""
        super().end_epoch()
        result = self.result()
        write_json(self.config.output / "comparison.json", result)
        write_atomically(self.config.output / "comparison.svg", partial(plot, result))
        say(f"seconds per image: {result['seconds_per_image']}")
        if self.termination.came and self.progressed.epoch < self.epochs:
            say(f"asked to end: {self.last_path} is of epoch {self.progressed.epoch}; resume=auto goes on")
            raise SystemExit(EXIT_STATUS)

    def losses_of_ours(self) -> list[dict[str, float]]:
        """Of each step."""
        return [{name: loss.item() for name, loss in step.items()} for step in self.losses]

    def result(self) -> dict[str, Any]:
        """All that is known so far, for JSON."""
        losses = {OURS: self.losses_of_ours(), THEIRS: self.theirs.losses}
        return {
            "runs": {name: {"epochs": self.epochs_of[name], "losses": losses[name]} for name in (OURS, THEIRS)},
            "seconds_per_image": self.seconds_per_image(),
            "inputs": described(self.config, len(self.theirs.loader.dataset)),
            "conditions": conditions(),
        }

    def seconds_per_image(self) -> dict[str, dict[str, float]]:
        """Percentiles over epochs, of each and of torchvision's over ours in the same epoch."""
        times = {
            name: torch.tensor([epoch["seconds_per_image"] for epoch in epochs], dtype=torch.float64)
            for name, epochs in self.epochs_of.items()
        }
        times["speedup"] = times[THEIRS] / times[OURS]
        return {
            name: {f"p{p}": round(torch.quantile(values, p / 100).item(), 4) for p in PERCENTILES}
            for name, values in times.items()
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def refuse(config: TrainConfig) -> None:
    """Raise ValueError for what torchvision's loop does not do."""
    refused = {
        "several processes": world_size() > 1,
        "checkpoint_every": config.checkpoint_every is not None,
        "patience": config.patience is not None,
        "optim.accumulate": config.optim.accumulate != 1,
        "augment.jitter": config.augment.jitter is not None,
    }
    wrong = [name for name, found in refused.items() if found]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: torchvision's loop does not do that, leave it out")


def described(config: TrainConfig, images: int) -> dict[str, Any]:
    """The options that matter, without the folders of this machine."""
    kept = ("model", "augment", "optim", "epochs", "steps", "batch_size", "precision", "max_detections", "seed")
    options = json.loads(json.dumps({name: asdict(config)[name] for name in kept}, default=str))
    data = {"train_annotations": config.data.train_annotations.name, "workers": config.data.workers, "images": images}
    return options | {"data": data}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The losses of both, their sum averaged over each epoch, and the average precisions, as an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = list(
        dict.fromkeys(kind for run in result["runs"].values() for e in run["epochs"] for kind in e.get("metrics", {}))
    )
    with mpl.rc_context({"svg.hashsalt": "fastmrcnn", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4 * (1 + len(kinds)), 3.6), layout="constrained")
        panels = figure.subplots(1, 1 + len(kinds), squeeze=False)[0]
        for name, run in result["runs"].items():
            epochs, totals = run["epochs"], torch.tensor([sum(step.values()) for step in run["losses"]])
            means = [part.mean().item() for part in totals.tensor_split([epoch["step"] for epoch in epochs[:-1]])]
            style: dict[str, Any] = {"color": COLORS[name], "marker": ".", "label": name}
            panels[0].plot([epoch["epoch"] for epoch in epochs], means, **style)
            measured = [epoch for epoch in epochs if "metrics" in epoch]
            for panel, kind in zip(panels[1:], kinds, strict=True):
                panel.plot([e["epoch"] for e in measured], [e["metrics"][kind]["AP"] for e in measured], **style)
        for panel, title in zip(panels, ["loss", *(TITLES[kind] for kind in kinds)], strict=True):
            panel.set(xlabel="epoch", title=title)
            panel.set_ylim(bottom=0)
            panel.grid(color="#e6e6e6")
        times = result["seconds_per_image"]
        figure.suptitle(
            ", ".join(f"{name} {times[name]['p50']:.3g} s per image" for name in (OURS, THEIRS))
            + f", {times['speedup']['p50']:.2f}x; {result['conditions']['device']}",
            fontsize=9,
        )
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path, metadata={"Date": None})


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The options of the command line, or `arguments`."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it")
    parser.add_class_arguments(TrainConfig, None, as_group=False)
    options = dict(vars(parser.instantiate(parser.parse_args(arguments))))
    options.pop("config", None)
    return TrainConfig(**options)


def main() -> None:
    """Run the comparison of the command line."""
    config = parse()
    with mock.patch.object(train, "Training", Comparison):
        train.run(config)


if __name__ == "__main__":
    main()
