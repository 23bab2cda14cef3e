"""One step of training: losses and gradients of some batches, then an update.  Nothing in it waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmrcnn.batches import LoadedBatch
from fastmrcnn.distributed import rank, world_size
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.training.config import OptimConfig, Precision
from fastmrcnn.training.optim import WeightAverage

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Losses(nn.Module):
    """The losses of a detector, from batches as they are loaded: what processes compute side by side."""

    def __init__(self, model: GeneralizedRCNN, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.dtype = DTYPES[precision]

    def forward(self, batch: LoadedBatch) -> dict[str, Tensor]:
        """Losses by torchvision's names, each a mean over the batch; float32."""
        images, targets = self.model.transform.load(batch, self.dtype)
        with torch.autocast(images.tensors.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.losses(images, targets)


class Learner:
    """A detector and what updates its weights.

    An update whose gradients are not all finite is left out, on the device: `GradScaler` tells the optimizer so.  In
    float16 it also scales losses; otherwise its scale stays 1.

    Args:
        model: on its device, in training mode.
        optimizer: of its parameters.
        config: clipping and accumulation.
        precision: of the arithmetic.
        average: of the weights, brought up to date after each update; None for none.
    """

    forgets = True
    """Whether gradients are no tensors between steps, rather than zeros in the same memory."""

    def __init__(
        self,
        model: GeneralizedRCNN,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        precision: Precision = "float32",
        average: WeightAverage | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.average = average
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scales = precision == "float16"
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=65536.0 if self.scales else 1.0)
        self.losses: nn.Module = Losses(model, precision)
        if world_size() > 1:
            # The same graph in every step, in which each learning parameter takes part: DDP need not look for others,
            # nor, where it can be told so (not with `no_sync`: pytorch/pytorch#143580), watch for changes.  Buffers are
            # statistics of norms, brought together when they are used (`share_buffers`).
            self.losses = DistributedDataParallel(
                self.losses, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=config.accumulate == 1
            )

    def learn(self, batches: Sequence[LoadedBatch], seed: tuple[int, ...]) -> dict[str, Tensor]:
        """Update the weights by the mean gradient of some batches.

        Args:
            batches: on the device, always of one number.
            seed: of all that is random in this step, the sampling of anchors and proposals; each batch mixes in its
                number, as if one process took those of all processes in turn.

        Returns:
            Losses, means over the batches, and `grad_norm`, before clipping: on the device, float32 [].
        """
        total: dict[str, Tensor] = {}
        for part, batch in enumerate(batches):
            seed_all(*seed, rank() + part * world_size())
            with self._alone(part + 1 < len(batches)):
                losses = self._gradients(batch, len(batches))
            for name, loss in losses.items():
                share = loss / len(batches)
                total[name] = total[name] + share if name in total else share
        norm = self._update()
        if self.average is not None:
            self.average.update(self.model)
        return total | {"grad_norm": norm}

    def _gradients(self, batch: LoadedBatch, parts: int) -> dict[str, Tensor]:
        """Add to the gradients of the weights those of a batch, one of `parts` of a step; returns its losses."""
        losses = self.losses(batch)
        self.scaler.scale(torch.stack(list(losses.values())).sum() / parts).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _alone(self, accumulating: bool) -> AbstractContextManager[Any]:
        """Without adding up gradients over processes: only the last batch of a step does."""
        if accumulating and isinstance(self.losses, DistributedDataParallel):
            return self.losses.no_sync()
        return contextlib.nullcontext()

    def _update(self) -> Tensor:
        """Update the weights by their gradients, which are nothing afterwards; returns the norm of these."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scales else 1.0)
        self.optimizer.zero_grad(set_to_none=self.forgets)
        return norm

    def averaged(self) -> AbstractContextManager[Any]:
        """Within it the model has the average of its weights, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped(self.model)

    def set_learning_rate(self, lr: float) -> None:
        """The learning rate of the updates that follow."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """All but the weights of the model: tensors and numbers."""
        average = None if self.average is None else self.average.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])


def seed_all(*numbers: int) -> None:
    """Seed PyTorch's generators of all devices by non-negative `numbers`: no two sequences are alike."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
