"""Trained detectors from one format to another."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastmrcnn.checkpoints import detectron2, torchvision
from fastmrcnn.checkpoints.loading import local, model_of
from fastmrcnn.checkpoints.native import save_safetensors
from fastmrcnn.checkpoints.reading import SourceOption, read_weights
from fastmrcnn.checkpoints.weights import Weights, some
from fastmrcnn.files import write_atomically

Format = Literal["safetensors", "torchvision", "detectron2"]


@dataclass
class ConvertConfig:
    """What to convert.

    Args:
        input: a file of fastmrcnn, torchvision, detectron2, Detectron or MMDetection, or a URL with a hash of one.
        output: the file to write.
        source: what wrote the input, if that is not to be seen in it.
        format: safetensors, which every command of fastmrcnn takes; or a state dict for torchvision's builder of that
            name; or a checkpoint for detectron2, a pickle if its name ends in .pkl.
    """

    input: str
    output: Path
    source: SourceOption = "auto"
    format: Format = "safetensors"


def convert(
    path_or_url: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    source: SourceOption = "auto",
    format: Format = "safetensors",
) -> Weights:
    """Write the detector in a file as another file; an interrupted write leaves the old one.

    Args:
        path_or_url: what `fastmrcnn.load` takes.
        output: the file to write.
        source: as for `fastmrcnn.load`.
        format: see `ConvertConfig`.

    Returns:
        What was read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no detector that this library has, or none that the format's library has the results of.
        OSError: the output could not be written.
    """
    weights = read_weights(local(path_or_url), source)
    model = model_of(weights)  # raises if anything is amiss
    if format == "safetensors":
        save_safetensors(output, model.state_dict(), weights.info)  # in which what is one tensor is known, unlike files
        return weights
    state = (torchvision if format == "torchvision" else detectron2).export(weights)
    content: Any = state if format == "torchvision" else {"model": state}

    def write(temporary: Path) -> None:
        if format == "detectron2" and temporary.suffix == ".pkl":
            arrays = {name: value.numpy() for name, value in state.items()}
            temporary.write_bytes(pickle.dumps({"model": arrays, "__author__": "fastmrcnn"}, protocol=4))
        else:
            torch.save(content, temporary)

    write_atomically(output, write)
    return weights


def run(config: ConvertConfig) -> Path:
    """Convert as configured, print what was read and written, and return its path."""
    weights = convert(config.input, config.output, source=config.source, format=config.format)
    info = weights.info
    print(
        f"{config.input}: {info.config.name} of {weights.source}, {len(info.class_names)} classes "
        f"({some(info.class_names)}), {sum(value.numel() for value in weights.state.values()):,} numbers in "
        f"{len(weights.state)} tensors"
    )
    if weights.unused:
        print(f"without a part in results: {some(weights.unused)}")
    print(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB, {config.format}")
    return config.output
