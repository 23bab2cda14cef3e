"""The detector of matterport/Mask_RCNN, written once more: what its `detect` returns.

From weights by their Keras layers to detections, in plain PyTorch and NumPy in float64, nothing of this library.
Boxes are (y1, x1, y2, x2), and between the layers they are normalised: 0 and 1 are the centres of the first and the
last pixel of the padded image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from checkpoints.foreign_files import BLOCKS
from checkpoints.matterport_files import NORM, Weights
from torch import Tensor
from torch.nn import functional

Window = tuple[int, int, int, int]

DEVIATIONS = (0.1, 0.1, 0.2, 0.2)


@dataclass
class Detected:
    """What `detect` returns for an image, and what it is made of.

    Attributes:
        rois: int32 [D, 4] in pixels of the image, best first.
        class_ids: int32 [D], the background is 0.
        scores: float64 [D].
        masks: bool [H, W, D].
        boxes: float64 [D, 4], the RoIs before rounding, normalised and in the padded image.
        small_masks: float64 [D, 28, 28], probabilities.
    """

    rois: np.ndarray
    class_ids: np.ndarray
    scores: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    small_masks: np.ndarray


class MatterportNetwork:
    """Inference with matterport's model, `IMAGE_RESIZE_MODE` "square", one image at a time.

    Stages are methods, in the order of `__call__`. Maps are [1, C, H, W] and RoIs' features [N, C, H, W].

    Args:
        weights: by Keras layer, as of `random_weights`.
        depth, classes: as in `matterport_shapes`.
        image_min_dim, image_max_dim: sides of resized images, the latter a multiple of 64.
        pre_nms_limit, post_nms, rpn_nms: for proposals.
        min_confidence, nms, max_instances: for detections.
        mean_pixel: of RGB.
        scales, ratios, strides: of anchors; ratios are width / height.
    """

    def __init__(
        self,
        weights: Weights,
        depth: str = "50",
        classes: int = 81,
        *,
        image_min_dim: int = 800,
        image_max_dim: int = 1024,
        pre_nms_limit: int = 6000,
        post_nms: int = 1000,
        rpn_nms: float = 0.7,
        min_confidence: float = 0.7,
        nms: float = 0.3,
        max_instances: int = 100,
        mean_pixel: Sequence[float] = (123.7, 116.8, 103.9),
        scales: Sequence[float] = (32, 64, 128, 256, 512),
        ratios: Sequence[float] = (0.5, 1, 2),
        strides: Sequence[int] = (4, 8, 16, 32, 64),
    ) -> None:
        if image_max_dim % 64:
            raise ValueError(f"image_max_dim {image_max_dim} is not a multiple of 64")
        self.weights = {
            layer: {part: torch.from_numpy(np.asarray(values, dtype=np.float64)) for part, values in parts.items()}
            for layer, parts in weights.items()
        }
        self.blocks, self.classes = BLOCKS[depth], classes
        self.image_min_dim, self.image_max_dim = image_min_dim, image_max_dim
        self.pre_nms_limit, self.post_nms, self.rpn_nms = pre_nms_limit, post_nms, rpn_nms
        self.min_confidence, self.nms, self.max_instances = min_confidence, nms, max_instances
        self.mean_pixel = np.array(mean_pixel)
        self.scales, self.ratios, self.strides = scales, ratios, strides

    def saved(self) -> Weights:
        """What a file would hold, float32 as ever."""
        return {
            layer: {part: values.numpy().astype(np.float32) for part, values in parts.items()}
            for layer, parts in self.weights.items()
        }

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> Detected:
        """Detections in a uint8 image [H, W, 3], RGB."""
        x, window = self.mold(image)
        maps = self.maps(x)
        _, probabilities, deltas = self.rpn(maps)
        rois = self.proposals(probabilities[:, 1], deltas)
        _, probabilities, deltas = self.classify(self.pooled(maps, rois, 7))
        boxes, class_ids, scores = self.refine(rois, probabilities, deltas, window)
        masks = self.mask_probabilities(self.pooled(maps, boxes, 14))
        return self.unmold(boxes, class_ids, scores, masks, image.shape[:2], window)

    # the image

    def mold(self, image: np.ndarray) -> tuple[Tensor, Window]:
        """What the layers see, [1, 3, S, S], and where in it the image is, in pixels, ends excluded."""
        height, width = image.shape[:2]
        scale = max(1, self.image_min_dim / min(height, width))
        if round(max(height, width) * scale) > self.image_max_dim:
            scale = self.image_max_dim / max(height, width)
        pixels = image
        if scale != 1:
            pixels = resized(image, (round(height * scale), round(width * scale))).astype(np.uint8)
        height, width = pixels.shape[:2]
        top, left = (self.image_max_dim - height) // 2, (self.image_max_dim - width) // 2
        padded = np.zeros((self.image_max_dim, self.image_max_dim, 3))
        padded[top : top + height, left : left + width] = pixels
        x = torch.from_numpy(padded - self.mean_pixel).permute(2, 0, 1)[None]
        return x, (top, left, top + height, left + width)

    # layers

    def conv(self, name: str, x: Tensor, stride: int = 1, *, same: bool = False) -> Tensor:
        kernel = self.weights[name]["kernel"].permute(3, 2, 0, 1)
        if same:
            x = pad_same(x, kernel.shape[-1], stride, 0.0)
        return functional.conv2d(x, kernel, self.weights[name]["bias"], stride)

    def dense(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[name]["kernel"] + self.weights[name]["bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Of channels, the second dimension."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        gamma, beta, mean, variance = (self.weights[name][part].view(shape) for part in NORM)
        return (x - mean) / torch.sqrt(variance + 1e-3) * gamma + beta

    def block(self, name: str, x: Tensor, stride: int, *, shortcut: bool) -> Tensor:
        y = self.norm(f"bn{name}_branch2a", self.conv(f"res{name}_branch2a", x, stride)).relu()
        y = self.norm(f"bn{name}_branch2b", self.conv(f"res{name}_branch2b", y, same=True)).relu()
        y = self.norm(f"bn{name}_branch2c", self.conv(f"res{name}_branch2c", y))
        if shortcut:
            x = self.norm(f"bn{name}_branch1", self.conv(f"res{name}_branch1", x, stride))
        return (x + y).relu()

    def maps(self, x: Tensor) -> list[Tensor]:
        """P2 .. P6."""
        x = self.norm("bn_conv1", self.conv("conv1", functional.pad(x, (3, 3, 3, 3)), 2)).relu()
        x = functional.max_pool2d(pad_same(x, 3, 2, -math.inf), 3, 2)
        stages = {}
        for stage, blocks in zip((2, 3, 4, 5), self.blocks, strict=True):
            for i in range(blocks):
                stride = 2 if stage > 2 and i == 0 else 1
                x = self.block(f"{stage}{chr(ord('a') + i)}", x, stride, shortcut=i == 0)
            stages[stage] = x
        result: list[Tensor] = []
        above = None
        for level in (5, 4, 3, 2):
            merged = self.conv(f"fpn_c{level}p{level}", stages[level])
            if above is not None:
                merged = merged + above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            result.insert(0, self.conv(f"fpn_p{level}", merged, same=True))
            above = merged
        return [*result, result[-1][:, :, ::2, ::2]]

    # proposals

    def rpn(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each anchor: logits and probabilities [A, (background, foreground)], deltas [A, 4]."""
        logits, deltas = [], []
        for x in maps:
            hidden = self.conv("rpn_conv_shared", x, same=True).relu()
            # channels last, as in TensorFlow: the anchors of a position are together
            logits.append(self.conv("rpn_class_raw", hidden)[0].permute(1, 2, 0).reshape(-1, 2))
            deltas.append(self.conv("rpn_bbox_pred", hidden)[0].permute(1, 2, 0).reshape(-1, 4))
        return torch.cat(logits), torch.cat(logits).softmax(dim=1), torch.cat(deltas)

    def anchors(self) -> Tensor:
        """Normalised [A, 4]: by level, then row, column and ratio."""
        size = self.image_max_dim
        levels = []
        for scale, stride in zip(self.scales, self.strides, strict=True):
            sides = [[scale / math.sqrt(ratio), scale * math.sqrt(ratio)] for ratio in self.ratios]
            halves = torch.tensor(sides, dtype=torch.float64) / 2
            steps = torch.arange(math.ceil(size / stride), dtype=torch.float64) * stride
            y, x = torch.meshgrid(steps, steps, indexing="ij")
            centers = torch.stack((y, x), dim=2).reshape(-1, 1, 2)
            levels.append(torch.cat((centers - halves, centers + halves), dim=2).reshape(-1, 4))
        return normalised(torch.cat(levels), size)

    def proposals(self, scores: Tensor, deltas: Tensor) -> Tensor:
        """Normalised RoIs [post_nms, 4], those that are missing are zeros."""
        order = scores.argsort(descending=True, stable=True)[: self.pre_nms_limit]
        boxes = moved(self.anchors()[order], deltas[order] * deltas.new_tensor(DEVIATIONS)).clamp(0, 1)
        boxes = boxes[suppressed(boxes, scores[order], self.rpn_nms, self.post_nms)]
        return functional.pad(boxes, (0, 0, 0, self.post_nms - len(boxes)))

    # RoIs

    def pooled(self, maps: list[Tensor], boxes: Tensor, size: int) -> Tensor:
        """Features [N, 256, size, size] of normalised boxes, each from the level of its size."""
        result = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
        side = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        # torch.round is half to even, like TensorFlow's; empty boxes come to P2
        levels = (4 + torch.log2(side / (224 / self.image_max_dim)).round()).clamp(2, 5)
        for level in (2, 3, 4, 5):
            mine = levels == level
            result[mine] = crop_and_resize(maps[level - 2], boxes[mine], size)
        return result

    def head(self, x: Tensor) -> Tensor:
        """Features [N, 1024] of RoIs from those of 7 x 7."""
        kernel = self.weights["mrcnn_class_conv1"]["kernel"]
        x = x.permute(0, 2, 3, 1).flatten(1) @ kernel.flatten(0, 2) + self.weights["mrcnn_class_conv1"]["bias"]
        x = self.norm("mrcnn_class_bn1", x).relu()
        x = x @ self.weights["mrcnn_class_conv2"]["kernel"][0, 0] + self.weights["mrcnn_class_conv2"]["bias"]
        return self.norm("mrcnn_class_bn2", x).relu()

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From features of 7 x 7: logits and probabilities [N, classes], deltas [N, classes, 4]."""
        x = self.head(x)
        logits = self.dense("mrcnn_class_logits", x)
        return logits, logits.softmax(dim=1), self.dense("mrcnn_bbox_fc", x).view(len(x), self.classes, 4)

    def refine(
        self, rois: Tensor, probabilities: Tensor, deltas: Tensor, window: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised boxes, classes and scores of detections, best first; boxes may be empty."""
        class_ids = probabilities.argmax(dim=1)
        index = torch.arange(len(rois))
        scores = probabilities[index, class_ids]
        boxes = moved(rois, deltas[index, class_ids] * deltas.new_tensor(DEVIATIONS))
        low, high = normalised(rois.new_tensor(window), self.image_max_dim).view(2, 2)
        boxes = torch.maximum(torch.minimum(boxes, high.repeat(2)), low.repeat(2))
        kept = torch.zeros(len(rois), dtype=torch.bool)
        for class_id in range(1, self.classes):
            mine = ((class_ids == class_id) & (scores >= self.min_confidence)).nonzero()[:, 0]
            kept[mine[suppressed(boxes[mine], scores[mine], self.nms, self.max_instances)]] = True
        index = index[kept]
        index = index[scores[index].argsort(descending=True, stable=True)[: self.max_instances]]
        return boxes[index], class_ids[index], scores[index]

    def mask_logits(self, x: Tensor) -> Tensor:
        """From features of 14 x 14: [N, classes, 28, 28]."""
        return self.conv("mrcnn_mask", self.mask_features(x))

    def mask_probabilities(self, x: Tensor) -> Tensor:
        return self.mask_logits(x).sigmoid()

    def mask_features(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3, 4):
            x = self.norm(f"mrcnn_mask_bn{i}", self.conv(f"mrcnn_mask_conv{i}", x, same=True)).relu()
        deconv = self.weights["mrcnn_mask_deconv"]
        # stride and size are the same, so each output pixel is of one input pixel
        x = torch.einsum("nchw,ijoc->nohiwj", x, deconv["kernel"]).flatten(4, 5).flatten(2, 3)
        return (x + deconv["bias"][:, None, None]).relu()

    # results

    def unmold(
        self,
        boxes: Tensor,
        class_ids: Tensor,
        scores: Tensor,
        masks: Tensor,
        size: tuple[int, int],
        window: Window,
    ) -> Detected:
        """Detections in an image of (height, width), less the empty ones; masks are [D, classes, 28, 28].

        A normalised box without area is no empty one: ends are excluded in pixels, so it becomes a single pixel.
        Such boxes come of the zeros among proposals, if their class is certain.
        """
        low, high = normalised(boxes.new_tensor(window), self.image_max_dim).view(2, 2)
        inside = (boxes - low.repeat(2)) / (high - low).repeat(2)
        height, width = size
        sides = np.array([height - 1, width - 1, height - 1, width - 1])
        rois = np.around(inside.numpy() * sides + [0, 0, 1, 1]).astype(np.int32)
        small = masks[torch.arange(len(boxes)), class_ids].numpy()
        full = (rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1]) > 0
        rois, small = rois[full], small[full]
        large = np.zeros((height, width, len(rois)), dtype=bool)
        for i, (y1, x1, y2, x2) in enumerate(rois.tolist()):
            large[y1:y2, x1:x2, i] = resized(small[i], (y2 - y1, x2 - x1)) >= 0.5
        return Detected(
            rois, class_ids.numpy()[full].astype(np.int32), scores.numpy()[full], large, boxes.numpy()[full], small
        )

    # tests

    @torch.inference_mode()
    def calibrate(self, image: np.ndarray, *, detections: int = 20, kinds: int = 5) -> None:
        """Change the last layers so that anchors and RoIs of this image differ, as those of a trained network.

        About a quarter of the RoIs become background; of the others so many have a class for certain that there are
        at least `detections` of at least `kinds` classes. Weights remain exact in float32.
        """
        x, window = self.mold(image)
        maps = self.maps(x)
        logits, _, deltas = self.rpn(maps)
        # one factor for the pair's difference: scores far from 0 and 1 have an order in float32 too
        self.rescale("rpn_class_raw", 1 / (logits[:, 1] - logits[:, 0]).std(), logits.mean(dim=0).repeat(3))
        self.rescale("rpn_bbox_pred", 0.7 / deltas.std(), deltas.view(-1, 3, 4).mean(dim=0).flatten())
        _, probabilities, deltas = self.rpn(maps)
        rois = self.proposals(probabilities[:, 1], deltas)
        pooled = self.pooled(maps, rois, 7)
        logits, _, deltas = self.classify(pooled)
        deviation = (deltas - deltas.mean(dim=0)).std()
        self.rescale("mrcnn_bbox_fc", 0.7 / deviation, deltas.mean(dim=0).flatten())
        self.rescale("mrcnn_class_logits", 1 / (logits - logits.mean(dim=0)).std(), logits.mean(dim=0))
        logits, _, _ = self.classify(pooled)
        others = logits[:, 1:].amax(dim=1) - logits[:, 0]
        background = functional.one_hot(torch.tensor(0), self.classes)
        self.rescale("mrcnn_class_logits", 1, -others.quantile(0.25) * background)
        for _ in range(20):
            _, probabilities, deltas = self.classify(pooled)
            boxes, class_ids, _ = self.refine(rois, probabilities, deltas, window)
            if len(boxes) >= detections and len(class_ids.unique()) >= kinds:
                break
            self.rescale("mrcnn_class_logits", 1.25, 0 * background)
        else:
            raise RuntimeError(f"only {len(boxes)} detections of {len(class_ids.unique())} classes")
        logits = self.mask_logits(self.pooled(maps, boxes, 14))
        mean = logits.mean(dim=(0, 2, 3))
        self.rescale("mrcnn_mask", 2 / (logits - mean[:, None, None]).std(), mean)

    def rescale(self, layer: str, factor: Any, mean: Tensor) -> None:
        """Outputs of a layer less `mean`, times `factor`, with weights exact in float32."""
        parts = self.weights[layer]
        parts["kernel"] = (parts["kernel"] * factor).float().double()
        parts["bias"] = ((parts["bias"] - mean) * factor).float().double()


