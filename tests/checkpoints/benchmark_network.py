"""The detector of maskrcnn-benchmark, and of Mask Scoring R-CNN on it, written once more: see `foreign_networks`."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
import torchvision.ops
from checkpoints.foreign_files import NORM, Kind, State
from checkpoints.foreign_networks import DETECTIONS, SIZES, Found, Network, clip
from PIL import Image
from torch import Tensor
from torch.nn import functional

BENCHMARK_NAMES: list[tuple[str, Any]] = [
    (r"^backbone\.body\.stem\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"^backbone\.body\.stem\.", "backbone.bottom_up.stem."),
    (r"^backbone\.body\.layer(\d)", lambda found: f"backbone.bottom_up.res{int(found[1]) + 1}"),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^backbone\.fpn\.fpn_inner(\d)", lambda found: f"backbone.fpn_lateral{int(found[1]) + 1}"),
    (r"^backbone\.fpn\.fpn_layer(\d)", lambda found: f"backbone.fpn_output{int(found[1]) + 1}"),
    (r"^rpn\.head\.conv", "proposal_generator.rpn_head.conv"),
    (r"^rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"^roi_heads\.box\.feature_extractor\.fc(\d)", lambda found: f"roi_heads.box_head.fc{int(found[1]) - 5}"),
    (r"^roi_heads\.box\.predictor\.", "roi_heads.box_predictor."),
    (r"^roi_heads\.mask\.feature_extractor\.", "roi_heads.mask_head."),
    (r"^roi_heads\.mask\.predictor\.conv5_mask", "roi_heads.mask_head.deconv"),
    (r"^roi_heads\.mask\.predictor\.mask_fcn_logits", "roi_heads.mask_head.predictor"),
    (
        r"^roi_heads\.maskiou\.feature_extractor\.maskiou_fcn(\d)",
        lambda found: f"roi_head.mask_iou_head.convs.{int(found[1]) - 1}",
    ),
    (
        r"^roi_heads\.maskiou\.feature_extractor\.maskiou_fc(\d)",
        lambda found: f"roi_head.mask_iou_head.fcs.{int(found[1]) - 1}",
    ),
    (r"^roi_heads\.maskiou\.predictor\.maskiou", "roi_head.mask_iou_head.fc_mask_iou"),
]


def benchmark_name(name: str) -> str:
    """What maskrcnn-benchmark's tensor is called here."""
    for pattern, replacement in BENCHMARK_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def corner_anchors() -> list[Tensor]:
    """Of a cell per level, both corners inside: in a square of one stride, ratios rounded, then scaled."""
    levels = []
    for size, stride in zip(SIZES, (4, 8, 16, 32, 64), strict=True):
        rows = []
        for ratio in (0.5, 1.0, 2.0):
            width = np.round(np.sqrt(stride * stride / ratio))
            height = np.round(width * ratio)
            width, height, middle = width * size / stride, height * size / stride, 0.5 * (stride - 1)
            half = 0.5 * (width - 1), 0.5 * (height - 1)
            rows.append((middle - half[0], middle - half[1], middle + half[0], middle + half[1]))
        levels.append(torch.tensor(rows).float())
    return levels


