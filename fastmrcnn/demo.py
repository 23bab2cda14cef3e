"""The demonstration: a small model learns generated shapes in a few minutes, and shows what it finds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmrcnn.checkpoints import load_model
from fastmrcnn.data import Shapes
from fastmrcnn.evaluate import evaluate
from fastmrcnn.files import write_atomically
from fastmrcnn.inference import default_device
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.train import DataConfig, OptimConfig, TrainConfig, train
from fastmrcnn.visualize import comparison

SHOWN = 4


@dataclass
class DemoConfig:
    """The demonstration's few choices.

    Args:
        output: folder for the checkpoint and the picture.
        images: training images to generate.
        epochs: passes over them.
        image_size: side of the images in pixels.
        device: such as cuda or cpu; by default cuda if there is one.
        seed: of images and weights.
    """

    output: Path = Path("runs/demo")
    images: int = 560
    epochs: int = 4
    image_size: int = 96
    device: str | None = None
    seed: int = 0


def run(config: DemoConfig) -> Path:
    """Train, print the table of average precision, write the picture and return its path."""
    started = time.monotonic()
    size = (config.image_size, config.image_size)
    train_set = Shapes(config.images, image_size=size, max_objects=4, tinted=True, seed=config.seed)
    val_set = Shapes(48, image_size=size, max_objects=4, tinted=True, seed=config.seed + 1)
    best = train(training(config), train_set, val_set)

    device = torch.device(config.device) if config.device else default_device()
    model, info = load_model(best, device)
    metrics = evaluate(model, val_set, batch_size=8)
    for kind, numbers in metrics.items():
        print(f"\n{kind}\n{numbers.table()}")

    images, targets = zip(*(val_set[i] for i in range(SHOWN)), strict=True)
    with torch.inference_mode():
        outputs = model([image.to(device) for image in images])
    predictions = [{k: v.cpu() for k, v in output.items()} for output in outputs]
    picture = comparison(list(images), predictions, list(targets), info.class_names)
    path = write_atomically(config.output / "demo.png", picture.save)
    print(f"\nmask AP50 {metrics['segm'].ap50:.3f} after {time.monotonic() - started:.0f} s on {device}")
    print(f"predictions beside ground truth: {path.resolve()}")
    return path


def training(config: DemoConfig) -> TrainConfig:
    """How the demonstration trains: ResNet-18, every stage narrow, a short warm-up."""
    steps = config.images // 4
    return TrainConfig(
        data=DataConfig(Path(), Path(), workers=0),
        model=ModelConfig(
            "maskrcnn_resnet18_fpn",
            min_size=config.image_size,
            max_size=config.image_size,
            anchor_sizes=[16, 32, 64, 128, 256],
            proposals=100,
            box_samples=32,
            detections_per_image=20,
        ),
        optim=OptimConfig(lr=0.01, lr_batch=4, warmup_steps=steps // 2, milestones=[config.epochs - 1], clip_norm=5.0),
        output=config.output,
        epochs=config.epochs,
        batch_size=4,
        evaluate_every=config.epochs,
        device=config.device,
        seed=config.seed,
    )
