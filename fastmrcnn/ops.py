"""The operations of a two-stage detector, as functions: validate, choose an implementation, call it.

Signatures are torchvision's where it has the operation.  Every function takes `impl`:

- `"auto"`: the fastest implementation for the device of the inputs;
- `"reference"`: plain PyTorch, the specification, any device, float64-capable;
- `"torchvision"`: torchvision's own code, where it has the same semantics;
- `"triton"`: the GPU kernels.

Asking for an implementation that is not there raises NotImplementedError; an explicit request never falls back.
Boxes are `x1,y1,x2,y2` in pixels everywhere.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import roi_heads as torchvision_heads

from fastmrcnn_kernels import library, torchvision_ops
from fastmrcnn_kernels.host import on_host
from fastmrcnn_kernels.reference import boxes as reference_boxes
from fastmrcnn_kernels.reference import keypoints as reference_keypoints
from fastmrcnn_kernels.reference import nms as reference_nms
from fastmrcnn_kernels.reference import paste as reference_paste
from fastmrcnn_kernels.reference import roi_align as reference_roi_align

Impl = Literal["auto", "reference", "triton", "torchvision"]
Interpolation = Literal["bilinear", "bicubic"]
Sampling = Literal["average", "corner"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "roi_align": {
        "reference": reference_roi_align.roi_align,
        "torchvision": torchvision_ops.roi_align,
        "triton": library.roi_align,
    },
    "multilevel_roi_align": {
        "reference": reference_roi_align.multilevel_roi_align,
        "torchvision": torchvision_ops.multilevel_roi_align,
        "triton": library.multilevel_roi_align,
    },
    "nms": {"reference": reference_nms.nms, "torchvision": torchvision.ops.nms},
    "batched_nms": {"reference": reference_nms.batched_nms, "torchvision": torchvision_ops.batched_nms},
    "padded_nms": {"reference": reference_nms.padded_nms, "torchvision": torchvision_ops.padded_nms},
    "decode_proposals": {"reference": reference_boxes.decode_proposals},
    "paste_masks": {"reference": reference_paste.paste_masks, "torchvision": torchvision_ops.paste_masks},
    "heatmaps_to_keypoints": {
        "reference": reference_keypoints.heatmaps_to_keypoints,
        "torchvision": lambda heatmaps, boxes, max_size: torchvision_heads.heatmaps_to_keypoints(heatmaps, boxes),
    },
}


def _choose(op: str, impl: str, auto: str) -> Callable[..., Any]:
    available = _IMPLEMENTATIONS[op]
    if impl not in ("auto", "reference", "triton", "torchvision"):
        raise ValueError(f"impl={impl!r}: expected 'auto', 'reference', 'triton' or 'torchvision'")
    name = auto if impl == "auto" else impl
    if name not in available:
        others = " or ".join(repr(k) for k in ("auto", *available))
        raise NotImplementedError(f"fastmrcnn.ops.{op} has no {name!r} implementation yet: use impl={others}")
    return available[name]


def _choose_roi_align(op: str, impl: str, features: Tensor, interpolation: str, sampling: str) -> tuple[str, Any]:
    """Name and function of the implementation; ValueError for a sampler that there is not."""
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation={interpolation!r}: expected 'bilinear' or 'bicubic'")
    if sampling not in ("average", "corner"):
        raise ValueError(f"sampling={sampling!r}: expected 'average' or 'corner'")
    usual = interpolation == "bilinear" and sampling == "average"
    if impl == "torchvision" and not usual:
        raise NotImplementedError("impl='torchvision' has interpolation='bilinear' with sampling='average' only")
    if impl == "triton" and features.dtype not in _KERNEL_DTYPES:
        raise TypeError(f"impl='triton': expected float32, float16 or bfloat16 features, got {features.dtype}")
    if impl == "auto":
        kernel = features.is_cuda and features.dtype in _KERNEL_DTYPES and _HAS_TRITON
        impl = "triton" if kernel else "torchvision" if usual else "reference"
    return impl, _choose(op, impl, impl)


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair = (pair[0], pair[0])
    if len(pair) != 2 or any(v < 1 for v in pair):
        raise ValueError(f"{name}={value!r}: expected a positive int or two of them (height, width)")
    return pair[0], pair[1]


def _check(
    name: str, tensor: Tensor, *shape: int | None, floating: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Raise unless `tensor` has `shape`, where None stands for any length, and `dtype`, or any `floating` one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(w is None or s == w for s, w in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("*" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if dtype is None and floating and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")


def _rois(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """RoIs [R, 5] (batch index, box) of boxes given as such, or as one [L, 4] per image."""
    if isinstance(boxes, Tensor):
        _check("boxes", boxes, None, 5)
        return boxes
    if not len(boxes):
        raise ValueError("boxes: expected a Tensor [R, 5] or one [L, 4] per image, got none")
    for i, image_boxes in enumerate(boxes):
        _check(f"boxes[{i}]", image_boxes, None, 4)
    index = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat((torch.cat(index), torch.cat(list(boxes))), dim=1)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    interpolation: Interpolation = "bilinear",
    sampling: Sampling = "average",
    impl: Impl = "auto",
) -> Tensor:
    """RoIAlign (Mask R-CNN), by default with the semantics of `torchvision.ops.roi_align`.

    Args:
        input: features [N, C, H, W].
        boxes: RoIs [R, 5] (batch index, x1, y1, x2, y2), or one [L, 4] per image.  No gradient reaches them.  A batch
            index outside 0 .. N - 1, such as the -1 of padding, and a box that is not finite give zeros.
        output_size: bins (height, width), or one int for both.
        spatial_scale: cells of `input` per pixel of `boxes`.
        sampling_ratio: samples per bin and axis; not positive: ceil(RoI extent / bins), as detectron2 does.
        aligned: shift boxes by half a cell, so that cell centres lie at integers + 0.5 (detectron2's ROIAlignV2).
        interpolation: between cells; `"bicubic"` is Keys' with a = -0.75, as PyTorch's, cells repeated at the border.
        sampling: `"average"` of the samples of a bin; or one sample per bin, the first and last at the `"corner"`s of
            the box and none outside the map counting (TensorFlow's `crop_and_resize`, with boxes in cells).

    Returns:
        [R, C, height, width] in the dtype of `input`; arithmetic in float32 (float64 for float64).
    """
    _check("input", input, None, None, None, None)
    name, run = _choose_roi_align("roi_align", impl, input, interpolation, sampling)
    sampler = () if name == "torchvision" else (interpolation, sampling)
    size = _pair(output_size, "output_size")
    return run(input, _rois(boxes), size, spatial_scale, sampling_ratio, aligned, *sampler)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    *,
    levels: Tensor | None = None,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    interpolation: Interpolation = "bilinear",
    sampling: Sampling = "average",
    impl: Impl = "auto",
) -> Tensor:
    """RoIAlign on a feature pyramid: each RoI is pooled from one level.

    Args:
        features: L maps [N, C, Hl, Wl], finest first.
        boxes, output_size, sampling_ratio, aligned, interpolation, sampling: as in `roi_align`.
        spatial_scales: cells per pixel of each level, a power of two, for example (1/4, 1/8, 1/16, 1/32).
        levels: level 0 .. L - 1 of each RoI, int64 [R]; by default from its area by equation 1 of the FPN paper,
            floor(`canonical_level` + log2(sqrt(area) / `canonical_scale`)), as torchvision's `MultiScaleRoIAlign`.
            A RoI of another level pools to zeros.

    Returns:
        [R, C, height, width] in the dtype of the features.
    """
    if not features or len(features) != len(spatial_scales):
        raise ValueError(f"spatial_scales: {len(spatial_scales)} given for {len(features)} feature maps")
    for i, feature in enumerate(features):
        _check(f"features[{i}]", feature, None, None, None, None)
        _check(f"features[{i}]", feature, *features[0].shape[:2], None, None, dtype=features[0].dtype)
    rois = _rois(boxes)
    if levels is not None:
        _check("levels", levels, len(rois), dtype=torch.int64)
    size = _pair(output_size, "output_size")
    name, run = _choose_roi_align("multilevel_roi_align", impl, features[0], interpolation, sampling)
    if name == "triton":
        sampler = (interpolation, sampling, canonical_scale, canonical_level)
        return run(features, rois, levels, size, spatial_scales, sampling_ratio, aligned, *sampler)
    if levels is None:
        finest = round(-math.log2(spatial_scales[0]))
        levels = reference_roi_align.assign_levels(rois[:, 1:], len(features), finest, canonical_scale, canonical_level)
    return run(
        features,
        rois,
        levels,
        size,
        spatial_scales,
        sampling_ratio,
        aligned,
        *(() if name == "torchvision" else (interpolation, sampling)),
    )


class MultiScaleRoIAlign(torchvision.ops.MultiScaleRoIAlign):
    """`torchvision.ops.MultiScaleRoIAlign`: constructor, call and result.

    The scale of a level is inferred from each call's shapes; torchvision keeps those of its first call.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool `boxes`, [L, 4] per image, from the maps of `x` named in `featmap_names`: [sum of L, C, P, P].

        `image_shapes` are the (height, width) of the images as they entered the network.
        """
        return pool_like(self, x, _rois(boxes), max(height for height, _ in image_shapes))


def pool_like(
    pooler: torchvision.ops.MultiScaleRoIAlign, features: Mapping[str, Tensor], rois: Tensor, image_height: int
) -> Tensor:
    """RoI features [R, C, P, P] of `rois` [R, 5] by the options of `pooler`, from those `features` that it names.

    Cells per pixel are the height of each map over `image_height`, rounded to a power of two: torchvision's rule.
    """
    maps = [feature for name, feature in features.items() if name in pooler.featmap_names]
    return multilevel_roi_align(
        maps,
        rois,
        pooler.output_size,
        [2.0 ** round(math.log2(feature.shape[-2] / image_height)) for feature in maps],
        pooler.sampling_ratio,
        canonical_scale=pooler.canonical_scale,
        canonical_level=pooler.canonical_level,
    )


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, impl: Impl = "auto") -> Tensor:
    """Greedy non-maximum suppression, as `torchvision.ops.nms`.

    Returns the indices, int64, of those `boxes` [K, 4] that overlap no kept box of a higher score (equal scores: of a
    lower index) with an IoU above `iou_threshold`, in descending order of `scores` [K].
    """
    _check("boxes", boxes, None, 4)
    _check("scores", scores, len(boxes))
    return _choose("nms", impl, "torchvision")(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, impl: Impl = "auto") -> Tensor:
    """`nms` within each group, as `torchvision.ops.batched_nms`; `idxs` [K] names the group of each box.

    Group numbers are compared.  torchvision instead moves each group to coordinates of its own, which rounds the boxes.
    """
    _check("boxes", boxes, None, 4)
    _check("scores", scores, len(boxes))
    _check("idxs", idxs, len(boxes), floating=False)
    return _choose("batched_nms", impl, "torchvision")(boxes, scores, idxs, iou_threshold)


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    iou_threshold: float,
    max_keep: int,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`nms` of many segments at once, each with its own number of boxes; results stay on the device.

    Args:
        boxes: [S, K, 4].
        scores: [S, K].
        valid: which slots hold a box, bool [S, K]; or how many of the first slots do, int64 [S].  What the other slots
            hold, NaN included, has no influence.
        iou_threshold: overlaps above it suppress.
        max_keep: at most so many boxes are kept per segment, those of highest score.

    Returns:
        Indices into the K slots, int64 [S, max_keep], by descending score (equal scores by index), -1 after the last;
        and the number of boxes kept, int64 [S].
    """
    _check("boxes", boxes, None, None, 4)
    _check("scores", scores, *boxes.shape[:2])
    if isinstance(valid, Tensor) and valid.dim() == 1 and valid.dtype != torch.bool:
        _check("valid", valid, len(boxes), dtype=torch.int64)
        valid = torch.arange(boxes.shape[1], device=boxes.device) < valid[:, None]
    _check("valid", valid, *boxes.shape[:2], dtype=torch.bool)
    if max_keep < 0:
        raise ValueError(f"max_keep={max_keep}: expected 0 or more")
    run = _choose("padded_nms", impl, "torchvision" if on_host(boxes) else "reference")
    return run(boxes, scores, valid, iou_threshold, max_keep)


def decode_proposals(
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    base_anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]],
    sizes: Tensor,
    *,
    min_size: float = 1e-3,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Boxes of selected anchors of all levels and images, decoded and clipped.

    Args:
        deltas: regression output of the RPN head per level, [N, 4 A, Hl, Wl].
        indices: selected anchors per level, int64 [N, Kl], numbered (y * Wl + x) * A + a.
        base_anchors: anchors of the cell at the origin per level, [A, 4].
        strides: (height, width) of a cell per level, in pixels.
        sizes: (height, width) of each image, [N, 2].
        min_size: shortest side of a usable proposal, in pixels.
        weights: of dx, dy, dw, dh.

    Returns:
        Boxes [N, sum of Kl, 4], float32 (float64 for float64 deltas), and whether each is usable, bool [N, sum of Kl].
    """
    if not len(deltas) == len(indices) == len(base_anchors) == len(strides):
        raise ValueError("deltas, indices, base_anchors, strides: expected one of each per level")
    _check("sizes", sizes, None, 2, floating=False)
    for i, (delta, index, base) in enumerate(zip(deltas, indices, base_anchors, strict=True)):
        _check(f"base_anchors[{i}]", base, None, 4)
        _check(f"deltas[{i}]", delta, len(sizes), 4 * len(base), None, None)
        _check(f"indices[{i}]", index, len(sizes), None, dtype=torch.int64)
    run = _choose("decode_proposals", impl, "reference")
    return run(deltas, indices, base_anchors, strides, sizes, min_size=min_size, weights=weights)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    out: Literal["soft", "bool"] = "soft",
    threshold: float = 0.5,
    padding: int = 1,
    impl: Impl = "auto",
) -> Tensor:
    """Masks of boxes, enlarged and pasted into an image.

    Args:
        masks: probabilities [D, M, M].
        boxes: [D, 4] in pixels of the image.  A box that is not finite gives an empty mask.
        size: (height, width) of the image.
        out: `"soft"` interpolated probabilities, `"bool"` whether they exceed `threshold`.
        padding: border of zeros put around each mask first.

    Returns:
        [D, height, width], the dtype of `masks` or bool.  Semantics of torchvision's `paste_masks_in_image`: the box is
        enlarged by the border, truncated to whole pixels, and both ends count.
    """
    _check("masks", masks, None, None, None)
    _check("masks", masks, None, masks.shape[1], masks.shape[1])
    _check("boxes", boxes, len(masks), 4)
    if out not in ("soft", "bool"):
        raise ValueError(f"out={out!r}: expected 'soft' or 'bool'")
    soft = _choose("paste_masks", impl, "reference")(masks, boxes, _pair(size, "size"), padding)
    return soft if out == "soft" else soft > threshold


def paste_masks_in_image(
    masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1, *, impl: Impl = "auto"
) -> Tensor:
    """`paste_masks` with the signature of torchvision's function of this name: [D, 1, M, M] to [D, 1, H, W]."""
    _check("masks", masks, None, 1, None, None)
    return paste_masks(masks[:, 0], boxes, img_shape, padding=padding, impl=impl)[:, None]


def heatmaps_to_keypoints(
    heatmaps: Tensor, boxes: Tensor, max_size: tuple[int, int], *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Peak of each heatmap after bicubic enlargement to its box (torchvision's function of this name).

    Args:
        heatmaps: logits [D, K, S, S].
        boxes: [D, 4] in pixels, none higher or wider than `max_size`.
        max_size: (height, width) that bounds the boxes, so that shapes do not depend on data.

    Returns:
        Keypoints [D, K, 3] (x, y, 1) in pixels and the heights of their peaks [D, K].
    """
    _check("heatmaps", heatmaps, None, None, None, None)
    _check("boxes", boxes, len(heatmaps), 4)
    run = _choose("heatmaps_to_keypoints", impl, "torchvision" if on_host(boxes) else "reference")
    return run(heatmaps, boxes, max_size)
