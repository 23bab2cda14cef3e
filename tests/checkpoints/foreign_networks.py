"""Detectors of detectron2 and MMDetection, written once more: what they compute of the tensors in their files.

From tensors by their names to detections, in plain PyTorch and torchvision's operations in float64, nothing of this
library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.ops
from checkpoints.foreign_files import NORM, Kind, State
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIZES = (32, 64, 128, 256, 512)
DETECTIONS = 30
"""At most so many per image, and twice as many proposals, since float64 takes its time."""


@dataclass
class Found:
    """Detections in pixels of the image, classes from 0, best first."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    mask_scores: Tensor | None = None


class Network:
    """What both libraries compute; where they differ it is in the arguments.

    Args:
        state: tensors by `names`.
        kind: what they are of.
        names: the names of detectron2 for those of `state`.
        stride_in_1x1: stages halve maps in their first convolution.
        mean, std: of the image as it is, in bytes.
        resize: a uint8 array [H, W, 3] and (width, height) to another.
        level: pyramid level of a RoI by its scale in pixels.
        shorter, longer: sides of resized images.
        most: proposals of each level, and in all.
    """

    def __init__(
        self,
        state: State,
        kind: Kind,
        *,
        names: Callable[[str], str] = lambda name: name,
        stride_in_1x1: bool,
        mean: list[float],
        std: list[float],
        resize: Callable[[Any, tuple[int, int]], Any],
        level: Callable[[Tensor], Tensor],
        shorter: int,
        longer: int,
        most: int = 2 * DETECTIONS,
    ) -> None:
        self.state = {names(name): value.double() for name, value in state.items()}
        self.theirs = {names(name): name for name in state}
        self.kind = kind
        self.stride_in_1x1, self.mean, self.std, self.resize, self.level = stride_in_1x1, mean, std, resize, level
        self.shorter, self.longer, self.most = shorter, longer, most
        self.seen: tuple[Any, list[Tensor], Tensor, Tensor] | None = None
        self.bottom = "backbone.bottom_up." if kind.neck == "fpn" else "backbone."

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        return functional.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def normed(self, name: str, x: Tensor, **options: Any) -> Tensor:
        x = self.conv(name, x, **options)
        weight, bias, mean, var = (self.state[f"{name}.norm.{part}"][:, None, None] for part in NORM)
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def stage(self, where: str, x: Tensor, blocks: int, stride: int, dilation: int = 1) -> Tensor:
        for i in range(blocks):
            s = stride if i == 0 else 1
            first, second = (s, 1) if self.stride_in_1x1 else (1, s)
            name = f"{where}.{i}"
            y = self.normed(f"{name}.conv1", x, stride=first).relu()
            options = {"stride": second, "padding": dilation, "dilation": dilation, "groups": self.kind.groups}
            y = self.normed(f"{name}.conv2", y, **options).relu()
            y = self.normed(f"{name}.conv3", y)
            x = (y + (self.normed(f"{name}.shortcut", x, stride=s) if i == 0 else x)).relu()
        return x

    def maps(self, x: Tensor) -> list[Tensor]:
        x = self.normed(f"{self.bottom}stem.conv1", x, stride=2, padding=3).relu()
        x = functional.max_pool2d(x, 3, 2, 1)
        stages = []
        for stage in (2, 3, 4) if self.kind.neck == "c4" else (2, 3, 4, 5):
            dilated = stage == 5 and self.kind.neck == "dc5"
            stride = 1 if stage == 2 or dilated else 2
            x = self.stage(f"{self.bottom}res{stage}", x, self.kind.blocks[stage - 2], stride, 2 if dilated else 1)
            stages.append(x)
        if self.kind.neck != "fpn":
            return [x]
        found: list[Tensor] = []
        above = None
        for stage in (5, 4, 3, 2):
            lateral = self.conv(f"backbone.fpn_lateral{stage}", stages[stage - 2])
            above = lateral if above is None else lateral + functional.interpolate(above, scale_factor=2.0)
            found.insert(0, self.conv(f"backbone.fpn_output{stage}", above, padding=1))
        return [*found, found[-1][:, :, ::2, ::2]]

    def proposals(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        boxes, scores, levels = [], [], []
        for i, x in enumerate(maps):
            stride = 4 * 2**i if self.kind.neck == "fpn" else 16
            hidden = self.conv("proposal_generator.rpn_head.conv", x, padding=1).relu()
            logits = self.conv("proposal_generator.rpn_head.objectness_logits", hidden)[0]
            deltas = self.conv("proposal_generator.rpn_head.anchor_deltas", hidden)[0]
            sides = []
            for s in (SIZES[i],) if self.kind.neck == "fpn" else SIZES:
                for ratio in (0.5, 1.0, 2.0):
                    width = math.sqrt(s * s / ratio)
                    sides.append((width, ratio * width))
            sides = torch.tensor(sides)
            height, width = x.shape[-2:]
            y, x_, _ = torch.meshgrid(
                torch.arange(height), torch.arange(width), torch.arange(len(sides)), indexing="ij"
            )
            centers = torch.stack((x_, y), dim=-1) * stride
            logits = logits.permute(1, 2, 0)
            deltas = deltas.view(len(sides), 4, height, width).permute(2, 3, 0, 1)
            decoded = decode(deltas, centers, sides.expand(height, width, -1, -1), (1, 1, 1, 1)).reshape(-1, 4)
            best, index = logits.flatten().sort(descending=True, stable=True)
            index = index[: self.most]
            boxes.append(clip(decoded[index], size))
            scores.append(best[: self.most])
            levels.append(torch.full((len(index),), i))
        all_boxes, all_scores, all_levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        full = (all_boxes[:, 2] > all_boxes[:, 0]) & (all_boxes[:, 3] > all_boxes[:, 1])
        all_boxes, all_scores, all_levels = all_boxes[full], all_scores[full], all_levels[full]
        kept = torchvision.ops.batched_nms(all_boxes, all_scores, all_levels, 0.7)[: self.most]
        return all_boxes[kept]

    def pooled(self, maps: list[Tensor], boxes: Tensor, size: int) -> Tensor:
        result = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
        scale = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        levels = self.level(scale).clamp(0, 3) if self.kind.neck == "fpn" else torch.zeros(len(boxes))
        for i, x in enumerate(maps[:4]):
            mine = levels == i
            stride = 4 * 2**i if self.kind.neck == "fpn" else 16
            result[mine] = torchvision.ops.roi_align(x, [boxes[mine]], size, 1 / stride, 0, True)
        return result

    def saved(self) -> State:
        """What a file would hold, float32 as ever."""
        return {self.theirs[name]: value.float() for name, value in self.state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def upsampled(self, name: str, x: Tensor, **options: int) -> Tensor:
        return functional.conv_transpose2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def box_features(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        if self.kind.neck == "c4":
            return self.stage("roi_heads.res5", self.pooled(maps, boxes, 14), 3, 2).mean(dim=(2, 3))
        x = self.linear("roi_heads.box_head.fc1", self.pooled(maps, boxes, 7).flatten(1)).relu()
        return self.linear("roi_heads.box_head.fc2", x).relu()

    def mask_logits(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        x = self.pooled(maps, boxes, 14)
        if self.kind.neck == "c4":
            x = self.stage("roi_heads.res5", x, 3, 2)
        else:
            for i in (1, 2, 3, 4):
                x = self.conv(f"roi_heads.mask_head.mask_fcn{i}", x, padding=1).relu()
        x = self.upsampled("roi_heads.mask_head.deconv", x, stride=2).relu()
        return self.conv("roi_heads.mask_head.predictor", x)

    def size(self, before: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image is resized to."""
        scale = self.shorter / min(before)
        sides = [scale * side for side in before]
        if max(sides) > self.longer:
            sides = [side * self.longer / max(sides) for side in sides]
        height, width = (int(side + 0.5) for side in sides)
        return height, width

    def batch(self, image: Any) -> tuple[Tensor, tuple[int, int]]:
        """The image as the layers see it, and its size without padding."""
        height, width = self.size(image.shape[:2])
        pixels = torch.from_numpy(self.resize(image, (width, height)).astype(np.float64))
        x = (pixels - torch.tensor(self.mean, dtype=pixels.dtype)) / torch.tensor(self.std, dtype=pixels.dtype)
        multiple = 32 if self.kind.neck == "fpn" else 1
        return functional.pad(x.permute(2, 0, 1), (0, -width % multiple, 0, -height % multiple))[None], (height, width)

    def regions(self, image: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """Feature maps, proposals, and what the last layers of the box head see; kept for one image."""
        if self.seen is None or self.seen[0] is not image:
            x, size = self.batch(image)
            maps = self.maps(x)
            proposals = self.proposals(maps, size)
            self.seen = image, maps, proposals, self.box_features(maps, proposals)
        return self.seen[1:]

    @torch.inference_mode()
    def calibrate(self, image: Any) -> None:
        """Change the last layers so that RoIs of this image differ, in class and box, as those of a trained network."""
        features = self.regions(image)[2]
        for name, spread in (("cls_score", 3.0), ("bbox_pred", 0.5)):
            layer = f"roi_heads.box_predictor.{name}"
            values = self.linear(layer, features)
            scale = spread / (values - values.mean(dim=0)).std()
            self.state[f"{layer}.weight"].mul_(scale)
            self.state[f"{layer}.bias"].sub_(values.mean(dim=0)).mul_(scale)
            for part in ("weight", "bias"):
                self.state[f"{layer}.{part}"] = self.state[f"{layer}.{part}"].float().double()

    def mask_iou(self, x: Tensor, logits: Tensor) -> Tensor:
        where = "roi_head.mask_iou_head"
        x = torch.cat((x, functional.max_pool2d(logits.sigmoid()[:, None], 2)), dim=1)
        for i in range(4):
            x = self.conv(f"{where}.convs.{i}", x, padding=1, stride=2 if i == 3 else 1).relu()
        x = self.linear(f"{where}.fcs.0", x.flatten(1)).relu()
        return self.linear(f"{where}.fc_mask_iou", self.linear(f"{where}.fcs.1", x).relu())

    @torch.inference_mode()
    def __call__(self, image: Any) -> Found:
        """Detections in a uint8 image [H, W, 3], in the network's order of channels."""
        before = image.shape[:2]
        height, width = self.size(before)
        maps, proposals, features = self.regions(image)
        scores = self.linear("roi_heads.box_predictor.cls_score", features).softmax(dim=1)[:, :-1]
        deltas = self.linear("roi_heads.box_predictor.bbox_pred", features).view(len(proposals), -1, 4)
        centers, extents = (proposals[:, :2] + proposals[:, 2:]) / 2, proposals[:, 2:] - proposals[:, :2]
        boxes = decode(deltas, centers[:, None], extents[:, None], (10, 10, 5, 5))
        boxes = clip(boxes.reshape(-1, 4), (height, width)).view(boxes.shape)
        chosen = (scores > 0.05).nonzero()
        boxes, scores, classes = boxes[chosen[:, 0], chosen[:, 1]], scores[chosen[:, 0], chosen[:, 1]], chosen[:, 1]
        kept = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)[:DETECTIONS]
        boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        found = Found(boxes * torch.tensor([before[1] / width, before[0] / height]).repeat(2), scores, classes)
        if self.kind.mask:
            logits = self.mask_logits(maps, boxes)[torch.arange(len(boxes)), classes]
            found.masks = paste(logits.sigmoid(), found.boxes, before)
            if self.kind.mask_iou:
                iou = self.mask_iou(self.pooled(maps, boxes, 14), logits)
                found.mask_scores = scores * iou[torch.arange(len(boxes)), classes]
        if self.kind.keypoints:
            found.keypoints = self.keypoints(maps, boxes)
            found.keypoints[..., :2] *= torch.tensor([before[1] / width, before[0] / height])
        return found

    def keypoints(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        x = self.pooled(maps, boxes, 14)
        for i in range(1, 9):
            x = self.conv(f"roi_heads.keypoint_head.conv_fcn{i}", x, padding=1).relu()
        x = self.upsampled("roi_heads.keypoint_head.score_lowres", x, stride=2, padding=1)
        heatmaps = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        result = heatmaps.new_zeros(len(boxes), heatmaps.shape[1], 3)
        for i, (box, maps_of_box) in enumerate(zip(boxes, heatmaps, strict=True)):
            width, height = (box[2:] - box[:2]).clamp(min=1)
            columns, rows = math.ceil(width), math.ceil(height)
            large = functional.interpolate(maps_of_box[None], (rows, columns), mode="bicubic", align_corners=False)[0]
            for k, heatmap in enumerate(large):
                y, x_ = divmod(int(heatmap.argmax()), columns)
                peak = heatmap[y, x_]
                score = 1 / (maps_of_box[k] - peak).exp().sum()
                position = box[:2] + torch.tensor([(x_ + 0.5) * width / columns, (y + 0.5) * height / rows])
                result[i, k] = torch.tensor([*position, score])
        return result


def decode(deltas: Tensor, centers: Tensor, extents: Tensor, weights: tuple[int, ...]) -> Tensor:
    dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(-1)
    most = math.log(1000 / 16)
    x, y = dx * extents[..., 0] + centers[..., 0], dy * extents[..., 1] + centers[..., 1]
    width, height = dw.clamp(max=most).exp() * extents[..., 0], dh.clamp(max=most).exp() * extents[..., 1]
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.stack((boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])), dim=2).flatten(1)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """detectron2's and MMDetection's: sampled at the centres of pixels, a half or more is inside."""
    x = ((torch.arange(size[1]).to(boxes) + 0.5)[None] - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = ((torch.arange(size[0]).to(boxes) + 0.5)[None] - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])), dim=3)
    return functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def detectron2_network(state: State, kind: Kind, shorter: int, longer: int) -> Network:
    """Sees BGR."""
    return Network(
        state,
        kind,
        stride_in_1x1=kind.groups == 1,
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0] if kind.groups == 1 else [57.375, 57.12, 58.395],
        resize=lambda image, size: np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)),
        level=lambda scale: torch.floor(4 + torch.log2(scale / 224 + 1e-8)) - 2,
        shorter=shorter,
        longer=longer,
    )


