"""What a library does around its networks that their weights do not say: how images are resized, where anchors are,
how RoIs are sampled, which of equal things are counted.

With those of the library that a network was trained in, it gives that library's results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fastmrcnn.models import maskrcnn_benchmark, matterport
from fastmrcnn.models.anchors import FixedStrideAnchors
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import BytesPreprocess, Preprocess, options_of
from fastmrcnn.models.resizing import resize_like_opencv, resize_like_pillow
from fastmrcnn.ops import LevelRule, MultiScaleRoIAlign, Semantics

Library = Literal["torchvision", "detectron2", "mmdetection", "matterport", "maskrcnn_benchmark"]

ABOVE_ZERO = torch.finfo(torch.float32).tiny
"""The shortest side of a box, where boxes need only not be empty."""

RATIOS = (0.5, 1.0, 2.0)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of the channels of images in 0 .. 1."""

CAFFE = ((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255, 1 / 255, 1 / 255))
"""Of networks that see bytes less their mean, also RGB."""


@dataclass(frozen=True)
class Conventions:
    """Of one library.

    Args:
        mean, std: per channel, RGB in 0 .. 1, unless a model says otherwise.
        resize_bytes: resizes uint8 [C, H, W] to (height, width); None resizes floats as torchvision does.
        fixed_strides: anchors are `FixedStrideAnchors`, else torchvision's.
        sampling_ratio, aligned, level_rule: of RoIAlign.
        proposals: how many before and after suppression, each in training and evaluation, of a pyramid.
        proposals_of_one_map: the same of one map.
        min_proposal: shortest side of a proposal, in pixels.
        min_detection: of a detection.
        smooth_l1_beta: of both box losses.
        semantics: of masks that are pasted.
        keypoint_scores: see `RoIHeads`.
        stride_in_1x1: bottlenecks of ResNets, other than ResNeXts, halve maps in their first convolution.
        norm_eps: of the norms.
    """

    mean: Sequence[float] = IMAGENET[0]
    std: Sequence[float] = IMAGENET[1]
    resize_bytes: Callable[..., Any] | None = None
    fixed_strides: bool = True
    sampling_ratio: int = 0
    aligned: bool = True
    level_rule: LevelRule = "torchvision"
    proposals: tuple[int, int, int, int] = (2000, 1000, 1000, 1000)
    proposals_of_one_map: tuple[int, int, int, int] = (12000, 6000, 2000, 1000)
    min_proposal: float = ABOVE_ZERO
    min_detection: float = ABOVE_ZERO
    smooth_l1_beta: float = 0.0
    semantics: Semantics = "detectron2"
    keypoint_scores: Literal["logit", "probability"] = "probability"
    stride_in_1x1: bool = False
    norm_eps: float = 1e-5

    def anchors(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> AnchorGenerator:
        """Anchors of `sizes` per level, in pixels."""
        ratios = [RATIOS] * len(sizes)
        if self.fixed_strides:
            return FixedStrideAnchors(sizes, ratios, strides)
        return AnchorGenerator(tuple(map(tuple, sizes)), tuple(ratios))

    def pooler(self, maps: list[str], output_size: int) -> MultiScaleRoIAlign:
        """RoIAlign of `output_size` bins each way."""
        rule = self.level_rule
        return MultiScaleRoIAlign(maps, output_size, self.sampling_ratio, aligned=self.aligned, level_rule=rule)

    def options(self, one_map: bool) -> dict[str, Any]:
        """Arguments of torchvision's detectors."""
        counts = self.proposals_of_one_map if one_map else self.proposals
        names = [f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test")]
        return dict(zip(names, counts, strict=True)) | {"image_mean": list(self.mean), "image_std": list(self.std)}

    def apply(self, model: GeneralizedRCNN, one_map: bool) -> None:
        """Set what torchvision's detectors have no arguments for."""
        overwrite_eps(model, self.norm_eps)
        model.rpn.min_size = self.min_proposal
        heads = model.roi_heads
        heads.min_size, heads.keypoint_scores = self.min_detection, self.keypoint_scores
        model.rpn.smooth_l1_beta = heads.smooth_l1_beta = self.smooth_l1_beta
        options = options_of(model.transform) | {"size_divisible": 1 if one_map else 32}
        if self.resize_bytes is not None:
            model.transform = BytesPreprocess(self.resize_bytes, **options)
        else:
            model.transform = Preprocess(**options)
        model.transform.semantics = self.semantics


@dataclass(frozen=True)
class Matterport(Conventions):
    """See `fastmrcnn.models.matterport`."""

    mean: Sequence[float] = matterport.MEAN
    std: Sequence[float] = matterport.STD
    proposals: tuple[int, int, int, int] = (6000, 6000, 2000, 1000)
    min_detection: float = 0.0
    stride_in_1x1: bool = True
    norm_eps: float = matterport.EPS

    def anchors(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> AnchorGenerator:
        """Anchors of `sizes` per level, in shifted pixels."""
        return matterport.anchors(sizes, strides)

    def pooler(self, maps: list[str], output_size: int) -> MultiScaleRoIAlign:
        """`crop_and_resize` to `output_size` samples each way."""
        return matterport.CropAndResize(maps, output_size, 1)

    def options(self, one_map: bool) -> dict[str, Any]:
        """Arguments of torchvision's detectors."""
        own = {"min_size": 800, "max_size": 1024, "box_score_thresh": 0.7, "box_nms_thresh": 0.3}
        return super().options(one_map) | own

    def apply(self, model: GeneralizedRCNN, one_map: bool) -> None:
        """Set what torchvision's detectors have no arguments for."""
        if one_map or model.roi_heads.has_keypoint():
            raise ValueError("conventions of matterport are those of Mask and Faster R-CNN with a pyramid")
        super().apply(model, one_map)
        matterport.apply(model)


@dataclass(frozen=True)
class MaskRCNNBenchmark(Conventions):
    """See `fastmrcnn.models.maskrcnn_benchmark`."""

    mean: Sequence[float] = maskrcnn_benchmark.MEAN
    std: Sequence[float] = maskrcnn_benchmark.STD
    sampling_ratio: int = 2
    min_proposal: float = 0.0
    min_detection: float = 0.0
    smooth_l1_beta: float = 1 / 9
    semantics: Semantics = "torchvision"
    stride_in_1x1: bool = True
    norm_eps: float = 0.0

    def anchors(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> AnchorGenerator:
        """Anchors of `sizes` per level, in pixels."""
        return maskrcnn_benchmark.CornerAnchors(sizes, strides)

    def pooler(self, maps: list[str], output_size: int) -> MultiScaleRoIAlign:
        """RoIAlign of `output_size` bins each way."""
        return maskrcnn_benchmark.CornerRoIAlign(maps, output_size, self.sampling_ratio)

    def apply(self, model: GeneralizedRCNN, one_map: bool) -> None:
        """Set what torchvision's detectors have no arguments for."""
        if one_map or model.roi_heads.has_keypoint():
            raise ValueError("conventions of maskrcnn_benchmark are those of Mask and Faster R-CNN with a pyramid")
        super().apply(model, one_map)
        maskrcnn_benchmark.apply(model)


CONVENTIONS: dict[Library, Conventions] = {
    "torchvision": Conventions(
        fixed_strides=False,
        sampling_ratio=2,
        aligned=False,
        proposals=(2000, 1000, 2000, 1000),
        proposals_of_one_map=(2000, 1000, 2000, 1000),
        min_proposal=1e-3,
        min_detection=1e-2,
        smooth_l1_beta=1 / 9,
        semantics="torchvision",
        keypoint_scores="logit",
    ),
    "detectron2": Conventions(*CAFFE, resize_bytes=resize_like_pillow, level_rule="detectron2", stride_in_1x1=True),
    "matterport": Matterport(),
    "maskrcnn_benchmark": MaskRCNNBenchmark(),
    "mmdetection": Conventions(resize_bytes=resize_like_opencv, level_rule="mmdetection", min_detection=0.0),
}
