"""How matterport's Mask R-CNN sees boxes, and what it does around its network.

Its boxes are fractions of the image, with the far corner one pixel nearer: (y2 - 1) / (height - 1).  Here they are in
"shifted pixels", those fractions times height - 1 or width - 1 of the square that images are padded to, x before y.
Deltas, clipping and suppression are the same in either; feature maps have (cells - 1) / (pixels - 1) cells per pixel.

Source of the semantics: `mrcnn/model.py` and `mrcnn/utils.py` of matterport/Mask_RCNN, 3deaec5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.misc import Conv2dNormActivation

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch, trim
from fastmrcnn.models.anchors import FixedStrideAnchors
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import BytesPreprocess, options_of, send
from fastmrcnn.models.resizing import resize_like_skimage
from fastmrcnn.models.roi_heads import Features, RoIHeads
from fastmrcnn.models.rpn import RegionProposalNetwork
from fastmrcnn.models.sampling import gather

MEAN = (123.7 / 255, 116.8 / 255, 103.9 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)
EPS = 1e-3
"""Of norms: Keras' default."""

RATIOS = (2.0, 1.0, 0.5)
"""Height / width, for its width / height of 0.5, 1 and 2."""

HIDDEN = 512
"""Channels of the head of its RPN."""

ONLY_INFERENCE = "a network with matterport's conventions detects, but does not learn; its weights initialise another's"