def pad_same(x: Tensor, size: int, stride: int, value: float) -> Tensor:
    """As TensorFlow pads for "same": the odd pixel is at the bottom and the right."""
    pads: list[int] = []
    for side in (x.shape[3], x.shape[2]):
        total = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads, value=value)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As of skimage's `resize` with order 1, mode "constant" and no smoothing, in float64, [H, W] or [H, W, C].

    Pixels are sampled at their centres and outside the image are zeros, but then the result is clipped to the range
    of the image, as skimage does. So borders of bright images do not become darker than the image's darkest value.
    """
    values = np.pad(image.astype(np.float64), [(1, 1), (1, 1)] + [(0, 0)] * (image.ndim - 2))
    for axis in (0, 1):
        before = image.shape[axis]
        position = (np.arange(size[axis]) + 0.5) * before / size[axis] - 0.5
        first = np.floor(position)
        part = (position - first).reshape([-1 if i == axis else 1 for i in range(image.ndim)])
        index = first.astype(int) + 1
        low, high = values.take(index, axis), values.take(index + 1, axis)
        values = low + part * (high - low)
    return values.clip(image.min(), image.max())


def normalised(boxes: Tensor, size: int) -> Tensor:
    """From pixels of a square image, ends excluded."""
    return (boxes - boxes.new_tensor([0, 0, 1, 1])) / (size - 1)


def moved(boxes: Tensor, deltas: Tensor) -> Tensor:
    """By (dy, dx, log dh, log dw)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centers = boxes[:, :2] + sides / 2 + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].exp()
    return torch.cat((centers - sides / 2, centers + sides / 2), dim=1)


