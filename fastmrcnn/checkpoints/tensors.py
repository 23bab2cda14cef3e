"""Files of tensors in any of the formats that detectors are published in, read without executing anything."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmrcnn.checkpoints.pickles import load_pickle

INERT = ("mmengine.", "mmcv.", "mmdet.", "numpy.", "collections.")
"""Packages whose objects in a file of PyTorch's are read as things without behaviour."""


class Inert:
    """What stands for an object that a file names: it keeps what it is given, and does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.given = (arguments, options)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""


def existing(path: str | os.PathLike[str]) -> Path:
    """`path`, if there is such a file; else FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    return path


def load_content(path: str | os.PathLike[str]) -> Any:
    """What a file of tensors holds, whichever of the formats it is in: by its first bytes, not its name.

    Of a file of PyTorch's or a pickle what was saved, arrays as tensors; of safetensors its tensors and its metadata,
    as `{"model": ..., "metadata": ...}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else than tensors, numbers and texts.
    """
    path = existing(path)
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return load_safetensors(path)
    if start[:1] == b"\x80" and not zipfile.is_zipfile(path) and not is_legacy(path):
        return as_tensors(load_pickle(path))
    return load_tensors(path)


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """What a file of PyTorch's holds, on the CPU, if that is no more than tensors, numbers, texts, lists and dicts.

    Objects of the libraries that train detectors are read as `Inert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    path = existing(path)
    try:
        with torch.serialization.safe_globals(_inert(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # What PyTorch says of objects that it does not load is how to load them all the same.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds objects, or is no archive" if unsafe else next(iter(str(error).splitlines()), type(error))
        raise ValueError(f"checkpoint: {path} is damaged, or no file of tensors ({reason})") from error


def _inert(path: Path) -> list[Any]:
    """Pairs of a class of its own and a name for the objects that an archive of PyTorch's names."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        return []  # which is what loading will say
    return [(type("Inert", (Inert,), {}), name) for name in names if name.startswith(INERT)]


def is_legacy(path: Path) -> bool:
    """Whether a file is of PyTorch before 1.6: pickles one after the other, of which the first is a number."""
    with path.open("rb") as file:
        return torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in file.read(64)


def load_safetensors(path: Path) -> dict[str, Any]:
    """Tensors and metadata of a file of safetensors.

    Raises:
        ValueError: the file is damaged, or the package is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ValueError(f"checkpoint: to read {path} install safetensors: pip install 'fastmrcnn[convert]'") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {"model": {name: file.get_tensor(name) for name in names}, "metadata": file.metadata() or {}}
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is damaged ({error})") from error


def as_tensors(value: Any) -> Any:
    """`value` with tensors in the place of arrays."""
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    if isinstance(value, dict):
        return {key: as_tensors(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_tensors(x) for x in value)
    return value


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """The same in Python 3.10."""
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def state_of(content: Any) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, wherever trainers put them; empty if there are none."""
    for key in ("state_dict", "model", "blobs", "model_state"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        return {}
    named = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if named and all(name.startswith("module.") for name in named):  # of DistributedDataParallel
        named = {name.removeprefix("module."): value for name, value in named.items()}
    return named


def parse_json(text: str, path: Path) -> Any:
    """Metadata of this library; ValueError if they are damaged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint: {path} is damaged (its metadata are no JSON: {error})") from error
