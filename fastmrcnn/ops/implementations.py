"""Which implementations there are of each operation.  Nothing else chooses one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.models.detection import roi_heads as torchvision_heads

from fastmrcnn_kernels import (
    library,
    numpy_bits,
    numpy_mask_targets,
    torch_roi_align,
    torchvision_images,
    torchvision_masks,
    torchvision_ops,
)
from fastmrcnn_kernels.reference import bits as reference_bits
from fastmrcnn_kernels.reference import boxes as reference_boxes
from fastmrcnn_kernels.reference import canvases as reference_canvases
from fastmrcnn_kernels.reference import detections as reference_detections
from fastmrcnn_kernels.reference import images as reference_images
from fastmrcnn_kernels.reference import keypoints as reference_keypoints
from fastmrcnn_kernels.reference import mask_targets as reference_mask_targets
from fastmrcnn_kernels.reference import matching as reference_matching
from fastmrcnn_kernels.reference import nms as reference_nms
from fastmrcnn_kernels.reference import paste as reference_paste
from fastmrcnn_kernels.reference import proposals as reference_proposals
from fastmrcnn_kernels.reference import rle as reference_rle
from fastmrcnn_kernels.reference import roi_align as reference_roi_align
from fastmrcnn_kernels.reference import roi_pool as reference_roi_pool
from fastmrcnn_kernels.reference import soft_nms as reference_soft_nms

Impl = Literal["auto", "reference", "triton", "torchvision", "torch", "numpy"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "roi_align": {
        "reference": reference_roi_align.roi_align,
        "torchvision": torchvision_ops.roi_align,
        "torch": torch_roi_align.roi_align,
        "triton": library.roi_align,
    },
    "multilevel_roi_align": {
        "reference": reference_roi_align.multilevel_roi_align,
        "torchvision": torchvision_ops.multilevel_roi_align,
        "torch": torch_roi_align.multilevel_roi_align,
        "triton": library.multilevel_roi_align,
    },
    "roi_pool": {
        "reference": reference_roi_pool.roi_pool,
        "torchvision": torchvision_ops.roi_pool,
        "triton": library.roi_pool,
    },
    "nms": {"reference": reference_nms.nms, "torchvision": torchvision_ops.nms, "triton": library.nms},
    "batched_nms": {
        "reference": reference_nms.batched_nms,
        "torchvision": torchvision_ops.batched_nms,
        "triton": library.batched_nms,
    },
    "padded_nms": {
        "reference": reference_nms.padded_nms,
        "torchvision": torchvision_ops.padded_nms,
        "triton": library.padded_nms,
    },
    "padded_soft_nms": {"reference": reference_soft_nms.padded_soft_nms, "triton": library.padded_soft_nms},
    "encode_boxes": {"reference": reference_boxes.encode_deltas, "triton": library.encode_boxes},
    "decode_boxes": {"reference": reference_boxes.decode_class_deltas, "triton": library.decode_boxes},
    "match_boxes": {"reference": reference_matching.match_boxes, "triton": library.match_boxes},
    "topk_anchors": {"reference": reference_proposals.topk_anchors, "triton": library.topk_anchors},
    "decode_proposals": {"reference": reference_proposals.decode_proposals, "triton": library.decode_proposals},
    "merge_levels": {"reference": reference_proposals.merge_levels, "triton": library.merge_levels},
    "select_detections": {
        "reference": reference_detections.select_detections,
        "torchvision": torchvision_ops.select_detections,
        "triton": library.select_detections,
    },
    "paste_masks": {
        "reference": reference_paste.paste_masks,
        "torchvision": torchvision_masks.paste_masks,
        "triton": library.paste_masks,
    },
    "encode_masks": {
        "reference": reference_rle.encode_masks,
        "torchvision": torchvision_masks.encode_masks,
        "triton": library.encode_masks,
    },
    "encode_bool": {"reference": reference_rle.encode_bool, "triton": library.encode_bool},
    "pack_bits": {"reference": reference_bits.pack_bits, "numpy": numpy_bits.pack_bits},
    "unpack_bits": {"reference": reference_bits.unpack_bits, "numpy": numpy_bits.unpack_bits},
    "count_bits": {"reference": reference_bits.count_bits, "numpy": numpy_bits.count_bits},
    "mask_iou": {
        "reference": reference_bits.mask_iou,
        "numpy": numpy_bits.mask_iou,
        "triton": library.mask_iou,
    },
    "resize_images": {
        "reference": reference_images.resize_images,
        "torchvision": torchvision_images.resize_images,
        "triton": library.resize_images,
    },
    "clear_beyond_": {"reference": reference_canvases.clear_beyond_, "triton": library.clear_beyond_},
    "mask_targets": {
        "reference": reference_mask_targets.mask_targets,
        "numpy": numpy_mask_targets.mask_targets,
        "triton": library.mask_targets,
    },
    "heatmaps_to_keypoints": {
        "reference": reference_keypoints.heatmaps_to_keypoints,
        "torchvision": lambda heatmaps, boxes, max_size: torchvision_heads.heatmaps_to_keypoints(heatmaps, boxes),
    },
}


def choose(op: str, impl: str, auto: str) -> Callable[..., Any]:
    """The implementation of `op` that `impl` names, where "auto" means `auto`; NotImplementedError if there is none."""
    available = IMPLEMENTATIONS[op]
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}: expected {', '.join(map(repr, get_args(Impl)))}")
    name = auto if impl == "auto" else impl
    if name not in available:
        others = " or ".join(repr(k) for k in ("auto", *available))
        raise NotImplementedError(f"fastmrcnn.ops.{op} has no {name!r} implementation yet: use impl={others}")
    return available[name]


def choose_kernel(
    op: str,
    impl: str,
    tensor: Tensor,
    without_kernel: str,
    name: str = "features",
    dtypes: Sequence[torch.dtype] = _KERNEL_DTYPES,
) -> tuple[str, Callable[..., Any]]:
    """Name and function of the implementation for inputs like `tensor`: `"auto"` is the kernel where it runs.

    TypeError if the kernel is asked for and `tensor`, the argument `name`, is of none of its `dtypes`.
    """
    if impl == "triton" and tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"impl='triton': expected {accepted} {name}, got {tensor.dtype}")
    if impl == "auto":
        runs = tensor.is_cuda and tensor.dtype in dtypes and _HAS_TRITON
        impl = "triton" if runs else without_kernel
    return impl, choose(op, impl, impl)