def suppressed(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """Indices of boxes that remain, best first, as of `tf.image.non_max_suppression`: empty boxes overlap nothing."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(boxes), dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(boxes)):
        if len(kept) == most:
            break
        if not alive[i]:
            continue
        kept.append(i)
        low = torch.maximum(boxes[i, :2], boxes[:, :2])
        high = torch.minimum(boxes[i, 2:], boxes[:, 2:])
        common = (high - low).clamp(min=0).prod(dim=1)
        overlap = torch.where(common > 0, common / (areas[i] + areas - common), 0.0)
        alive &= overlap <= threshold
    return order[kept]


def crop_and_resize(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """As of `tf.image.crop_and_resize` of a map [1, C, H, W]: corners of boxes are samples, zero outside the map.

    Samples at y1 + i (y2 - y1) / (size - 1) times (H - 1). A sample that only rounding would put outside is inside.
    """
    steps = torch.arange(size, dtype=x.dtype) / (size - 1)
    found = []
    for axis in (0, 1):
        length = x.shape[2 + axis]
        position = (boxes[:, axis, None] * (1 - steps) + boxes[:, axis + 2, None] * steps) * (length - 1)
        inside = (position > -1e-9) & (position < length - 1 + 1e-9)
        position = position.clamp(0, length - 1)
        first = position.floor()
        found.append((first.long(), position.ceil().long(), position - first, inside))
    (top, bottom, down, in_y), (left, right, across, in_x) = found

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return x[0][:, rows[:, :, None], columns[:, None, :]]

    across, down = across[:, None, :], down[:, :, None]
    above = at(top, left) * (1 - across) + at(top, right) * across
    below = at(bottom, left) * (1 - across) + at(bottom, right) * across
    result = above * (1 - down) + below * down
    return (result * (in_y[:, :, None] & in_x[:, None, :])).transpose(0, 1)
