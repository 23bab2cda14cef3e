"""What can be chosen of a training run: plain dataclasses, also the options of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastmrcnn.models.config import ModelConfig

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass
class DataConfig:
    """Images and COCO annotations.

    Args:
        train_images: folder of the training images.
        train_annotations: their COCO annotation file (JSON).
        val_images: folder of the validation images; by default nothing is evaluated.
        val_annotations: their COCO annotation file (JSON).
        on_error: raise stops at bad annotations before training; skip leaves them out with a counted warning.
        on_unreadable: skip replaces an image file that turns out unreadable by the next one, with a warning; raise
            ends the run.
        workers: processes that load images.
        repeat_threshold: repeat-factor sampling (Gupta et al., 2019): images with a class that fewer than this share
            of the images have are drawn more often; by default all equally often.
        aspect_groups: batches hold images of similar aspect ratio: of one group, of those that 2 x this + 1 ratios from
            1/2 to 2 make; 0 mixes all.
    """

    train_images: Path
    train_annotations: Path
    val_images: Path | None = None
    val_annotations: Path | None = None
    on_error: Literal["raise", "skip"] = "raise"
    on_unreadable: Literal["raise", "skip"] = "skip"
    workers: int = 2
    repeat_threshold: float | None = None
    aspect_groups: int = 3


@dataclass
class AugmentConfig:
    """What is done to training images at random.

    Args:
        flip: probability of a horizontal flip.
        min_sizes: the shorter side is resized to one of these, in pixels; by default to the model's min_size.
        jitter: large-scale jitter (Ghiasi et al., 2021): the square canvas, in pixels, of which crops are taken;
            by default images are resized as min_sizes says.
        jitter_range: scales of the jitter, of the largest that fits into the canvas.
        colour: probability that brightness, contrast, saturation and hue are distorted (as for SSD, Liu et al., 2016).
        copy_paste: probability that objects of another image are pasted in (Ghiasi et al., 2021).
    """

    flip: float = 0.5
    min_sizes: list[int] | None = None
    jitter: int | None = None
    jitter_range: tuple[float, float] = (0.1, 2.0)
    colour: float = 0.0
    copy_paste: float = 0.0


@dataclass
class OptimConfig:
    """How weights are updated.

    Args:
        name: sgd with momentum, or adamw.
        lr: learning rate after the warm-up, for lr_batch images per step.
        lr_batch: the rate is multiplied by the images per step, over all processes and accumulated steps, divided by
            this (the linear scaling rule, Goyal et al., 2017); 0 leaves it as it is.
        momentum: of SGD.
        weight_decay: L2 penalty (of adamw: decoupled); not on norms and biases.
        warmup_steps: steps in which the rate rises linearly from a thousandth.
        schedule: step multiplies the rate by gamma at milestones, cosine lets it fall to zero at the end.
        milestones: epochs after which the rate is multiplied by gamma; of a run given in steps, steps.
        gamma: see milestones.
        clip_norm: bound of the gradient norm; by default none.
        accumulate: batches whose gradients make one step.
        ema: decay per step of an exponential moving average of the weights, which then is what is evaluated and is
            the best checkpoint; by default none.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    lr_batch: int = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    schedule: Literal["step", "cosine"] = "step"
    milestones: list[int] = field(default_factory=lambda: [16, 22])
    gamma: float = 0.1
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None


@dataclass
class LogConfig:
    """What is written down, and how often.

    Args:
        every: steps between readings of the losses, which until then stay on the device.
        tensorboard: also write losses, average precision, pictures and precision-recall curves for TensorBoard, to
            OUTPUT/tensorboard; needs the extra "train".
        wandb: project of Weights & Biases to log to; needs the extra "wandb".
        pictures: validation images with detections that TensorBoard and Weights & Biases show per evaluation.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    pictures: int = 4


@dataclass
class TrainConfig:
    """A training run.

    Args:
        data: images and annotations.
        model: the network.
        augment: what is done to training images.
        optim: how weights are updated.
        log: what is written down.
        output: folder for checkpoints and metrics.
        epochs: passes over the training images.
        steps: instead of epochs, updates of the weights by optim.lr_batch images each, as are milestones then: with
            fewer images per step there are more of both, so that as many images are seen (0 takes them as they are).
        batch_size: images per process and batch.
        precision: of the network's arithmetic (automatic mixed precision); weights are float32.
        capture: run steps as CUDA graphs, one for each size of batches; on a GPU, in one process.
        init: file whose weights training starts from, of any library that fastmrcnn.load reads; layers of other shapes,
            such as those for other classes, start anew, and are named.
        evaluate_every: epochs between evaluations; the last epoch always is evaluated.
        max_detections: detections per image that count in evaluation; by default COCO's 100.
        patience: evaluations without a better average precision after which training ends; by default it does not.
        checkpoint_every: steps between checkpoints, beside the one after each epoch; by default there are no others.
        on_nonfinite: stop ends the run after a step with losses or gradients that are not finite; skip goes on. In
            both cases the step itself is left out and its images are named.
        device: such as cuda or cpu; by default cuda if there is one.
        seed: of weights, order of images, augmentation and sampling.
        resume: checkpoint to continue from, such as OUTPUT/last.pt; auto continues from that if it exists.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output: Path = Path("runs/train")
    epochs: int = 26
    steps: int | None = None
    batch_size: int = 4
    precision: Precision = "float32"
    capture: bool = False
    init: Path | None = None
    evaluate_every: int = 1
    max_detections: int | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    device: str | None = None
    seed: int = 0
    resume: str | None = None
