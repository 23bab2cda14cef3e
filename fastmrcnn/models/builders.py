"""The published architectures, under torchvision's names and with torchvision's arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.error import URLError

import torchvision.models.detection as torchvision_detection
from torch import nn

from fastmrcnn.models.adopt import adopt
from fastmrcnn.models.mask_rcnn import FasterRCNN, GeneralizedRCNN, KeypointRCNN, MaskRCNN
from fastmrcnn.models.preprocess import Preprocess
from fastmrcnn.models.roi_heads import RoIHeads
from fastmrcnn.models.rpn import RegionProposalNetwork

Arguments = ParamSpec("Arguments")
Model = TypeVar("Model", bound=GeneralizedRCNN)


def adopt_detector(model: nn.Module, model_class: type[Model]) -> Model:
    """torchvision's detector `model` and its parts, continued as `model_class`: see `adopt`."""
    detector = adopt(model, model_class, "model")
    for name, part in (("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads), ("transform", Preprocess)):
        setattr(detector, name, adopt(getattr(model, name, None), part, f"model.{name}"))
    return detector


def _ours(build: Callable[Arguments, nn.Module], model_class: type[Model], about: str) -> Callable[Arguments, Model]:
    """torchvision's builder `build`, its result continued as `model_class`."""

    @functools.wraps(build)
    def builder(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Model:
        try:
            model = build(*args, **kwargs)
        except URLError as error:
            raise RuntimeError(
                f"{build.__name__}: the pretrained weights could not be downloaded ({error.reason}). Without a network "
                "pass weights=None, weights_backbone=None, or put the file into torch.hub.get_dir()/checkpoints."
            ) from error
        return adopt_detector(model, model_class)

    builder.__module__ = __name__
    builder.__doc__ = (
        f"{about}\n\n    Arguments, defaults, pretrained weights and `state_dict` are those of\n"
        f"    `torchvision.models.detection.{build.__name__}`.\n    "
    )
    return builder


maskrcnn_resnet50_fpn = _ours(
    torchvision_detection.maskrcnn_resnet50_fpn, MaskRCNN, "Mask R-CNN, ResNet-50 and FPN (He et al., 2017)."
)
maskrcnn_resnet50_fpn_v2 = _ours(
    torchvision_detection.maskrcnn_resnet50_fpn_v2,
    MaskRCNN,
    "Mask R-CNN, ResNet-50 and FPN, with the batch norms and the box head of Li et al., 2021.",
)
fasterrcnn_resnet50_fpn = _ours(
    torchvision_detection.fasterrcnn_resnet50_fpn, FasterRCNN, "Faster R-CNN, ResNet-50 and FPN (Lin et al., 2017)."
)
fasterrcnn_resnet50_fpn_v2 = _ours(
    torchvision_detection.fasterrcnn_resnet50_fpn_v2,
    FasterRCNN,
    "Faster R-CNN, ResNet-50 and FPN, with the batch norms and the box head of Li et al., 2021.",
)
fasterrcnn_mobilenet_v3_large_fpn = _ours(
    torchvision_detection.fasterrcnn_mobilenet_v3_large_fpn, FasterRCNN, "Faster R-CNN, MobileNetV3-Large and FPN."
)
fasterrcnn_mobilenet_v3_large_320_fpn = _ours(
    torchvision_detection.fasterrcnn_mobilenet_v3_large_320_fpn,
    FasterRCNN,
    "Faster R-CNN, MobileNetV3-Large and FPN, for images of 320 pixels.",
)
keypointrcnn_resnet50_fpn = _ours(
    torchvision_detection.keypointrcnn_resnet50_fpn, KeypointRCNN, "Keypoint R-CNN, ResNet-50 and FPN."
)
