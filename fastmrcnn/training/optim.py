"""How weights are updated: the optimiser, its learning rate at each step, and an average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastmrcnn.training.config import OptimConfig, TrainConfig

WARMUP_START = 1e-3
"""Share of the learning rate that the warm-up begins with (detectron2, torchvision)."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters that learn, in two groups: weights, which decay, and norms and biases, which do not.

    Raises:
        ValueError: none learns.
    """
    decaying: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for module in model.modules():
        is_norm = isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (others if is_norm or name == "bias" else decaying)[parameter] = None
    if not decaying and not others:
        raise ValueError("no parameter of the model learns: model.freeze and trainable_backbone_layers leave none")
    return [
        {"params": list(decaying), "weight_decay": config.weight_decay},
        {"params": list(others), "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser of `config` at learning rate `lr` for `model`: on a GPU one launch updates all weights."""
    groups = parameter_groups(model, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=True)


def learning_rate(config: OptimConfig, images_per_step: int) -> float:
    """The learning rate after warm-up: by the linear scaling rule (Goyal et al., 2017), unless `lr_batch` is 0."""
    return config.lr * images_per_step / config.lr_batch if config.lr_batch else config.lr


def stretched(config: TrainConfig, images_per_step: int) -> tuple[int | None, list[int]]:
    """The steps of a run, None if it is given in epochs, and its milestones, for so many images per step.

    Steps are as many as it takes to see as many images as with `lr_batch` images per step, and milestones keep their
    place among them, as in detectron2's `auto_scale_workers`; unlike there the warm-up, which is against the first
    gradients, stays as it is.  Milestones in epochs already mean images.
    """
    steps, milestones, batch = config.steps, config.optim.milestones, config.optim.lr_batch
    if steps is None or not batch:
        return steps, list(milestones)
    return max(1, round(steps * batch / images_per_step)), [round(m * batch / images_per_step) for m in milestones]


def explained(config: TrainConfig, images_per_step: int) -> str:
    """One line that says how learning rate, steps and milestones follow from the options."""
    optim = config.optim
    text = f"learning rate {learning_rate(optim, images_per_step):g}"
    if not optim.lr_batch or optim.lr_batch == images_per_step:
        return text
    text += f" = {optim.lr:g} x {images_per_step} images per step / {optim.lr_batch}"
    steps, milestones = stretched(config, images_per_step)
    if steps is not None:
        text += f"; {steps} steps = {config.steps} x {optim.lr_batch} / {images_per_step}"
        if optim.schedule == "step" and milestones:
            text += f", milestones {', '.join(map(str, milestones))} likewise"
    return text


def schedule_factor(
    config: OptimConfig, total_steps: int, steps_per_epoch: int, in_steps: bool
) -> Callable[[int], float]:
    """The learning rate of a step as a share of the full one, for `torch.optim.lr_scheduler.LambdaLR`.

    A linear warm-up times, by `config.schedule`, `gamma` for each milestone passed, or half a cosine that is 0 at
    `total_steps`.

    Args:
        config: with milestones as `stretched` has them.
        total_steps: length of the run.
        steps_per_epoch: of milestones in epochs.
        in_steps: whether milestones are steps.

    Raises:
        ValueError: milestones in steps are within the warm-up, as those that are meant to be epochs would be.
    """
    milestones = [m if in_steps else m * steps_per_epoch for m in config.milestones]
    early = [m for m in milestones if m < min(config.warmup_steps, total_steps)]
    if in_steps and early and config.schedule == "step":
        raise ValueError(
            f"optim.milestones: {early} are within the warm-up of {config.warmup_steps} steps; of a run given in steps "
            "milestones are steps, not epochs"
        )

    def factor(step: int) -> float:
        warm = 1.0
        if step < config.warmup_steps:
            warm = WARMUP_START + (1 - WARMUP_START) * step / config.warmup_steps
        if config.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
        return warm * config.gamma ** sum(step >= m for m in milestones)

    return factor


class WeightAverage:
    """An exponential moving average of a model's weights and floating-point buffers, which usually detects better.

    Average and weights stay on their device, and nothing waits for it.  Integer buffers are copied.  At the start the
    average forgets faster, by min(decay, (1 + t) / (10 + t)) after t updates, or the initial weights would linger.

    Args:
        model: whose weights, as they are now, the average starts from.
        decay: share of the old average that an update keeps, 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema: expected a decay from 0 to below 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.average = {name: value.detach().clone() for name, value in _tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights of `model` into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = [(self.average[name], value.detach()) for name, value in _tensors(model).items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)(*map(list, zip(*floating, strict=True)), self.updates)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Within it `model` has the average in place of its weights, and afterwards its own again."""
        own = {name: value.detach().clone() for name, value in _tensors(model).items()}
        _put(self.average, model)
        try:
            yield
        finally:
            _put(own, model)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates, to go on from."""
        return {"average": self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: it is of another model.
        """
        stored = state["average"]
        odd = [name for name in {**stored, **self.average} if not _alike(stored.get(name), self.average.get(name))]
        if odd:
            raise ValueError(f"the average of the weights is of another model: {len(odd)} differ, such as {odd[0]}")
        for name, value in self.average.items():
            value.copy_(stored[name])
        self.updates = state["updates"]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, themselves."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape


@torch.no_grad()
def _put(values: dict[str, Tensor], model: nn.Module) -> None:
    for name, tensor in _tensors(model).items():
        tensor.copy_(values[name])
