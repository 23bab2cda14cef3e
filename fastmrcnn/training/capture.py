"""Steps of training as CUDA graphs: forward, losses, backward and update are launched at once, not one by one.

A graph is of one size: that of the canvas, the number of images, and rooms for objects, pixels and masks, which batches
are padded to.  Padding is inert, so the losses are those of a step that is not captured.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from fastmrcnn.batches import LoadedBatch
from fastmrcnn.distributed import world_size
from fastmrcnn.training.step import Learner

Result = TypeVar("Result")

WARM_UP = 3
"""Steps of a size that are run before it is captured: kernels are compiled, and rare sizes never are."""

MOST = 12
"""Sizes that are captured; of others, steps are run as they are."""


class Key:
    """The size of a batch with its paddings; batches of equal keys are run by the same graph."""

    def __init__(self, batch: LoadedBatch) -> None:
        self.size = batch.size
        self.images, self.objects = len(batch.labels), room(batch.labels.shape[1], least=8)
        self.pixels = room(batch.pixels.numel(), least=1 << 12)
        self.words = None if batch.words is None else room(batch.words.numel(), least=1 << 8)
        self.keypoints = None if batch.keypoints is None else batch.keypoints.shape[2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


def room(length: int, least: int) -> int:
    """`length`, rounded up to a power of two or one and a half of one, `least` or more."""
    while least < length:
        least = least * 3 // 2 if least & (least - 1) == 0 else least * 4 // 3
    return least


def padded(batch: LoadedBatch, key: Key) -> LoadedBatch:
    """`batch` with the rooms of `key`; what is added are zeros."""

    def pad(values: Tensor | None, length: int | None, axis: int = 0) -> Tensor | None:
        if values is None or length is None:
            return None
        return functional.pad(values, (0, 0) * (values.dim() - 1 - axis) + (0, length - values.shape[axis]))

    changed: dict[str, Any] = {"pixels": pad(batch.pixels, key.pixels), "words": pad(batch.words, key.words)}
    for name in ("boxes", "labels", "keypoints"):
        changed[name] = pad(getattr(batch, name), key.objects, axis=1)
    return replace(batch, **changed)


@dataclass
class Program:
    """The gradients of batches of one key: what `run` reads is `batch`, what it returns is overwritten by each run."""

    batch: LoadedBatch
    run: Callable[[], dict[str, Tensor]]

    def load(self, batch: LoadedBatch) -> None:
        """Copy a batch into the memory that is read."""
        for name, target in vars(self.batch).items():
            if isinstance(target, Tensor):
                target.copy_(getattr(batch, name), non_blocking=True)


class CapturedLearner(Learner):
    """A `Learner` whose steps become CUDA graphs.

    Gradients stay where they are between steps, and learning rates are tensors: graphs hold addresses, and numbers as
    they were.  Steps are captured on a GPU only; elsewhere all is done alike, but launched one by one.

    Raises:
        ValueError: there are several processes, whose exchange of gradients is not captured.
    """

    forgets = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if world_size() > 1:
            raise ValueError("capture: expected one process; with several, gradients are exchanged while others follow")
        super().__init__(*arguments, **options)
        device = self.parameters[0].device
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            if "capturable" in group:
                group["capturable"] = True
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.programs: dict[tuple[Key, int], Program] = {}
        self.seen: Counter[tuple[Key, int]] = Counter()
        self.updates = 0
        self.captured_update: Callable[[], Tensor] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None

    def _gradients(self, batch: LoadedBatch, parts: int) -> dict[str, Tensor]:
        key = Key(batch), parts
        self.seen[key] += 1
        batch = padded(batch, key[0])
        with self._on_stream():
            if key not in self.programs and (self.seen[key] <= WARM_UP or len(self.programs) == MOST):
                return super()._gradients(batch, parts)
            if key not in self.programs:
                fixed = batch.copied()
                gradients = super()._gradients
                self.programs[key] = Program(fixed, self._captured(lambda: gradients(fixed, parts)))
            program = self.programs[key]
            program.load(batch)
            return program.run()

    def _update(self) -> Tensor:
        self.updates += 1
        with self._on_stream():
            if self.updates <= WARM_UP:
                return super()._update()
            if self.captured_update is None:
                self.captured_update = self._captured(super()._update)
            return self.captured_update().clone()

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the stream that captures, in turn with the current one."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def _captured(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """What does as `call`, in one launch; nothing of it has been run yet."""
        if self.stream is None:
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = call()

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    def state_dict(self) -> dict[str, Any]:
        """As that of a `Learner`, with learning rates as numbers."""
        state = super().state_dict()
        groups = [group | {"lr": float(group["lr"])} for group in state["optimizer"]["param_groups"]]
        return state | {"optimizer": state["optimizer"] | {"param_groups": groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, also that of a `Learner`.

        The graph of the update is forgotten: what the optimizer remembers has another place then.
        """
        super().load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=self.parameters[0].device)
            if "capturable" in group:
                group["capturable"] = True
        self.updates, self.captured_update = 0, None
