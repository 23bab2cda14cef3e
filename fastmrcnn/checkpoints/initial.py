"""Weights to start from: of a checkpoint of this library or a file of torchvision's, as far as they fit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmrcnn.checkpoints.native import FORMAT, load_tensors
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.surgery import first_convolution, spread

FIRST_NAMED = 10
"""Layers that a message names; of others it says how many there are."""


@dataclass
class LoadedWeights:
    """What `load_weights` did; its text says so to a user.

    Args:
        path: the file.
        loaded: number of the model's parameters and buffers that were taken from it.
        changed: layers whose weights were adapted, and how.
        anew: layers that keep their initialisation, wholly or in part, and why.
        unexpected: layers in the file, and those of their tensors that the model does not have.
    """

    path: str
    loaded: int
    changed: dict[str, str]
    anew: dict[str, str]
    unexpected: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.loaded} parameters and buffers from {self.path}"]
        lines += [f"{layer}: {how}" for layer, how in self.changed.items()]
        lines += _some([f"{layer}: {why}: starts anew" for layer, why in self.anew.items()])
        lines += _some([f"{layer}: {', '.join(of)}: not in the model" for layer, of in self.unexpected.items()])
        return "\n".join(lines)


def load_weights(model: GeneralizedRCNN, path: str | os.PathLike[str]) -> LoadedWeights:
    """Take over the weights in a file that `model` has under the same names and in the same shapes.

    The first convolution may also be for another number of channels, see `fastmrcnn.models.surgery.spread`.

    Args:
        model: its other weights keep their values.
        path: a checkpoint of this library, or a `state_dict` that torchvision published or that `torch.save` wrote.

    Returns:
        What was and what was not taken over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or nothing that fits the model, which then is as it was.
    """
    given = {_present_name(name): value for name, value in _state(load_tensors(path), path).items()}
    own = model.state_dict()
    changed = {}
    first, layer = first_convolution(model)
    weight = given.get(f"{first}.weight")
    if weight is not None and weight.dim() == 4 and weight.shape[1] != layer.in_channels:
        given[f"{first}.weight"] = spread(weight, layer.in_channels)
        changed[first] = f"{weight.shape[1]} channels in the file, spread over {layer.in_channels} here"

    fitting = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise ValueError(
            f"init: nothing in {path} fits the model; it has {_examples(given)}, the model {_examples(own)}"
        )
    anew: dict[str, str] = {}
    for name in own:
        if name in given and name not in fitting:
            anew.setdefault(name.rpartition(".")[0], _difference(name, given[name].shape, own[name].shape))
    for missing, tensors in _by_layer(name for name in own if name not in given).items():
        anew.setdefault(missing, f"{', '.join(tensors)} not in the file")
    unexpected = _by_layer(name for name in given if name not in own)
    model.load_state_dict(fitting, strict=False)
    return LoadedWeights(str(path), len(fitting), changed, anew, unexpected)


def _state(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The `state_dict` in what a file holds."""
    if isinstance(content, dict) and content.get("format") == FORMAT:
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"init: {path} is neither a checkpoint of fastmrcnn nor a state_dict, names with tensors")
    return content


def _present_name(name: str) -> str:
    """What torchvision now calls a parameter; some that it published have older names."""
    name = re.sub(r"(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", name)
    return re.sub(r"mask_fcn(\d+)\.", lambda found: f"{int(found[1]) - 1}.0.", name)


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of tensors by the layers they are of; without the counters that only some batch norms have, for nothing."""
    layers: dict[str, list[str]] = {}
    for layer, _, tensor in (name.rpartition(".") for name in names):
        if tensor != "num_batches_tracked":
            layers.setdefault(layer, []).append(tensor)
    return layers


def _difference(name: str, given: torch.Size, own: torch.Size) -> str:
    if "cls_score" in name:
        return f"{given[0]} classes in the file, {own[0]} here"
    return f"shape {list(given)} in the file, {list(own)} here"


def _examples(names: dict[str, Tensor]) -> str:
    return ", ".join(list(names)[:2]) + " ..." if names else "no weights"


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - FIRST_NAMED
    return lines if more <= 0 else [*lines[:FIRST_NAMED], f"... and {more} more"]
