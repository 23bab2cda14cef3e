"""Mask Scoring R-CNN (Huang et al., 2019): how good each mask is, learned beside it.

The head sees what the mask head saw, and the mask it made, and tells for each class the IoU of that mask with the
object's.  A mask's score is that of its class times this IoU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmrcnn import ops
from fastmrcnn.batches import TargetBatch, widen
from fastmrcnn.models.losses import mean_over
from fastmrcnn.models.sampling import gather

LEVELS = 4
"""Convolutions of the head, of which the last halves the maps."""


class MaskIoUHead(nn.Module):
    """Features [R, C, P, P] and mask logits [R, 2P, 2P] to the IoU of the mask if its class were this or that.

    Args:
        in_channels: C of the features.
        pooled: P, their size.
        num_classes: with the background.
        channels: of the convolutions.
        hidden: width of the linear layers.
    """

    def __init__(
        self, in_channels: int, pooled: int, num_classes: int, channels: int = 256, hidden: int = 1024
    ) -> None:
        super().__init__()
        widths = [in_channels + 1, *[channels] * LEVELS]
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], channels, 3, stride=2 if i == LEVELS - 1 else 1, padding=1) for i in range(LEVELS)
        )
        self.fcs = nn.ModuleList([nn.Linear(channels * ((pooled + 1) // 2) ** 2, hidden), nn.Linear(hidden, hidden)])
        self.fc_mask_iou = nn.Linear(hidden, num_classes)
        for convolution in self.convs:
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
        for layer in self.fcs:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.fc_mask_iou.weight, std=0.01)
        nn.init.zeros_(self.fc_mask_iou.bias)

    def forward(self, features: Tensor, mask_logits: Tensor) -> Tensor:
        """IoU [R, classes]."""
        masks = functional.max_pool2d(mask_logits.sigmoid()[:, None], 2)
        x = torch.cat((features, masks.to(features.dtype)), dim=1)
        for convolution in self.convs:
            x = convolution(x).relu()
        x = x.flatten(1)
        for layer in self.fcs:
            x = layer(x).relu()
        return self.fc_mask_iou(x)


def iou_targets(mask_logits: Tensor, boxes: Tensor, matched: Tensor, valid: Tensor, targets: TargetBatch) -> Tensor:
    """IoU [N, S] of predicted masks, `mask_logits` [N, S, M, M] above 0, with the whole objects they are matched to.

    Inside its box [N, S, 4] a mask is compared cell by cell; what of the object lies outside of the box counts by its
    area.  Areas are those of the objects in their own boxes, 2 M cells each way, so that nothing is as large as an
    image; 0 where not `valid`.
    """
    assert targets.masks is not None
    masks, cells = targets.masks, mask_logits.shape[-1]
    of_masks = (masks.words, masks.offsets, masks.views)
    # Half a pixel less: the mask loss compares with masks as torchvision's RoIAlign sees them, this where they are.
    wanted = ops.mask_targets(*of_masks, boxes - 0.5, matched, valid, cells) >= 0.5
    objects = torch.arange(targets.boxes.shape[1], device=boxes.device).expand(targets.boxes.shape[:2])
    inside = ops.mask_targets(*of_masks, targets.boxes - 0.5, objects, targets.valid, 2 * cells)
    areas = inside.mean(dim=(-2, -1)) * _areas(targets.boxes)

    predicted = mask_logits > 0
    overlap = (predicted & wanted).sum(dim=(-2, -1))
    whole = gather(areas, matched) / _areas(boxes) * cells**2
    whole = torch.maximum(whole, wanted.sum(dim=(-2, -1)).to(whole.dtype))
    union = predicted.sum(dim=(-2, -1)) + whole - overlap
    return torch.where(valid & (union > 0), overlap / union.clamp(min=1e-6), 0)


def mask_iou_loss(iou: Tensor, wanted: Tensor) -> Tensor:
    """Half the squared error of `iou` [N, S], the mean over those whose `wanted` IoU [N, S] is above 0."""
    return mean_over(0.5 * (widen(iou) - wanted) ** 2, wanted > 0)


def _areas(boxes: Tensor) -> Tensor:
    extent = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)  # as mask targets make them
    return extent[..., 0] * extent[..., 1]
