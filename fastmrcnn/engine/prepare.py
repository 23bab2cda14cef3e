"""A detector made ready to be run many times: a copy, its layers fused, in the precision wanted."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from fastmrcnn.batches import DetectionBatch, ImageBatch, widen
from fastmrcnn.engine.fusion import fuse, has_hooks
from fastmrcnn.engine.layers import ClassMasks, FusedLinear, FusedRPNHead
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.roi_heads import Features, pool

HEADS = {
    "box_head": "box_roi_pool",
    "box_predictor": None,
    "mask_head": "mask_roi_pool",
    "keypoint_head": "keypoint_roi_pool",
    "keypoint_predictor": None,
}
"""Parts of `RoIHeads` that are fused, and what makes the input of those that see pooled maps."""


def prepare(model: GeneralizedRCNN, dtype: torch.dtype, *, with_masks: bool = True) -> GeneralizedRCNN:
    """A copy of `model` for inference alone, which gives the same detections.

    Convolutions include norms, activations and sums, the head of the RPN has one output, masks are computed of the
    predicted class only.

    Args:
        model: a detector of ours, on any device; it is left alone.
        dtype: of weights and maps; boxes and scores are float32 anyway.
        with_masks: leave the mask branch in.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    heads: Any = model.roi_heads
    if not with_masks:
        heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = heads.mask_iou_head = None
    examples = {name: None if pooler is None else pooled_like(model, pooler) for name, pooler in HEADS.items()}
    model.backbone = fuse(model.backbone)
    model.rpn.head = fused_rpn_head(model.rpn.head)
    for name, example in examples.items():
        if (head := getattr(heads, name, None)) is not None:
            setattr(heads, name, fuse(head, example))
    if heads.has_mask():
        heads.mask_predictor, own = fused_mask_predictor(heads.mask_predictor)
        if own:
            heads.masks = partial(class_masks, heads)
    model.to(dtype=dtype, memory_format=torch.channels_last)
    # In 16 bits a class score is off by a percent, and the side of a box by half of one; and these layers are small.
    if is_fused_linear(heads.box_predictor):
        heads.box_predictor.to(torch.promote_types(dtype, torch.float32))
    return model


def is_fused_linear(module: nn.Module) -> bool:
    """Whether all that a module learns is in fused linear layers."""
    layers = [m for m in module.modules() if isinstance(m, FusedLinear)]
    return len(list(module.parameters())) == sum(len(list(layer.parameters())) for layer in layers)


def pooled_like(model: GeneralizedRCNN, name: str) -> Tensor | None:
    """What the pooler `name` of a model makes of one RoI, in zeros; None where that is not known."""
    pooler, channels = getattr(model.roi_heads, name, None), getattr(model.backbone, "out_channels", None)
    if pooler is None or not isinstance(channels, int):
        return None
    return next(model.parameters()).new_zeros(1, channels, *pooler.output_size)


def fused_rpn_head(head: Any) -> nn.Module:
    """The head of an RPN, fused; torchvision's with one convolution in the place of two."""
    if type(head) is not RPNHead or any(map(has_hooks, head.modules())):
        return fuse(head)
    return FusedRPNHead(fuse(head.conv), head.cls_logits, head.bbox_pred)


def fused_mask_predictor(predictor: Any) -> tuple[nn.Module, bool]:
    """A mask predictor, fused; and whether it is torchvision's, which then is one of the predicted class."""
    if type(predictor) is not MaskRCNNPredictor or any(map(has_hooks, predictor.modules())):
        return fuse(predictor), False
    return ClassMasks(predictor.conv5_mask, predictor.mask_fcn_logits), True


def class_masks(
    heads: Any, features: Features, detections: DetectionBatch, images: ImageBatch
) -> tuple[Tensor, Tensor | None]:
    """`RoIHeads.masks` where the mask predictor is `ClassMasks`."""
    pooled = pool(heads.mask_roi_pool, features, detections.boxes, detections.valid, images)
    pooled = pooled.contiguous(memory_format=torch.channels_last)
    logits = heads.mask_predictor(heads.mask_head(pooled), detections.labels.clamp(min=0).flatten())
    logits = logits.unflatten(0, detections.labels.shape)
    return widen(logits).sigmoid(), heads.mask_scores(pooled, logits, detections)
