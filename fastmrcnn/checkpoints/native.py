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
    """Write a checkpoint: tensors, numbers, strings, lists and dicts.  An interrupted write leaves the old file."""
    content = {"format": FORMAT, "model": model.state_dict(), "info": asdict(info), "training": training}
    return write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # What PyTorch says of objects that it does not load is how to load them all the same.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds objects, or is no archive" if unsafe else next(iter(str(error).splitlines()), type(error))
        raise ValueError(f"checkpoint: {path} is damaged, or no file of tensors ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} was not written by fastmrcnn (no format {FORMAT!r} in it)")
    return content


def load_model(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[GeneralizedRCNN, ModelInfo]:
    """The model of a checkpoint, in evaluation mode on `device` (by default the CPU), and what it is."""
    content = load_checkpoint(path)
    known = {f.name for f in fields(ModelConfig)}
    stored = content["info"]
    config = ModelConfig(**{k: v for k, v in stored["config"].items() if k in known})
    info = ModelInfo(config, stored["class_names"], stored["category_ids"], stored["num_keypoints"])
    without_download = ModelConfig(**(asdict(config) | {"weights": None, "weights_backbone": None}))
    model = build_model(without_download, len(info.class_names) + 1, info.num_keypoints)
    model.load_state_dict(content["model"])
    return model.to(device or "cpu").eval(), info
