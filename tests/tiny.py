"""A torchvision Mask R-CNN of parts as users make them, that takes no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision.models.detection as torchvision_detection
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

IMAGES = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(i)) for i in range(2)]


class Backbone(nn.Module):
    """Maps of those names, each half as large as the one before; without names a tensor."""

    out_channels = 8

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 8, 8), *(nn.Conv2d(8, 8, 2, 2) for _ in names[1:])])

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x).relu()
            maps.append(x)
        return dict(zip(self.names, maps, strict=True)) if self.names else x


def tiny(
    detector: Callable[..., Any] = torchvision_detection.MaskRCNN, maps: Sequence[str] = ("0",), **options: Any
) -> Any:
    """In evaluation mode, with random weights, 3 classes and maps of those names from the backbone."""
    torch.manual_seed(0)
    names, levels = list(maps) or ["0"], max(1, len(maps))
    defaults: dict[str, Any] = {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_test": 40}
    return detector(
        Backbone(maps),
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),) * levels, ((0.5, 1.0, 2.0),) * levels),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(8 * 49, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, 3),
        **defaults | options,
    ).eval()
