"""Detectors with random weights that detect something, and comparisons between detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmrcnn_kernels.reference.boxes import pairwise_iou


def calibrate(model: nn.Module, images: list[Tensor]) -> None:
    """Make activations, scores and boxes of random weights spread as in a trained model, stage by stage."""
    heads = model.roi_heads
    before = heads.detections_per_img, heads.score_thresh
    heads.detections_per_img, heads.score_thresh = 10, 0.0  # always some to see how activations spread
    tensors = model.transform(list(images))[0].tensors
    settle_norms(model, lambda: model(list(images)))
    rescale([(block, 1.0) for block in model.backbone.fpn.inner_blocks], lambda: model.backbone(tensors))
    stages = [[(model.rpn.head.cls_logits, 2.0), (model.rpn.head.bbox_pred, 0.3)]]
    stages += [[(heads.box_predictor.cls_score, 2.5), (heads.box_predictor.bbox_pred, 1.0)]]
    if heads.has_mask():
        stages += [[(heads.mask_predictor.mask_fcn_logits, 2.0)]]
    if heads.has_keypoint():
        stages += [[(heads.keypoint_predictor.kps_score_lowres, 2.0)]]
    for layers in stages:
        rescale(layers, lambda: model(list(images)))
    heads.detections_per_img, heads.score_thresh = before


def settle_norms(model: nn.Module, run: Callable[[], object]) -> None:
    """Set the running statistics of batch norms to those of `run`, so that evaluation and training spread alike."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        run()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def rescale(stages: Sequence[tuple[nn.Module, float]], run: Callable[[], object]) -> None:
    """Scale the weights of layers so that the output of each spreads by the number beside it in `run`.

    A stage is a layer, or has it first; none may depend on another.  The bias of a linear layer becomes what makes its
    mean output 0: no class wins everywhere.
    """
    layers: list[Any] = [x if isinstance(x, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) else x[0] for x, _ in stages]
    seen: list[list[Tensor]] = [[] for _ in stages]
    handles = [
        layer.register_forward_hook(lambda _m, _i, output, outputs=outputs: outputs.append(output))
        for layer, outputs in zip(layers, seen, strict=True)
    ]
    with torch.no_grad():
        run()
        for layer, outputs, (_, wanted) in zip(layers, seen, stages, strict=True):
            scale = wanted / torch.cat([x.flatten() for x in outputs]).std()
            layer.weight *= scale
            if isinstance(layer, nn.Linear):
                layer.bias.copy_(scale * (layer.bias - torch.cat(outputs).mean(dim=0)))
    for handle in handles:
        handle.remove()


def agreement(theirs: Sequence[dict[str, Tensor]], ours: Sequence[dict[str, Tensor]]) -> float:
    """Share of the detections in a batch of images that have a twin in the other's: the smaller of both ways."""
    ways = []
    for a, b in ((theirs, ours), (ours, theirs)):
        found = torch.cat([have_twins(x, y) for x, y in zip(a, b, strict=True)])
        ways.append(found.double().mean().item() if len(found) else 1.0)
    return min(ways)


def have_twins(
    a: dict[str, Tensor], b: dict[str, Tensor], *, iou: float = 0.99, score: float = 1e-3, mask: float = 1e-2
) -> Tensor:
    """Which detections of `a` are in `b`, too: same label, IoU, score, mask and keypoints, bool [D]."""
    same = pairwise_iou(a["boxes"], b["boxes"]) > iou
    same &= a["labels"][:, None] == b["labels"]
    same &= (a["scores"][:, None] - b["scores"]).abs() < score
    if "masks" in a:
        for i, j in same.nonzero().tolist():
            inside = (a["masks"][i] > 0) | (b["masks"][j] > 0)
            same[i, j] = (
                (a["masks"][i].float() - b["masks"][j].float()).abs()[inside].mean() < mask if inside.any() else True
            )
    if "keypoints" in a:
        for i, j in same.nonzero().tolist():
            near = (a["keypoints"][i] - b["keypoints"][j]).abs().amax(dim=-1) < 1.0
            same[i, j] = near.float().mean() >= 0.9  # equal peaks of a heatmap may be far apart
    return same.any(dim=1)
