"""Weights that Keras saved as HDF5: arrays by layer, of which nothing is followed out of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIGNATURE = b"\x89HDF\r\n\x1a\n"

Layers = dict[str, dict[str, Tensor]]


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does."""
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def load_layers(path: Path) -> Layers:
    """Weights by layer and name, such as `["conv1"]["kernel"]`, of `save_weights` or `save` of Keras.

    Raises:
        ValueError: the file is damaged, claims more numbers than it has bytes, refers to other files, or holds
            something else; or the package h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(f"checkpoint: to read {path} install h5py: pip install 'fastmrcnn[convert]'") from error
    layers: Layers = {}
    room = path.stat().st_size
    seen: set[int] = set()

    def walk(group: Any, parent: str) -> None:
        nonlocal room
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{group.name}/{name} is a link out of its group, which is not followed")
            item = group[name]
            if isinstance(item, h5py.Group):
                place = h5py.h5o.get_info(item.id).addr
                if place in seen:
                    raise ValueError(f"{item.name} is a group that is there under another name, too")
                seen.add(place)
                if name != "optimizer_weights":
                    walk(item, name)
                continue
            if item.is_virtual or item.external is not None:
                raise ValueError(f"{item.name} has its numbers in another file, which is not read")
            if item.dtype.kind not in "fiu":
                raise ValueError(f"{item.name} is of {item.dtype}: expected numbers")
            room -= item.nbytes
            if room < 0:
                raise ValueError(f"{item.name} claims {item.nbytes} bytes, more than the file has")
            values = np.asarray(item[()], dtype=np.float32)
            layers.setdefault(parent, {})[name.partition(":")[0]] = torch.from_numpy(np.atleast_1d(values))

    try:
        with h5py.File(path, "r") as file:
            walk(file.get("model_weights", file), "")
    except (OSError, KeyError, RuntimeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} is damaged ({error})") from error
    except ValueError as error:
        raise ValueError(f"checkpoint: {path}: {error}") from error
    return layers
