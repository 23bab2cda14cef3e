"""This library's own checkpoints: weights, what they are of, and where training stood."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmrcnn.files import write_atomically
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN

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


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """What a file of PyTorch's holds, on the CPU, if that is no more than tensors, numbers, texts, lists and dicts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # What PyTorch says of objects that it does not load is how to load them all the same.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds objects, or is no archive" if unsafe else next(iter(str(error).splitlines()), type(error))
        raise ValueError(f"checkpoint: {path} is damaged, or no file of tensors ({reason})") from error


def load_model(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[GeneralizedRCNN, ModelInfo]:
    """The model of a checkpoint, in evaluation mode on `device` (by default the CPU), and what it is."""
    content = load_checkpoint(path)
    known = {f.name for f in fields(ModelConfig)}
    stored = content["info"]
    config = ModelConfig(**{k: v for k, v in stored["config"].items() if k in known})
    info = ModelInfo(config, stored["class_names"], stored["category_ids"], stored["num_keypoints"])
    model = build_model(config, len(info.class_names) + 1, info.num_keypoints, pretrained=False)
    model.load_state_dict(content["model"])
    return model.to(device or "cpu").eval(), info
