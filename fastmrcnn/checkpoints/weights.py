"""What a file of another library holds, in this library's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from fastmrcnn.checkpoints.native import ModelInfo
from fastmrcnn.models.config import ModelConfig, ModelName, build_model
from fastmrcnn.models.resnets import BODIES

Source = Literal["fastmrcnn", "torchvision", "detectron2", "mmdetection", "matterport", "maskscoring_rcnn"]

COUNTER = "num_batches_tracked"
"""Of batch norms: counts training steps, and has no part in results."""

SHOWN = 5


@dataclass
class Weights:
    """A detector in a file.

    Args:
        source: the library that wrote the file.
        info: what builds the detector.
        state: its `state_dict`.
        unused: names of tensors in the file that have no part in its results.
    """

    source: Source
    info: ModelInfo
    state: dict[str, Tensor]
    unused: list[str] = field(default_factory=list)


def translated(
    info: ModelInfo,
    given: Mapping[str, Tensor],
    name_of: Callable[[str], str],
    change: Callable[[str, Tensor], Tensor],
    ignored: Iterable[str] = (),
) -> tuple[dict[str, Tensor], list[str]]:
    """The `state_dict` of the model of `info`, from tensors by other names.

    Args:
        info: what builds the model.
        given: tensors of a file by name.
        name_of: the name there of one of ours.
        change: by our name and the tensor there, the tensor here.
        ignored: names in `given` that the model needs not use.

    Returns:
        The `state_dict`, and which of the `ignored` tensors, and counters of norms, it does not use.

    Raises:
        ValueError: the model lacks a tensor, or has one of another shape, or the file has others.
    """
    own = expected(info)
    state: dict[str, Tensor] = {}
    used = set()
    lacking, differing = [], []
    for name, shape in own.items():
        theirs = name_of(name)
        if theirs not in given:
            if not name.endswith(COUNTER):
                lacking.append(theirs)
            continue
        used.add(theirs)
        value = change(name, given[theirs])
        if value.shape != shape:
            differing.append(f"{theirs} {list(given[theirs].shape)}")
        state[name] = value
    left = [name for name in given if name not in used]
    surplus = [name for name in left if name not in set(ignored) and not name.endswith(COUNTER)]
    problems = [("lacks", lacking), ("has in other shapes", differing), ("also has", surplus)]
    if found := [f"{what} {some(names)}" for what, names in problems if names]:
        raise ValueError(f"it is no {info.config.name} of {info.config.conventions}: it {'; it '.join(found)}")
    return state, left


def expected(info: ModelInfo) -> dict[str, torch.Size]:
    """Names and shapes of the `state_dict` of the model of `info`."""
    with torch.device("meta"):
        model = build_model(info.config, len(info.class_names) + 1, info.num_keypoints, pretrained=False)
    return {name: value.shape for name, value in model.state_dict().items()}


def some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def resnet_of(width: Tensor, blocks: int) -> str:
    """The ResNet by the weight of the first 3x3 convolution [C, C / groups, 3, 3] and the number of blocks in stage 4.

    Raises:
        ValueError: there is none of the kind.
    """
    channels, per_group = width.shape[:2]
    groups = channels // max(1, per_group)
    for name, body in BODIES.items():
        if (body.groups, body.groups * body.width, body.blocks[2]) == (groups, channels, blocks):
            return name
    raise ValueError(
        f"it has a ResNet of {blocks} blocks in its fourth stage, with {groups} groups of {per_group} channels: "
        f"expected one of {', '.join(BODIES)}"
    )


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbers, from 0, follow `prefix` in `names`."""
    numbers = {rest.partition(".")[0] for name in names if (rest := name.removeprefix(prefix)) != name}
    return len(numbers)


def model_name(name: str) -> ModelName:
    """`name`, if a model is called so."""
    if name not in get_args(ModelName):
        raise ValueError(f"it holds a {name}, which is not among {', '.join(get_args(ModelName))}")
    return cast(ModelName, name)


def info_of(config: ModelConfig, num_objects: int, num_keypoints: int = 0, names: Sequence[str] = ()) -> ModelInfo:
    """What a model for `num_objects` classes, without the background, is.

    Names of classes are those given; of 80 or 90 classes COCO's; and numbers where nothing is known.
    """
    coco = [(i, name) for i, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]) if i]
    objects = [(i, name) for i, name in coco if name != "N/A"]
    if num_keypoints == 17 and num_objects == 1:
        known = objects[:1]
    else:
        known = {len(coco): coco, len(objects): objects}.get(
            num_objects, [(i, f"class {i}") for i in range(1, num_objects + 1)]
        )
    class_names = list(names) if len(names) == num_objects else [name for _, name in known]
    ids = [i for i, _ in known]
    if len(names) == num_objects and class_names != [name for _, name in known]:
        ids = list(range(1, num_objects + 1))
    return ModelInfo(config, class_names, ids, num_keypoints)