MMDETECTION_NAMES = [
    (r"^backbone\.conv1\.", "stem.conv1."),
    (r"^backbone\.bn1\.", "stem.conv1.norm."),
    (r"^backbone\.layer1\.", "res2."),
    (r"^backbone\.layer2\.", "res3."),
    (r"^backbone\.layer3\.", "res4."),
    (r"^backbone\.layer4\.", "res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^(stem|res)", r"backbone.bottom_up.\1"),
    (r"^neck\.lateral_convs\.(\d)\.conv", lambda found: f"backbone.fpn_lateral{int(found[1]) + 2}"),
    (r"^neck\.fpn_convs\.(\d)\.conv", lambda found: f"backbone.fpn_output{int(found[1]) + 2}"),
    (r"^rpn_head\.rpn_conv", "proposal_generator.rpn_head.conv"),
    (r"^rpn_head\.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn_head\.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
    (r"^roi_head\.bbox_head\.shared_fcs\.(\d)", lambda found: f"roi_heads.box_head.fc{int(found[1]) + 1}"),
    (r"^roi_head\.bbox_head\.fc_cls", "roi_heads.box_predictor.cls_score"),
    (r"^roi_head\.bbox_head\.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv", lambda found: f"roi_heads.mask_head.mask_fcn{int(found[1]) + 1}"),
    (r"^roi_head\.mask_head\.upsample", "roi_heads.mask_head.deconv"),
    (r"^roi_head\.mask_head\.conv_logits", "roi_heads.mask_head.predictor"),
]


def mmdetection_name(name: str) -> str:
    """What detectron2 calls a tensor of MMDetection's."""
    for pattern, replacement in MMDETECTION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def opencv_bytes(image: Any, size: tuple[int, int]) -> Any:
    """`cv2.resize` of bytes, whose weights are integers of 2048: columns first, four bits dropped, then rows."""

    def weights(before: int, after: int) -> tuple[Any, Any]:
        position = ((np.arange(after) + 0.5) * (1 / (after / before)) - 0.5).astype(np.float32)
        first = np.floor(position).astype(int)
        share = position - first
        return first, np.stack((np.rint((1 - share) * np.float32(2048)), np.rint(share * np.float32(2048)))).astype(int)

    image = image.astype(int)
    first, (a, b) = weights(image.shape[1], size[0])
    a, b = np.where((first < 0) | (first >= image.shape[1] - 1), [[2048], [0]], (a, b))
    left, right = (np.clip(first + i, 0, image.shape[1] - 1) for i in (0, 1))
    left = np.where(first < 0, 0, left)
    columns = (image[:, left] * a[:, None] + image[:, right] * b[:, None]) >> 4
    first, (a, b) = weights(image.shape[0], size[1])
    upper, lower = (np.clip(first + i, 0, image.shape[0] - 1) for i in (0, 1))
    rows = [(columns[which] * w[:, None, None]) >> 16 for which, w in ((upper, a), (lower, b))]
    return (sum(rows) + 2) >> 2


def mmdetection_network(state: State, kind: Kind, shorter: int, longer: int, *, caffe: bool) -> Network:
    """Sees BGR in the caffe style, RGB in PyTorch's."""
    return Network(
        state,
        kind,
        names=mmdetection_name,
        stride_in_1x1=caffe,
        mean=[103.530, 116.280, 123.675] if caffe else [123.675, 116.28, 103.53],
        std=[1.0, 1.0, 1.0] if caffe else [58.395, 57.12, 57.375],
        resize=opencv_bytes,
        level=lambda scale: torch.floor(torch.log2(scale / 56 + 1e-6)),
        shorter=shorter,
        longer=longer,
    )