class SquarePreprocess(BytesPreprocess):
    """Images in the middle of a square whose side is `max_size`, black around them.

    They are enlarged until the shorter side is `min_size`, but never shrunk unless they exceed the square.
    """

    semantics: ops.Semantics = "detectron2"

    def __init__(self, **options: Any) -> None:
        super().__init__(resize_like_skimage, **options)

    def size_of(self, size: tuple[int, int], shorter: float | None = None) -> tuple[int, int]:
        """What an image of `size` is resized to, both (height, width)."""
        scale = max(1.0, self.min_size[-1] / min(size))
        if round(max(size) * scale) > self.max_size:
            scale = self.max_size / max(size)
        return round(size[0] * scale), round(size[1] * scale)

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images, normalised, in one tensor [N, C, max_size, max_size]."""
        like = images[0]
        mean, std = (send(values, like.dtype, like.device) for values in (self.image_mean, self.image_std))
        black = (-mean / std)[:, None, None]
        batch = black.expand(-1, self.max_size, self.max_size).repeat(len(images), 1, 1, 1)
        for canvas, image in zip(batch, images, strict=True):
            height, width = image.shape[-2:]
            top, left = (self.max_size - height) // 2, (self.max_size - width) // 2
            canvas[:, top : top + height, left : left + width] = image
        return batch

    def in_original_pixels(
        self, detections: DetectionBatch, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> DetectionBatch:
        """Boxes in whole pixels of images of `original_sizes`, without those that then have no area.  Never waits."""
        boxes = detections.boxes
        resized, original = (send(x, torch.int64, boxes.device) for x in (sizes, original_sizes))
        origin = (self.max_size - resized) // 2
        scale = (original - 1).to(boxes.dtype) / (resized - 1).clamp(min=1).to(boxes.dtype)
        origin, scale = (x.flip(1).repeat(1, 2)[:, None] for x in (origin, scale))  # x before y, of both corners
        boxes = (boxes - origin) * scale
        boxes = torch.cat((boxes[..., :2], boxes[..., 2:] + 1), dim=-1).round()
        extent = boxes[..., 2:] - boxes[..., :2]
        kept = detections.valid & (extent[..., 0] * extent[..., 1] > 0)
        order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
        moved = {"boxes": gather(boxes, order), "count": kept.sum(dim=1)}
        for name in ("scores", "labels", "masks"):
            if (value := getattr(detections, name)) is not None:
                moved[name] = gather(value, order)
        return trim(replace(detections, **moved))


class SquareRPN(RegionProposalNetwork):
    """One suppression for all levels, of the best boxes of any."""

    def propose(self, images: ImageBatch, logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> ProposalBatch:
        """Boxes [N, K, 4] in shifted pixels; see the base class."""
        most = self.pre_nms_top_n()
        slots = min(most, max(x[0].numel() for x in logits))
        best, indices = ops.topk_anchors([x.detach() for x in logits], slots)
        boxes, valid = ops.decode_proposals(
            [x.detach() for x in deltas],
            indices,
            self.base_anchors(logits[0].device),
            self.strides(images, logits),
            _square(images) - 1,
            scores=best,
            min_size=0.0,
        )
        scores = torch.where(valid, best, -torch.inf).flatten(1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :most], order[:, :most]
        boxes = gather(boxes.flatten(1, 2), order)
        usable = scores > -torch.inf
        kept, count = ops.padded_nms(
            boxes, scores, usable, self.nms_thresh, min(self.post_nms_top_n(), scores.shape[1]), presorted=True
        )
        kept = kept.clamp(min=0)
        return trim(ProposalBatch(gather(boxes, kept), gather(scores, kept).sigmoid(), count))

    def losses(
        self, images: ImageBatch, logits: Sequence[Tensor], deltas: Sequence[Tensor], targets: TargetBatch
    ) -> dict[str, Tensor]:
        """Not there: raises NotImplementedError."""
        raise NotImplementedError(ONLY_INFERENCE)


class SquareRoIHeads(RoIHeads):
    """Of each RoI the best class alone, and boxes that end with the image, not with the square."""

    def select(self, logits: Tensor, deltas: Tensor, proposals: ProposalBatch, images: ImageBatch) -> DetectionBatch:
        """Detections in shifted pixels of the square; see the base class."""
        scores, labels = logits.softmax(dim=-1).max(dim=-1)
        # As if each RoI had two classes, its best and the background: their scores stay as they are.
        alone = torch.full_like(logits, -torch.inf)
        alone[..., 0] = torch.log1p(-scores)
        alone.scatter_(-1, labels[..., None], torch.where(labels > 0, scores.log(), 0)[..., None])
        origin = ((_square(images) - images.sizes) // 2).flip(1).repeat(1, 2)[:, None]
        moved = replace(proposals, boxes=proposals.boxes - origin)
        inside = replace(images, sizes=images.sizes - 1)
        found = super().select(alone, deltas, moved, inside)
        return replace(found, boxes=found.boxes + origin)

    def losses(
        self, features: Features, proposals: ProposalBatch, images: ImageBatch, targets: TargetBatch
    ) -> dict[str, Tensor]:
        """Not there: raises NotImplementedError."""
        raise NotImplementedError(ONLY_INFERENCE)


class CropAndResize(ops.MultiScaleRoIAlign):
    """TensorFlow's `crop_and_resize` on a pyramid: one sample per bin, the outer ones at the corners of the box.

    The level is that of equation 1 of the FPN paper, rounded to the nearest, for sides in fractions of the image.
    """

    def pool(self, features: Features, rois: Tensor, images: ImageBatch) -> Tensor:
        """RoI features [R, C, P, P] of `rois` [R, 5] in shifted pixels."""
        height, width = images.tensors.shape[-2:]
        maps = [feature for name, feature in features.items() if name in self.featmap_names]
        extent = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0)
        canonical = self.canonical_scale * math.sqrt((height - 1) * (width - 1) / (height * width))
        side = torch.sqrt(extent[:, 0] * extent[:, 1])
        levels = torch.round(self.canonical_level + torch.log2(side / canonical)) - 2
        levels = levels.nan_to_num(0).clamp(0, len(maps) - 1).to(torch.int64)
        scales = [[(x.shape[-1] - 1) / (width - 1), (x.shape[-2] - 1) / (height - 1)] * 2 for x in maps]
        cells = rois[:, 1:] * send(scales, rois.dtype, rois.device)[levels]
        in_cells = torch.cat((rois[:, :1], cells), dim=1)
        ones = [1.0] * len(maps)
        return ops.multilevel_roi_align(maps, in_cells, self.output_size, ones, levels=levels, sampling="corner")


def anchors(sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> FixedStrideAnchors:
    """Anchors in shifted pixels: far corners one pixel nearer."""
    return FixedStrideAnchors(sizes, [RATIOS] * len(sizes), strides, nearer=1.0)


def apply(model: GeneralizedRCNN) -> None:
    """Make a detector of a pyramid, as `architectures.build` makes it, one with matterport's conventions."""
    model.transform = SquarePreprocess(**options_of(model.transform), size_divisible=64)
    model.rpn = _as(SquareRPN, model.rpn)
    model.roi_heads = _as(SquareRoIHeads, model.roi_heads)
    backbone: Any = model.backbone
    # Keras pads the right and lower border only, where a stride of 2 has an even side before it.
    backbone.body.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    head = RPNHead(HIDDEN, model.rpn.anchor_generator.num_anchors_per_location()[0])
    head.conv = nn.Sequential(Conv2dNormActivation(backbone.out_channels, HIDDEN, kernel_size=3, norm_layer=None))
    model.rpn.head = head


def _as(ours: type[Any], module: nn.Module) -> Any:
    """A `module` with other methods, those of a class derived from its own."""
    continued = object.__new__(ours)
    vars(continued).update(vars(module))
    return continued


def _square(images: ImageBatch) -> Tensor:
    """(height, width) of the square, int64 [N, 2]."""
    return send(images.tensors.shape[-2:], torch.int64, images.sizes.device).expand(len(images.sizes), 2)
