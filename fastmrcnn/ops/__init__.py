"""The operations of a two-stage detector, as functions: validate, choose an implementation, call it.

Signatures are torchvision's where it has the operation.  Every function takes `impl`:

- `"auto"`: the fastest implementation for the device of the inputs;
- `"reference"`: plain PyTorch, the specification, any device, float64-capable;
- `"torchvision"`: torchvision's own code, where it has the same semantics, or its method;
- `"torch"`: RoIAlign on a CPU, as a sparse matrix;
- `"numpy"`: bits, and what is made of them, on a CPU;
- `"triton"`: the GPU kernels.

Asking for an implementation that is not there raises NotImplementedError; an explicit request never falls back.
Boxes are `x1,y1,x2,y2` in pixels everywhere.
"""

from fastmrcnn.ops.bits import boundary_iou, count_bits, mask_boundary, mask_iou, pack_bits, unpack_bits
from fastmrcnn.ops.boxes import decode_boxes, encode_boxes
from fastmrcnn.ops.canvases import clear_beyond_
from fastmrcnn.ops.detections import select_detections
from fastmrcnn.ops.images import pack_images, resize_images
from fastmrcnn.ops.implementations import Impl
from fastmrcnn.ops.masks import Semantics, heatmaps_to_keypoints, paste_masks, paste_masks_in_image
from fastmrcnn.ops.matching import match_boxes
from fastmrcnn.ops.proposals import decode_proposals, merge_levels, topk_anchors
from fastmrcnn.ops.rle import RLE, Encoded, begin_encoding, decode, encode_bool, encode_masks, launch_encoding
from fastmrcnn.ops.roi import (
    LevelRule,
    MultiScaleRoIAlign,
    levels_by,
    multilevel_roi_align,
    pool_like,
    roi_align,
    roi_pool,
)
from fastmrcnn.ops.suppression import batched_nms, nms, padded_nms, padded_soft_nms, soft_nms
from fastmrcnn.ops.targets import mask_targets, pack_masks

__all__ = [
    "RLE",
    "Encoded",
    "Impl",
    "LevelRule",
    "MultiScaleRoIAlign",
    "Semantics",
    "batched_nms",
    "begin_encoding",
    "boundary_iou",
    "clear_beyond_",
    "count_bits",
    "decode",
    "decode_boxes",
    "decode_proposals",
    "encode_bool",
    "encode_boxes",
    "encode_masks",
    "heatmaps_to_keypoints",
    "launch_encoding",
    "levels_by",
    "mask_boundary",
    "mask_iou",
    "mask_targets",
    "match_boxes",
    "merge_levels",
    "multilevel_roi_align",
    "nms",
    "pack_bits",
    "pack_images",
    "pack_masks",
    "padded_nms",
    "padded_soft_nms",
    "paste_masks",
    "paste_masks_in_image",
    "pool_like",
    "resize_images",
    "roi_align",
    "roi_pool",
    "select_detections",
    "soft_nms",
    "topk_anchors",
    "unpack_bits",
]
