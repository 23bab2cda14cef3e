"""Datasets, image reading and augmentation."""

from fastmrcnn.data.coco import CocoDetection
from fastmrcnn.data.images import image_files, load_image
from fastmrcnn.data.shapes import Shapes
from fastmrcnn.data.transforms import HorizontalFlip, left_right_pairs
from fastmrcnn.data.types import DataError, DetectionDataset, MissingFile, MissingImage, Target, collate

__all__ = [
    "CocoDetection",
    "DataError",
    "DetectionDataset",
    "HorizontalFlip",
    "MissingFile",
    "MissingImage",
    "Shapes",
    "Target",
    "collate",
    "image_files",
    "left_right_pairs",
    "load_image",
]
