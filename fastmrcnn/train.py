"""Train a detector: read top to bottom.

    python -m fastmrcnn.train --recipe small --data.train_images photos --data.train_annotations photos.json
    torchrun --nproc-per-node 8 -m fastmrcnn.train --config configs/nuclei.yaml --resume auto

`run` makes datasets of files, `train` trains on any datasets, `Training` is the loop: steps that never wait for the
device, readings of their losses every so often, checkpoints, and average precision after epochs.  The rooms of
`fastmrcnn.training` hold the options, a step, checkpoints, and what is written down.  A run leaves in its folder

    config.json    what to pass as --config to do it again
    metrics.jsonl  losses, speed and average precision
    last.pt        where it stands: --resume auto goes on from there, after a crash as after the end
    best.pt        the best model so far
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastmrcnn.checkpoints import ModelInfo, save_checkpoint
from fastmrcnn.checkpoints.initial import load_weights
from fastmrcnn.coco_metrics import CocoMetrics
from fastmrcnn.coco_records import IouType
from fastmrcnn.data import CocoDetection, DetectionDataset
from fastmrcnn.data.items import TrainingItems
from fastmrcnn.data.loading import Prefetcher, training_loader
from fastmrcnn.data.sampling import TrainingBatches, repeat_factors
from fastmrcnn.distributed import all_gather, process_group, rank, share_buffers, world_size
from fastmrcnn.evaluate import evaluate
from fastmrcnn.files import write_json
from fastmrcnn.inference import default_device
from fastmrcnn.models.config import build_model
from fastmrcnn.training.augmentation import transforms, view
from fastmrcnn.training.best import Best
from fastmrcnn.training.capture import CapturedLearner
from fastmrcnn.training.config import AugmentConfig, DataConfig, LogConfig, OptimConfig, TrainConfig
from fastmrcnn.training.dashboards import check_log, validation_pictures
from fastmrcnn.training.failures import EXIT_STATUS, Termination, describe_nonfinite, explaining_memory
from fastmrcnn.training.optim import (
    WeightAverage,
    build_optimizer,
    explained,
    learning_rate,
    schedule_factor,
    stretched,
)
from fastmrcnn.training.progress import Progress, say, summary_line
from fastmrcnn.training.readings import Reading, Readings
from fastmrcnn.training.records import Records
from fastmrcnn.training.speed import Speedometer
from fastmrcnn.training.state import Progressed, Stateful, load_state, save_state
from fastmrcnn.training.step import Learner, seed_all

MOST_LEFT_OUT = 50
"""Steps in a row that are not finite after which a run ends in any case: it does not learn any more."""

Metrics = dict[IouType, CocoMetrics]

__all__ = ["AugmentConfig", "DataConfig", "LogConfig", "OptimConfig", "TrainConfig", "run", "train"]


def run(config: TrainConfig) -> Path:
    """Train on COCO data as configured; returns the path of the best checkpoint.

    Raises:
        ValueError: the output folder holds a run that is not to be continued, or a setting is impossible.
        DataError: something is wrong with the images or annotations.
    """
    last = config.output / "last.pt"
    if config.resume is None and last.exists():
        raise ValueError(f"output: {last} is of an earlier run: go on with it by resume=auto, or choose another folder")
    data, wanted = config.data, config.model.name
    options: dict[str, Any] = {
        "masks": "mask" in wanted,
        "keypoints": "keypoint" in wanted,
        "channels": config.model.channels,
        "on_error": data.on_error,
        "on_unreadable": data.on_unreadable,
    }
    train_set = CocoDetection(data.train_images, data.train_annotations, as_bytes=True, **options)
    val_set = None
    if data.val_annotations is not None:
        val_set = CocoDetection(data.val_images or data.train_images, data.val_annotations, **options)
    return train(config, train_set, val_set)


def train(config: TrainConfig, train_set: DetectionDataset, val_set: DetectionDataset | None = None) -> Path:
    """Train on `train_set`, measure on `val_set`; returns the path of the best (without `val_set`, last) checkpoint.

    Under torchrun each process takes its share of every batch, and of the evaluation, on a device of its own.
    """
    check_log(config.log)
    with process_group(config.device or default_device()) as device, Termination() as termination:
        return Training(config, train_set, val_set, device, termination).run()


class Training:
    """A run: what learns, what it learns from, and how far it has come.

    Args:
        config: all options.
        train_set: what is learned.
        val_set: what is measured, or None.
        device: of this process.
        termination: whether this process was asked to end.
    """

    def __init__(
        self,
        config: TrainConfig,
        train_set: DetectionDataset,
        val_set: DetectionDataset | None,
        device: torch.device,
        termination: Termination,
    ) -> None:
        self.config, self.val_set, self.device, self.termination = config, val_set, device, termination
        self.last_path, self.best_path = config.output / "last.pt", config.output / "best.pt"
        data, optim = config.data, config.optim

        threshold = data.repeat_threshold
        self.batches = TrainingBatches(
            train_set,
            config.batch_size,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            repeats=None if threshold is None else repeat_factors(train_set, threshold),
            aspect_groups=data.aspect_groups,
        )
        steps_per_epoch = len(self.batches) // optim.accumulate
        if not steps_per_epoch:
            raise ValueError(
                f"optim.accumulate={optim.accumulate}: {len(train_set)} images make {len(self.batches)} batches only"
            )
        images_per_step = config.batch_size * world_size() * optim.accumulate
        self.progressed = Progressed(images_per_step, steps_per_epoch)
        steps, milestones = stretched(config, images_per_step)
        self.steps = steps or config.epochs * steps_per_epoch
        self.epochs = math.ceil(self.steps / steps_per_epoch)
        self.lr = learning_rate(optim, images_per_step)
        optim = replace(optim, milestones=milestones)
        self.factor = schedule_factor(optim, self.steps, steps_per_epoch, in_steps=steps is not None)

        resume = self.last_path if config.resume == "auto" else config.resume and Path(config.resume)
        self.resumed = None if not resume or (config.resume == "auto" and not resume.exists()) else resume
        seed_all(config.seed)
        fresh = self.resumed is None
        model = build_model(config.model, train_set.num_classes, train_set.num_keypoints, pretrained=fresh)
        self.info = ModelInfo(config.model, train_set.class_names, train_set.category_ids, train_set.num_keypoints)
        say(
            f"{len(train_set)} images, {train_set.num_classes - 1} classes; {self.epochs} epochs, {self.steps} steps "
            f"of {images_per_step} images on {world_size()} x {device}\n{explained(config, images_per_step)}"
        )
        model.info = self.info
        if config.init is not None and fresh:
            say(str(load_weights(model, config.init)))
        self.model = model.to(device=device, memory_format=torch.channels_last).train()
        average = None if optim.ema is None else WeightAverage(model, optim.ema)
        optimizer = build_optimizer(model, optim, self.lr)
        learner = CapturedLearner if config.capture else Learner
        self.learner: Learner = learner(model, optimizer, optim, config.precision, average)
        self.best = Best(config.patience)

        items = TrainingItems(
            train_set, config.seed, transforms(config.augment, train_set), view(config.augment, model)
        )
        self.loader = training_loader(items, self.batches, workers=data.workers, device=device)
        self.speed = Speedometer(device)
        self.readings: Readings | None = None
        self.finish: Callable[[], None] | None = None
        self.left_out = 0
        self.unsaved: dict[Path, OSError] = {}

    def run(self) -> Path:
        """Go on until the last step, or until evaluations do not improve any more."""
        progressed, options = self.progressed, json.loads(json.dumps(asdict(self.config), default=str))
        state: Mapping[str, Any] = {}
        if self.resumed is not None:
            state = load_state(self.resumed, self.model, self.info, progressed, self.parts())
            say(f"going on from {self.resumed}: step {progressed.step} of {self.steps}")
        if rank() == 0:
            write_json(self.config.output / "config.json", options)
        done = (progressed.step, progressed.epoch)
        with Records(self.config.output, self.config.log, options, *done) as self.records:
            if state:
                self.records.load_state_dict(state["records"])
            while progressed.epoch < self.epochs and not self.best.exhausted():
                self.train_epoch()
                self.end_epoch()
        for path, error in self.unsaved.items():
            raise OSError(f"{path} could not be written: {error}") from error
        say(f"best checkpoint: {self.best_path}")
        return self.best_path

    def train_epoch(self) -> None:
        """The steps of an epoch that have not been done yet."""
        config, progressed, parts = self.config, self.progressed, self.config.optim.accumulate
        first = progressed.step_of_epoch
        end = min(self.steps, (progressed.epoch + 1) * progressed.steps_per_epoch)
        self.batches.set_position(progressed.epoch, first * parts)
        feed = self.speed.watch(Prefetcher(self.loader, self.device))
        title = f"epoch {progressed.epoch + 1}/{self.epochs}"
        with Progress(title, end - progressed.step + first, first) as progress:
            while progressed.step < end:
                started = time.monotonic()
                batches = list(islice(feed, parts))
                self.learner.set_learning_rate(self.lr * self.factor(progressed.step))
                with explaining_memory(batches, config.precision):
                    values = self.learner.learn(batches, (config.seed, progressed.step))
                progressed.step += 1
                progressed.seconds += time.monotonic() - started
                self.finish_reading()  # what was begun a step ago: by now it is here
                self.note(values, [image_id for batch in batches for image_id in batch.image_ids])
                progress.update()

                due = progressed.step % config.log.every == 0 or progressed.step == end
                if due:
                    self.begin_reading(progress)
                asked = self.asked_to_end(due)
                if asked or (config.checkpoint_every and progressed.step % config.checkpoint_every == 0):
                    self.save_last()
                if asked:
                    say(f"asked to end: {self.last_path} is of step {progressed.step}; resume=auto goes on")
                    raise SystemExit(EXIT_STATUS)
            self.finish_reading()

    def end_epoch(self) -> None:
        """Measure, note, and save."""
        config, progressed, learner, epoch = self.config, self.progressed, self.learner, self.progressed.epoch + 1
        metrics: Metrics | None = None
        pictures: dict[str, Image.Image] = {}
        measured = epoch % config.evaluate_every == 0 or epoch == self.epochs
        improved = self.val_set is None
        if self.val_set is not None and measured:
            self.save_last()
        with learner.averaged():
            if self.val_set is not None and measured:
                with self.termination.at_once():
                    metrics, pictures = self.measure(self.val_set)
                say(summary_line(epoch, metrics))
                improved = self.best.improved(metrics)
            if improved:
                self.save(self.best_path, lambda: save_checkpoint(self.best_path, self.model, self.info))
        lr = self.lr * self.factor(progressed.step - 1)
        self.records.write_epoch(epoch, lr, progressed.seconds, metrics, pictures)
        progressed.end_epoch()
        self.save_last()

    def measure(self, val_set: DetectionDataset) -> tuple[Metrics, dict[str, Image.Image]]:
        """Average precision on `val_set`, and pictures of it, if there is somebody to show them to."""
        config, shown = self.config, self.records.pictures
        share_buffers(self.model)
        metrics = evaluate(
            self.model,
            val_set,
            batch_size=config.batch_size,
            max_detections=config.max_detections,
            workers=config.data.workers,
        )
        return metrics, validation_pictures(self.model, val_set, shown) if shown else {}

    def note(self, values: dict[str, Tensor], image_ids: list[int]) -> None:
        """Put the losses of a step beside those before it, on the device."""
        if self.readings is None:
            self.readings = Readings(list(values), self.config.log.every, self.device)
        self.readings.add(self.progressed.step, values, image_ids)
        self.speed.count(len(image_ids))

    def begin_reading(self, progress: Progress) -> None:
        """Ask the device for what was noted since the last reading, to be written down by `finish_reading`."""
        assert self.readings is not None
        copied, speed, epoch = self.readings.begin(), self.speed.read(), self.progressed.epoch + 1
        lr = self.lr * self.factor(self.progressed.step - 1)

        def finish() -> None:
            readings = copied()
            self.records.add(readings)
            progress.show(self.records.write_train(epoch, lr, speed))
            self.check(readings)

        self.finish = finish

    def check(self, readings: Sequence[Reading]) -> None:
        """Raise, or say, if steps were not finite; in float16, where the scale of losses is being found, if losses."""
        problem = describe_nonfinite(readings, gradients=self.config.precision != "float16")
        for reading in readings:
            self.left_out = 0 if reading.finite else self.left_out + 1
        if problem is None:
            return
        if self.config.on_nonfinite == "stop" or self.left_out >= MOST_LEFT_OUT:
            raise FloatingPointError(
                f"{problem}. Lower optim.lr, lengthen optim.warmup_steps, set optim.clip_norm, or look at these "
                f"images. No such step changed the weights; {self.last_path}, if there is one, is of before; "
                "on_nonfinite=skip goes on"
            )
        say(f"left out: {problem}")

    def finish_reading(self) -> None:
        """Write down a reading that was begun, if one was."""
        finish, self.finish = self.finish, None
        if finish is not None:
            finish()

    def asked_to_end(self, due: bool) -> bool:
        """Whether a process was asked to end; several processes agree on it, which waits, when a reading is due."""
        if world_size() == 1:
            return self.termination.came
        return due and any(all_gather(self.termination.came))

    def save_last(self) -> None:
        """Write where the run stands; all that was noted by then is in the records, or with it."""
        self.finish_reading()
        if self.readings is not None:
            readings = self.readings.begin()()
            self.records.add(readings)
            self.check(readings)
        parts = {**self.parts(), "records": self.records}
        self.save(self.last_path, lambda: save_state(self.last_path, self.model, self.info, self.progressed, parts))

    def parts(self) -> dict[str, Stateful]:
        """What is stored beside the model and how far the run has come."""
        return {"learner": self.learner, "best": self.best}

    def save(self, path: Path, write: Callable[[], object]) -> None:
        """Write the checkpoint `path`.  If that fails, a full disk for example, the run goes on with the old one."""
        if rank() != 0:
            return
        self.unsaved.pop(path, None)
        try:
            write()
        except OSError as error:
            self.unsaved[path] = error
            print(f"{path} could not be written ({error}): it stays as it was, training goes on", file=sys.stderr)


if __name__ == "__main__":
    from fastmrcnn.cli import main

    main(["train", *sys.argv[1:]])
