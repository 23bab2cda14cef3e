"""Which library wrote a file, by what is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from fastmrcnn.checkpoints import detectron2, maskscoring_rcnn, matterport, mmdetection, torchvision
from fastmrcnn.checkpoints.hdf5 import is_hdf5, load_layers
from fastmrcnn.checkpoints.native import FORMAT, ModelInfo, info_from
from fastmrcnn.checkpoints.tensors import digest, existing, load_content, parse_json, state_of
from fastmrcnn.checkpoints.weights import Weights, some

SourceOption = Literal[
    "auto",
    "fastmrcnn",
    "torchvision",
    "detectron2",
    "mmdetection",
    "mmdetection_caffe",
    "mmdetection_pytorch",
    "matterport",
    "maskscoring_rcnn",
]


def says_what_it_is(path: str | os.PathLike[str]) -> bool:
    """Whether a file tells the conventions of its network: all but a `state_dict` of torchvision's names."""
    if is_hdf5(path := existing(path)):
        return True
    content = load_content(path)
    names = state_of(content)
    if _own_info(content, path) is not None:
        return True
    return any(library.recognises(names) for library in (detectron2, mmdetection, maskscoring_rcnn))


def read_weights(path: str | os.PathLike[str], source: SourceOption = "auto") -> Weights:
    """The detector in a file, with `source` what wrote it, if that is not to be seen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no detector that this library has, or is damaged.
    """
    if source not in get_args(SourceOption):
        raise ValueError(f"source={source!r}: expected one of {', '.join(get_args(SourceOption))}")
    path = existing(path)
    if source == "matterport" or (source == "auto" and is_hdf5(path)):
        layers = load_layers(path)
        try:
            return matterport.convert(layers)
        except ValueError as error:
            raise ValueError(f"checkpoint: {path}: {error}") from error
    content = load_content(path)
    try:
        return _recognised(content, path, source)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path}: {error}") from error


def _recognised(content: Any, path: Path, source: str) -> Weights:
    meta = content if isinstance(content, Mapping) else {}
    given = state_of(content)
    if source in ("auto", "fastmrcnn") and (info := _own_info(content, path)) is not None:
        return Weights("fastmrcnn", info, given)
    if source == "detectron2" or (source == "auto" and detectron2.recognises(given)):
        return detectron2.convert(given)
    if source.startswith("mmdetection") or (source == "auto" and mmdetection.recognises(given)):
        style = source.partition("_")[2] or None
        about: Any = meta.get("meta")
        return mmdetection.convert(given, about if isinstance(about, Mapping) else {}, style)
    if source == "maskscoring_rcnn" or (source == "auto" and maskscoring_rcnn.recognises(given)):
        return maskscoring_rcnn.convert(given)
    if source == "torchvision" or (source == "auto" and torchvision.recognises(given)):
        return torchvision.convert(given, path.name, digest(path))
    found = f"tensors such as {some(list(given))}" if given else "no tensors with names"
    raise ValueError(f"it holds {found}, not those of a detector that this library has")


def _own_info(content: Any, path: Path) -> ModelInfo | None:
    """What a file of this library's says of its model; None for another's."""
    if not isinstance(content, Mapping):
        return None
    if content.get("format") == FORMAT:
        return info_from(content.get("info"))
    metadata = content.get("metadata")
    if isinstance(metadata, Mapping) and metadata.get("format") == FORMAT:
        return info_from(parse_json(str(metadata.get("info")), path))
    return None
