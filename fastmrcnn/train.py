"""Train a detector: read top to bottom.

    python -m fastmrcnn.train --config configs/nuclei_small.yaml
    fastmrcnn train --data.train_images photos --data.train_annotations photos.json

`run` builds datasets and model from a `TrainConfig`, `train` is the loop: SGD with a linear warm-up and a step
schedule, average precision after epochs, checkpoints `last.pt` and `best.pt`, numbers in `metrics.jsonl`, and in
`config.json` what to pass as `--config` to do it again.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastmrcnn.checkpoints import ModelInfo, load_checkpoint, save_checkpoint
from fastmrcnn.coco_eval import CocoMetrics
from fastmrcnn.data import CocoDetection, DetectionDataset, HorizontalFlip, collate, left_right_pairs
from fastmrcnn.evaluate import evaluate
from fastmrcnn.files import write_json
from fastmrcnn.inference import default_device
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN


@dataclass
class DataConfig:
    """Images and COCO annotations.

    Args:
        train_images: folder of the training images.
        train_annotations: their COCO annotation file (JSON).
        val_images: folder of the validation images; by default nothing is evaluated.
        val_annotations: their COCO annotation file (JSON).
        flip: probability of a horizontal flip.
        on_error: raise stops at bad images and annotations; skip leaves them out with a counted warning.
        workers: processes that load images.
    """

    train_images: Path
    train_annotations: Path
    val_images: Path | None = None
    val_annotations: Path | None = None
    flip: float = 0.5
    on_error: str = "raise"
    workers: int = 2


@dataclass
class OptimConfig:
    """Stochastic gradient descent.

    Args:
        lr: learning rate after warm-up; torchvision's rule is 0.02 for 16 images per step, in proportion.
        momentum: of SGD.
        weight_decay: L2 penalty; not on norms and biases.
        warmup_steps: steps in which the rate rises linearly from a thousandth.
        milestones: epochs after which the rate is multiplied by gamma.
        gamma: see milestones.
        clip_norm: bound of the gradient norm; by default none.
    """

    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    milestones: list[int] = field(default_factory=lambda: [16, 22])
    gamma: float = 0.1
    clip_norm: float | None = None


@dataclass
class TrainConfig:
    """A training run.

    Args:
        data: images and annotations.
        model: the network.
        optim: how it learns.
        output: folder for checkpoints and metrics.
        epochs: passes over the training images.
        batch_size: images per step.
        evaluate_every: epochs between evaluations; the last epoch always is evaluated.
        max_detections: detections per image that count in evaluation; by default COCO's 100.
        device: such as cuda or cpu; by default cuda if there is one.
        seed: of weights, order of images, augmentation and sampling.
        log_every: steps between readings of the losses; each waits for the device.
        resume: checkpoint to continue from, such as OUTPUT/last.pt.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: Path = Path("runs/train")
    epochs: int = 26
    batch_size: int = 4
    evaluate_every: int = 1
    max_detections: int | None = None
    device: str | None = None
    seed: int = 0
    log_every: int = 10
    resume: Path | None = None


def run(config: TrainConfig) -> Path:
    """Train on COCO data as configured; returns the path of the best checkpoint."""
    data, wanted = config.data, config.model.name
    options: dict[str, Any] = {"masks": "mask" in wanted, "keypoints": "keypoint" in wanted, "on_error": data.on_error}
    train_set = CocoDetection(data.train_images, data.train_annotations, **options)
    pairs = left_right_pairs(train_set.keypoint_names) if options["keypoints"] else None
    train_set.transforms = HorizontalFlip(data.flip, pairs)
    val_set = None
    if data.val_annotations is not None:
        val_set = CocoDetection(data.val_images or data.train_images, data.val_annotations, **options)
    write_json(config.output / "config.json", json.loads(json.dumps(asdict(config), default=str)))
    return train(config, train_set, val_set)


