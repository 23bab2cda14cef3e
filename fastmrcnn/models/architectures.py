"""Two-stage detectors on ResNets that torchvision has no builders of, or with another library's conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from fastmrcnn.models.conventions import Conventions
from fastmrcnn.models.mask_rcnn import FasterRCNN, GeneralizedRCNN, KeypointRCNN, MaskRCNN
from fastmrcnn.models.resnets import BODIES, Neck, backbone_of, resnet

Kind = Literal["fasterrcnn", "maskrcnn", "keypointrcnn"]

STRIDES = {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "dc5": (16,)}
SIZES = (32, 64, 128, 256, 512)


class Architecture(NamedTuple):
    """A detector by its parts."""

    kind: Kind
    body: str
    neck: Neck

    @classmethod
    def of(cls, name: str) -> Architecture | None:
        """What `name`, such as maskrcnn_resnet50_c4, says; None if it says nothing of the kind."""
        kind, _, rest = name.partition("_")
        body, _, neck = rest.rpartition("_")
        if kind not in ("fasterrcnn", "maskrcnn", "keypointrcnn") or body not in BODIES or neck not in STRIDES:
            return None
        return cls(cast(Kind, kind), body, cast(Neck, neck))

    def __str__(self) -> str:
        return f"{self.kind}_{self.body}_{self.neck}"


class StageHead(nn.Module):
    """Stage 5 of a ResNet as the box head: [R, 1024, 14, 14] to [R, 2048], the mean of its maps."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.layer4 = stage

    def forward(self, pooled: Tensor) -> Tensor:
        """Features of RoIs."""
        return self.layer4(pooled).mean(dim=(2, 3))


def build(
    architecture: Architecture,
    conventions: Conventions,
    num_classes: int,
    num_keypoints: int = 17,
    *,
    weights_backbone: str | None = None,
    stride_in_1x1: bool | None = None,
    anchor_sizes: Sequence[int] | None = None,
    **options: Any,
) -> GeneralizedRCNN:
    """A detector with frozen norms, by the conventions of a library.

    Args:
        architecture: its parts.
        conventions: of the library.
        num_classes: with the background.
        num_keypoints: of a Keypoint R-CNN.
        weights_backbone: torchvision's weights of the ResNet, by name.
        stride_in_1x1: bottlenecks halve maps in their 1x1 convolution; by default as the library has it.
        anchor_sizes: one per level of a pyramid, or all of the one map.
        **options: of torchvision's `FasterRCNN`.
    """
    if stride_in_1x1 is None:
        stride_in_1x1 = conventions.stride_in_1x1 and BODIES[architecture.body].groups == 1
    network = resnet(architecture.body, weights_backbone, stride_in_1x1)
    backbone: Any = backbone_of(network, architecture.neck)
    pyramid, strides = architecture.neck == "fpn", STRIDES[architecture.neck]
    maps = ["0", "1", "2", "3"] if pyramid else ["0"]
    sizes = SIZES if anchor_sizes is None else tuple(anchor_sizes)
    parts: dict[str, Any] = conventions.options(not pyramid)
    parts["rpn_anchor_generator"] = conventions.anchors([(s,) for s in sizes] if pyramid else [sizes], strides)
    shared = StageHead(network.layer4) if architecture.neck == "c4" else None
    features = 2048 if shared else 1024
    parts["box_roi_pool"] = conventions.pooler(maps, 14 if shared else 7)
    parts["box_head"] = shared or TwoMLPHead(backbone.out_channels * 49, features)
    parts["box_predictor"] = FastRCNNPredictor(features, num_classes)
    classes: dict[Kind, type[FasterRCNN]] = {
        "fasterrcnn": FasterRCNN,
        "maskrcnn": MaskRCNN,
        "keypointrcnn": KeypointRCNN,
    }
    if architecture.kind == "maskrcnn":
        parts["mask_roi_pool"] = conventions.pooler(maps, 14)
        parts["mask_head"] = shared.layer4 if shared else MaskRCNNHeads(backbone.out_channels, (256,) * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(2048 if shared else 256, 256, num_classes)
    elif architecture.kind == "keypointrcnn":
        parts["keypoint_roi_pool"] = conventions.pooler(maps, 14)
        parts["keypoint_head"] = KeypointRCNNHeads(backbone.out_channels, (512,) * 8)
        parts["keypoint_predictor"] = KeypointRCNNPredictor(512, num_keypoints)
    model = classes[architecture.kind](backbone, **(parts | options))
    conventions.apply(model, not pyramid)
    return model
