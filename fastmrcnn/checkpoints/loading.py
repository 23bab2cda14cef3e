"""Trained detectors from files of any of the libraries that publish them."""

from __future__ import annotations

import os
import re
import urllib.parse
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from fastmrcnn.checkpoints.initial import take_over
from fastmrcnn.checkpoints.native import ModelInfo, load_strictly
from fastmrcnn.checkpoints.reading import SourceOption, read_weights
from fastmrcnn.checkpoints.tensors import digest
from fastmrcnn.checkpoints.weights import Weights, info_of
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN

LEAST_HASH = 8
"""Hexadecimal digits of a hash in the name of a file."""


def load(
    path_or_url: str | os.PathLike[str],
    *,
    source: SourceOption = "auto",
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> GeneralizedRCNN:
    """The detector in a file of this library, torchvision, detectron2 (also Detectron's), MMDetection or matterport.

    It has that library's results: its way to resize and normalise images, its anchors, its RoIAlign, its masks.  Images
    are RGB in 0 .. 1, and labels begin with 1, as in torchvision, whatever the library has.  Nothing in the file is
    executed.

    Args:
        path_or_url: a file, or where to get one.  A URL ends in `#sha256=` and the hash of the file, or in a name that
            has its first digits, such as `model-bf2d0c1e.pth`; the file is kept in `torch.hub.get_dir()`.
        source: what wrote the file, if that is not to be seen in it; of MMDetection also the style of the network.
        num_classes: with the background; of another number than the file's all but the last layers is loaded, and a
            warning says which are new.
        device: where the model is to be; by default on the CPU.
        **options: of `fastmrcnn.models.config.ModelConfig`, such as `min_size`, that differ from the file's.

    Returns:
        The detector in evaluation mode.  Its `info` has its configuration, names of classes and category ids.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no detector that this library has, or is damaged; or an option does not exist.
    """
    known = {f.name for f in fields(ModelConfig)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{unknown[0]}: there is no such option; there are {', '.join(sorted(known))}")
    weights = read_weights(local(path_or_url), source)
    model = model_of(weights, num_classes, options)
    return model.to(device or "cpu").eval()


def load_model(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[GeneralizedRCNN, ModelInfo]:
    """The model in a file that `load` takes, in evaluation mode on `device` (by default the CPU), and what it is."""
    model = load(path, device=device)
    assert model.info is not None
    return model, model.info


def model_of(
    weights: Weights, num_classes: int | None = None, options: Mapping[str, Any] | None = None
) -> GeneralizedRCNN:
    """The detector with `weights`, in training mode; see `load`."""
    info = replace(weights.info, config=replace(weights.info.config, **(options or {})))
    classes = len(info.class_names) + 1
    if num_classes is not None and num_classes != classes:
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: expected the background and at least one more")
        info = info_of(info.config, num_classes - 1, info.num_keypoints)
    model = build_model(info.config, len(info.class_names) + 1, info.num_keypoints, pretrained=False)
    model.info = info
    if len(info.class_names) + 1 == classes:
        load_strictly(model, weights.state)
    else:
        report = take_over(model, weights.state, weights.source)
        warnings.warn(f"of {num_classes} classes, not {classes}: {', '.join(report.anew)} start anew", stacklevel=3)
    return model


def local(path_or_url: str | os.PathLike[str]) -> Path:
    """The file at a path, or, downloaded once and checked, at a URL."""
    text = os.fspath(path_or_url)
    if not re.match(r"https?://", text):
        return Path(text)
    parts = urllib.parse.urlsplit(text)
    name = Path(urllib.parse.unquote(parts.path)).name
    stated = dict(urllib.parse.parse_qsl(parts.fragment)).get("sha256", "")
    in_name = re.search(rf"-([0-9a-f]{{{LEAST_HASH},64}})\.\w+$", name)
    expected = stated.lower() or (in_name[1] if in_name else "")
    if not re.fullmatch(rf"[0-9a-f]{{{LEAST_HASH},64}}", expected):
        raise ValueError(
            f"path_or_url: {text} has no hash to check the file by; add #sha256= and the SHA-256 that its "
            "publisher states"
        )
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{expected[:LEAST_HASH]}-{name}"
    if target.is_file() and digest(target).startswith(expected):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(urllib.parse.urlunsplit(parts._replace(fragment="")), str(target), expected)
    except URLError as error:
        raise OSError(f"path_or_url: {text} could not be downloaded ({error.reason})") from error
    except RuntimeError as error:  # what PyTorch makes of a wrong hash
        raise ValueError(f"path_or_url: {text} is not the file it should be ({error})") from error
    return target