def train(config: TrainConfig, train_set: DetectionDataset, val_set: DetectionDataset | None) -> Path:
    """Train on `train_set`, measure on `val_set`; returns the path of the best (without `val_set`, last) checkpoint."""
    device = torch.device(config.device) if config.device else default_device()
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    info = ModelInfo(config.model, train_set.class_names, train_set.category_ids, train_set.num_keypoints)
    model = build_model(config.model, train_set.num_classes, train_set.num_keypoints).to(device)
    optimizer = torch.optim.SGD(parameter_groups(model, config.optim), config.optim.lr, config.optim.momentum)
    loader: DataLoader[Any] = DataLoader(
        cast(Any, train_set),  # DataLoader asks for its own base class and needs only len() and [i]
        config.batch_size,
        shuffle=True,
        num_workers=config.data.workers,
        collate_fn=collate,
        drop_last=len(train_set) >= config.batch_size,
        persistent_workers=config.data.workers > 0,
        pin_memory=device.type == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config.optim, len(loader)))

    first_epoch, best = 0, -math.inf
    if config.resume is not None:
        first_epoch, best = resume(config.resume, model, optimizer, schedule)
    config.output.mkdir(parents=True, exist_ok=True)
    print(f"{len(train_set)} images, {train_set.num_classes - 1} classes, {config.epochs} epochs on {device}")

    last_path, best_path = config.output / "last.pt", config.output / "best.pt"
    for epoch in range(first_epoch, config.epochs):
        started = time.monotonic()
        losses = train_epoch(model, loader, optimizer, schedule, config, epoch, device)
        record: dict[str, Any] = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0], "losses": losses}
        record["seconds"] = time.monotonic() - started

        improved = val_set is None
        if val_set is not None and ((epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs):
            metrics = evaluate(model, val_set, max_detections=config.max_detections, workers=config.data.workers)
            record["metrics"] = {name: value.as_dict() for name, value in metrics.items()}
            print(summary_line(epoch + 1, metrics))
            score = main_metric(metrics)
            improved, best = score > best or not best_path.exists(), max(score, best)

        state = {
            "epoch": epoch + 1,
            "best": best,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(last_path, model, info, state)
        if improved:
            save_checkpoint(best_path, model, info)
        with open(config.output / "metrics.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
    print(f"best checkpoint: {best_path}")
    return best_path


def train_epoch(
    model: GeneralizedRCNN,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    config: TrainConfig,
    epoch: int,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the training images; returns the mean of each loss over the steps that were read."""
    model.train()
    totals: dict[str, float] = {}
    read = 0
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", mininterval=1.0)
    for step, (images, targets) in enumerate(bar):
        on_device = [image.to(device, non_blocking=True) for image in images]
        losses = model(on_device, [move(target, device) for target in targets])
        total = torch.stack(list(losses.values())).sum()

        optimizer.zero_grad()
        total.backward()
        if config.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        schedule.step()

        if step % config.log_every == 0 or step + 1 == len(loader):
            values: dict[str, float] = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
            if not all(math.isfinite(v) for v in values.values()):
                ids = [target["image_id"] for target in targets]
                raise FloatingPointError(
                    f"epoch {epoch + 1}, step {step}: a loss is not finite ({values}); seen at images {ids}. "
                    "Lower optim.lr, lengthen optim.warmup_steps or set optim.clip_norm."
                )
            read += 1
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value
            shown = {name.removeprefix("loss_"): f"{value:.3f}" for name, value in values.items()}
            bar.set_postfix(shown | {"lr": f"{schedule.get_last_lr()[0]:.2g}"})
    return {name: value / read for name, value in totals.items()}


def parameter_groups(model: GeneralizedRCNN, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters that learn, in two groups: weights, which decay, and norms and biases, which do not."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate_factor(config: OptimConfig, steps_per_epoch: int) -> Any:
    """The learning rate of a step as a share of `config.lr`: linear warm-up, then `gamma` at each milestone."""

    def factor(step: int) -> float:
        warm = min(1.0, max(1e-3, (step + 1) / config.warmup_steps)) if config.warmup_steps else 1.0
        return warm * config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)

    return factor


def resume(
    path: Path,
    model: GeneralizedRCNN,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> tuple[int, float]:
    """Continue from the checkpoint `path`; returns the number of finished epochs and the best score so far."""
    content = load_checkpoint(path)
    state = content["training"]
    if state is None:
        raise ValueError(f"resume: {path} holds a model only, no state of training; last.pt of a run does")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])
    return state["epoch"], state["best"]


def move(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of `target` on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in target.items()}


def main_metric(metrics: dict[Any, CocoMetrics]) -> float:
    """The average precision that decides which checkpoint is best: of masks, else keypoints, else boxes."""
    return next(metrics[kind].ap for kind in ("segm", "keypoints", "bbox") if kind in metrics)


def summary_line(epoch: int, metrics: dict[Any, CocoMetrics]) -> str:
    """One line of average precisions."""
    parts = [f"{kind} AP {value.ap:.3f} AP50 {value.ap50:.3f}" for kind, value in metrics.items()]
    return f"epoch {epoch}: " + ", ".join(parts)


if __name__ == "__main__":
    from fastmrcnn.cli import main

    main(["train"])
