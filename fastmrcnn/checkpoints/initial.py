"""Weights to start from: of a file of any library that this one reads, as far as they fit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmrcnn.checkpoints import torchvision
from fastmrcnn.checkpoints.reading import read_weights, says_what_it_is
from fastmrcnn.checkpoints.tensors import load_content, state_of
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
    """Take over the weights in a file that `model` has, of the same shapes.

    Args:
        model: its other weights keep their values.
        path: what `fastmrcnn.load` takes, or any `state_dict` that `torch.save` wrote, of this model's names.

    Returns:
        What was and what was not taken over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or nothing that fits the model, which then is as it was.
    """
    if says_what_it_is(path):
        weights = read_weights(path)
        theirs, info = weights.info.config.conventions, model.info
        if info is not None and info.config.conventions != theirs:
            warnings.warn(
                f"init: {path} is of a network with the conventions of {theirs}; this one has those of "
                f"{info.config.conventions}, so it has to learn anew where its anchors and RoIs are "
                f"(model.conventions={theirs} keeps them)",
                stacklevel=2,
            )
        return take_over(model, weights.state, path)
    content = load_content(path)
    state = state_of(content)
    if content and not state:
        raise ValueError(f"init: {path} is neither a checkpoint of fastmrcnn nor a state_dict, names with tensors")
    return take_over(model, {torchvision.present_name(name): value for name, value in state.items()}, path)


def take_over(model: GeneralizedRCNN, given: dict[str, Tensor], path: str | os.PathLike[str]) -> LoadedWeights:
    """Take over those of `given` tensors, of a file at `path`, that `model` has under the same names and of the same
    shapes.

    The first convolution may also be for another number of channels, see `fastmrcnn.models.surgery.spread`.

    Raises:
        ValueError: nothing fits the model, which then is as it was.
    """
    given = dict(given)
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
