"""Mask R-CNN for PyTorch: torchvision's API, weights and results, with Triton kernels on the hot paths."""

from fastmrcnn import matterport, ops
from fastmrcnn.accelerate import accelerate
from fastmrcnn.batches import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch
from fastmrcnn.checkpoints import load
from fastmrcnn.engine import Engine, compile
from fastmrcnn.models.builders import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from fastmrcnn.models.mask_rcnn import FasterRCNN, KeypointRCNN, MaskRCNN
from fastmrcnn.patching import patch_torchvision
from fastmrcnn.predictor import Prediction, Predictor

__version__ = "0.1.0"

__all__ = [
    "DetectionBatch",
    "Engine",
    "FasterRCNN",
    "ImageBatch",
    "KeypointRCNN",
    "MaskRCNN",
    "Prediction",
    "Predictor",
    "ProposalBatch",
    "TargetBatch",
    "accelerate",
    "compile",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "load",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "matterport",
    "ops",
    "patch_torchvision",
]
