"""The Triton kernels as PyTorch operators `torch.ops.fastmrcnn.*`: schemas, shapes, gradients.

That makes them visible to autograd, `torch.compile`, `torch.export` and fake tensors.  Autocast passes them by: 16-bit
features stay 16-bit and boxes float32.  Triton itself is imported at the first call.
"""

from fastmrcnn_kernels.library.bits import mask_iou
from fastmrcnn_kernels.library.boxes import decode_boxes, decode_proposals, encode_boxes
from fastmrcnn_kernels.library.canvases import clear_beyond_
from fastmrcnn_kernels.library.detections import select_detections
from fastmrcnn_kernels.library.images import resize_images
from fastmrcnn_kernels.library.mask_targets import mask_targets
from fastmrcnn_kernels.library.masks import encode_bool, encode_masks, launch_encoding, paste_masks
from fastmrcnn_kernels.library.matching import match_boxes
from fastmrcnn_kernels.library.nms import batched_nms, nms, padded_nms
from fastmrcnn_kernels.library.proposals import merge_levels, topk_anchors
from fastmrcnn_kernels.library.roi_align import multilevel_roi_align, roi_align
from fastmrcnn_kernels.library.roi_pool import roi_pool
from fastmrcnn_kernels.library.soft_nms import padded_soft_nms

__all__ = [
    "batched_nms",
    "clear_beyond_",
    "decode_boxes",
    "decode_proposals",
    "encode_bool",
    "encode_boxes",
    "encode_masks",
    "launch_encoding",
    "mask_iou",
    "mask_targets",
    "match_boxes",
    "merge_levels",
    "multilevel_roi_align",
    "nms",
    "padded_nms",
    "padded_soft_nms",
    "paste_masks",
    "resize_images",
    "roi_align",
    "roi_pool",
    "select_detections",
    "topk_anchors",
]