class BenchmarkNetwork(Network):
    """maskrcnn-benchmark's, with a width of x2 - x1 + 1 everywhere, the background first, and no epsilon in norms."""

    def __init__(self, state: State, classes: int, shorter: int, longer: int) -> None:
        super().__init__(
            state,
            Kind(classes=classes, mask_iou=True),
            names=benchmark_name,
            stride_in_1x1=True,
            mean=[102.9801, 115.9465, 122.7717],
            std=[1.0, 1.0, 1.0],
            resize=lambda image, size: np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)),
            level=lambda scale: torch.floor(4 + torch.log2(scale / 224 + 1e-6)) - 2,
            shorter=shorter,
            longer=longer,
        )

    def normed(self, name: str, x: Tensor, **options: Any) -> Tensor:
        x = self.conv(name, x, **options)
        weight, bias, mean, var = (self.state[f"{name}.norm.{part}"][:, None, None] for part in NORM)
        scale = weight * var.rsqrt()
        return x * scale + (bias - mean * scale)

    def size(self, before: tuple[int, int]) -> tuple[int, int]:
        side, (height, width) = self.shorter, before
        if max(before) / min(before) * side > self.longer:
            side = round(self.longer * min(before) / max(before))
        return (int(side * height / width), side) if width < height else (side, int(side * width / height))

    def batch(self, image: Any) -> tuple[Tensor, tuple[int, int]]:
        height, width = self.size(image.shape[:2])
        pixels = torch.from_numpy(self.resize(image, (width, height)).astype(np.float64))
        x = (pixels - torch.tensor(self.mean, dtype=pixels.dtype)).permute(2, 0, 1)
        return functional.pad(x, (0, -width % 32, 0, -height % 32))[None], (height, width)

    def proposals(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        boxes, scores, levels = [], [], []
        for i, (x, cell) in enumerate(zip(maps, corner_anchors(), strict=True)):
            hidden = self.conv("proposal_generator.rpn_head.conv", x, padding=1).relu()
            logits = self.conv("proposal_generator.rpn_head.objectness_logits", hidden)[0].permute(1, 2, 0)
            deltas = self.conv("proposal_generator.rpn_head.anchor_deltas", hidden)[0]
            height, width = x.shape[-2:]
            shift = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")[::-1], dim=-1)
            anchors = (shift * 4 * 2**i).repeat(1, 1, 2)[:, :, None] + cell
            deltas = deltas.view(3, 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)
            decoded = corner_clip(corner_decode(deltas, anchors.reshape(-1, 4).double(), (1, 1, 1, 1)), size)
            best, index = logits.flatten().sort(descending=True, stable=True)
            boxes.append(decoded[index[: self.most]])
            scores.append(best[: self.most])
            levels.append(torch.full((len(boxes[-1]),), i))
        all_boxes, all_scores, all_levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        far = all_boxes + torch.tensor([0, 0, 1, 1])
        return all_boxes[torchvision.ops.batched_nms(far, all_scores, all_levels, 0.7)[: self.most]]

    def pooled(self, maps: list[Tensor], boxes: Tensor, size: int) -> Tensor:
        result = maps[0].new_zeros(len(boxes), 256, size, size)
        levels = self.level(torch.sqrt((boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1))).clamp(0, 3)
        for i, x in enumerate(maps[:4]):
            mine = levels == i
            result[mine] = torchvision.ops.roi_align(x, [boxes[mine]], size, 0.25 / 2**i, 2, False)
        return result

    @torch.inference_mode()
    def __call__(self, image: Any) -> Found:
        size = self.size(image.shape[:2])
        maps, proposals, features = self.regions(image)
        scores = self.linear("roi_heads.box_predictor.cls_score", features).softmax(dim=1)
        deltas = self.linear("roi_heads.box_predictor.bbox_pred", features).view(len(proposals), -1, 4)
        boxes = corner_decode(deltas, proposals[:, None].expand(deltas.shape), (10, 10, 5, 5))
        boxes = corner_clip(boxes.reshape(-1, 4), size).view(boxes.shape)
        scores[:, 0] = 0
        chosen = (scores > 0.05).nonzero()
        boxes, scores, classes = boxes[chosen[:, 0], chosen[:, 1]], scores[chosen[:, 0], chosen[:, 1]], chosen[:, 1]
        kept = torchvision.ops.batched_nms(boxes + torch.tensor([0, 0, 1, 1]), scores, classes, 0.5)[:DETECTIONS]
        boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        logits = self.mask_logits(maps, boxes)[torch.arange(len(boxes)), classes]
        iou = self.mask_iou(self.pooled(maps, boxes, 14), logits)[torch.arange(len(boxes)), classes]
        before = image.shape[:2]
        in_image = boxes * torch.tensor([before[1] / size[1], before[0] / size[0]]).double().repeat(2)
        masks = [corner_paste(mask, box, before) for mask, box in zip(logits.sigmoid(), in_image, strict=True)]
        return Found(in_image, scores, classes - 1, torch.stack(masks), mask_scores=scores * iou)


def corner_decode(deltas: Tensor, boxes: Tensor, weights: tuple[int, ...]) -> Tensor:
    dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1 + 1, y2 - y1 + 1
    x, y = dx * width + x1 + 0.5 * width, dy * height + y1 + 0.5 * height
    most = math.log(1000 / 16)
    width, height = dw.clamp(max=most).exp() * width, dh.clamp(max=most).exp() * height
    return torch.stack((x - 0.5 * width, y - 0.5 * height, x + 0.5 * width - 1, y + 0.5 * height - 1), dim=-1)


def corner_clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return clip(boxes, (size[0] - 1, size[1] - 1))


def corner_paste(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """A border of zeros around mask and box, the box cut off to whole pixels, both its ends inside."""
    padded = functional.pad(mask, (1, 1, 1, 1))
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (30 / 28)
    x1, y1, x2, y2 = torch.cat((middle - half, middle + half)).to(torch.int32).tolist()
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    large = functional.interpolate(padded[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    result = torch.zeros(size, dtype=torch.bool)
    left, right, top, bottom = max(x1, 0), min(x2 + 1, size[1]), max(y1, 0), min(y2 + 1, size[0])
    result[top:bottom, left:right] = large[top - y1 : bottom - y1, left - x1 : right - x1] > 0.5
    return result
