"""Where a run stands, in checkpoints: enough to go on as if it had never stopped.

Nothing random is stored: the order of images, their augmentation and the sampling of a step are functions of the seed
and of the step (`TrainingBatches`, `TrainingItems`, `Learner.learn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastmrcnn.checkpoints import ModelInfo, load_checkpoint, save_checkpoint


@dataclass
class Progressed:
    """How far a run has come.

    Args:
        images_per_step: over all processes and accumulated batches; a step is a step only for as many.
        steps_per_epoch: so many images make an epoch.
        epoch: number of epochs that are done with, evaluation included.
        step: number of updates that were done.
        seconds: spent on this epoch so far, without evaluation.
    """

    images_per_step: int
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0

    @property
    def step_of_epoch(self) -> int:
        """Steps of this epoch that were done."""
        return self.step - self.epoch * self.steps_per_epoch

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.seconds = self.epoch + 1, 0.0


class Stateful(Protocol):
    """What can be stored and restored."""

    def state_dict(self) -> Any:
        """Tensors, numbers, strings, lists and dicts."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Continue from what `state_dict` returned."""
        ...


def save_state(
    path: Path, model: nn.Module, info: ModelInfo, progressed: Progressed, parts: Mapping[str, Stateful]
) -> None:
    """Write `path`, from which `load_state` continues.  A write that fails raises, and leaves the file as it was."""
    state = {"progressed": asdict(progressed), **{name: part.state_dict() for name, part in parts.items()}}
    save_checkpoint(path, model, info, state)


def load_state(
    path: Path, model: nn.Module, info: ModelInfo, progressed: Progressed, parts: Mapping[str, Stateful]
) -> Mapping[str, Any]:
    """Continue from the checkpoint `path`, into all the other arguments; returns all that it holds of the training.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no state of training, or that of a run with another network, other classes, or another
            number of images per step or epoch.
    """
    content = load_checkpoint(path)
    state = content["training"]
    if state is None:
        raise ValueError(f"resume: {path} holds a model only, no state of training; last.pt of a run does")
    if content["info"] != asdict(info):
        raise ValueError(f"resume: {path} is of another network or of other classes; init starts from its weights")
    for name in ("images_per_step", "steps_per_epoch"):
        stored, now = state["progressed"][name], getattr(progressed, name)
        if stored != now:
            raise ValueError(
                f"resume: {path} is of a run with {name.replace('_', ' ')} {stored}, this one has {now}: processes x "
                "batch_size x optim.accumulate must give the same, and the data must be the same"
            )
    model.load_state_dict(content["model"])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for name, value in state["progressed"].items():
        setattr(progressed, name, value)
    return state
