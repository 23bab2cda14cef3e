"""Pairs of equal detectors, torchvision's and ours, and ground truth for them."""

from __future__ import annotations

from typing import Any

import torch
import torchvision.models.detection as torchvision_detection
from torch import Tensor, nn

import fastmrcnn
from benchmarks.detectors import calibrate

BUILDERS = [
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "keypointrcnn_resnet50_fpn",
]

KINDS = [
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "keypointrcnn_resnet50_fpn",
]
"""One of each that differs."""


def pair(builder: str, images: list[Tensor], **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """torchvision's model and ours, in evaluation mode, with the same weights."""
    torch.manual_seed(0)
    arguments = {
        "weights": None,
        "weights_backbone": None,
        "rpn_post_nms_top_n_test": 100,
        "min_size": 224,
        "max_size": 320,
    } | kwargs
    theirs = getattr(torchvision_detection, builder)(**arguments).eval()
    calibrate(theirs, images)
    ours = getattr(fastmrcnn, builder)(**arguments).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The losses of a model, whose gradients are those of their sum."""
    model.train().zero_grad()
    losses = model(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    return losses


def targets_for(images: list[Tensor], counts: list[int], *, keypoints: int = 0) -> list[dict[str, Any]]:
    """Random rectangles as ground truth, `counts[i]` of them in `images[i]`, with boxes of the image's dtype."""
    generator = torch.Generator().manual_seed(1)
    targets = []
    for image, count in zip(images, counts, strict=True):
        height, width = image.shape[-2:]
        size = torch.tensor([width, height])
        start = torch.rand(count, 2, generator=generator) * 0.6 * size
        extent = (0.1 + 0.3 * torch.rand(count, 2, generator=generator)) * size
        boxes = torch.cat((start, start + extent), dim=1)
        y, x = torch.arange(height)[:, None], torch.arange(width)
        x1, y1, x2, y2 = (v[:, None, None] for v in boxes.unbind(1))
        masks = ((x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)).to(torch.uint8)
        target = {"boxes": boxes.to(image.dtype), "labels": torch.ones(count, dtype=torch.int64), "masks": masks}
        if keypoints:
            spread = torch.rand(count, keypoints, 2, generator=generator) * 1.2 - 0.1  # some lie outside their box
            xy = start[:, None] + spread * extent[:, None]
            target["keypoints"] = torch.cat((xy, torch.full((count, keypoints, 1), 2.0)), dim=-1)
        targets.append(target)
    return targets
