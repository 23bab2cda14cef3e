"""This library's own checkpoints: weights, what they are of, and where training stood."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastmrcnn.checkpoints.tensors import load_tensors
from fastmrcnn.files import write_atomically
from fastmrcnn.models.config import ModelConfig, ModelName
from fastmrcnn.models.conventions import Library

FORMAT = "fastmrcnn-1"


@dataclass
class ModelInfo:
    """What a model is, beside its weights.

    Args:
        config: the architecture.
        class_names: name of label l at position l - 1, without the background.
        category_ids: id of label l, at position l - 1, in the annotations it was trained on.
        num_keypoints: keypoints per object, 0 without a keypoint branch.
    """

    config: ModelConfig
    class_names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    num_keypoints: int = 0


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, info: ModelInfo, training: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint: tensors, numbers, strings, lists and dicts.  An interrupted write leaves the old file.

    Raises:
        OSError: the file could not be written, for example since the disk is full.
    """
    content = {"format": FORMAT, "model": model.state_dict(), "info": asdict(info), "training": training}

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what PyTorch's writer makes of a refusal of the system
            raise OSError(f"the disk may be full: {str(error).splitlines()[0]}") from error

    return write_atomically(path, write)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of this library.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} was not written by fastmrcnn (no format {FORMAT!r} in it)")
    return content


def info_from(stored: Any) -> ModelInfo:
    """What `asdict` made of a `ModelInfo`, also in another version of this library.

    Raises:
        ValueError: it is of something else.
    """
    try:
        known = {f.name for f in fields(ModelConfig)}
        config = ModelConfig(**{k: v for k, v in stored["config"].items() if k in known})
        for value, choices in ((config.name, get_args(ModelName)), (config.conventions, get_args(Library))):
            if value not in choices:
                raise ValueError(f"it is of a {value!r}, which this version does not have")
        return ModelInfo(config, stored["class_names"], stored["category_ids"], stored["num_keypoints"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it says nothing of its model that this version understands ({error!r})") from error


def save_safetensors(path: str | os.PathLike[str], state: dict[str, Tensor], info: ModelInfo) -> Path:
    """Write weights, and what they are of as metadata, in a file that cannot hold anything to execute.

    Of tensors that share memory the first is written; `load_strictly` finds the others.

    Raises:
        ValueError: the package safetensors is not installed.
        OSError: the file could not be written, for example since the disk is full.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ValueError("to write safetensors install them: pip install 'fastmrcnn[convert]'") from error
    distinct: dict[int, str] = {}
    for name, value in state.items():
        distinct.setdefault(value.data_ptr() if value.numel() else id(value), name)
    tensors = {name: state[name].contiguous() for name in distinct.values()}
    metadata = {"format": FORMAT, "info": json.dumps(asdict(info))}

    return write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))


def load_strictly(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all of `state` into `model`, whose tensors that share memory need be there once.

    Raises:
        ValueError: a tensor is missing, or has another shape, or the model has none of its name.
    """
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name, value in own.items() if name not in state and value.data_ptr() not in loaded]
    surplus = [name for name in state if name not in own]
    differing = [name for name, value in state.items() if name in own and value.shape != own[name].shape]
    if problem := missing + surplus + differing:
        raise ValueError(f"it does not fit the model it says it is of: {problem[0]} and {len(problem) - 1} more")
    model.load_state_dict(state, strict=False)
