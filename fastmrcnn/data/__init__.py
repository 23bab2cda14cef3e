"""Datasets, image reading, augmentation, and the batches of a training run."""

from fastmrcnn.data.coco import CocoDetection
from fastmrcnn.data.copy_paste import CopyPaste
from fastmrcnn.data.images import image_files, load_image, read_image
from fastmrcnn.data.items import LoadedSample, TrainingItems
from fastmrcnn.data.loading import Prefetcher, collate_loaded, training_loader
from fastmrcnn.data.sampling import Key, TrainingBatches, repeat_factors
from fastmrcnn.data.shapes import Shapes
from fastmrcnn.data.transforms import HorizontalFlip, PhotometricDistort, left_right_pairs
from fastmrcnn.data.types import DataError, DetectionDataset, MissingFile, MissingImage, Target, collate
from fastmrcnn.data.views import LargeScaleJitter, Resize, look_through

__all__ = [
    "CocoDetection",
    "CopyPaste",
    "DataError",
    "DetectionDataset",
    "HorizontalFlip",
    "Key",
    "LargeScaleJitter",
    "LoadedSample",
    "MissingFile",
    "MissingImage",
    "PhotometricDistort",
    "Prefetcher",
    "Resize",
    "Shapes",
    "Target",
    "TrainingBatches",
    "TrainingItems",
    "collate",
    "collate_loaded",
    "image_files",
    "left_right_pairs",
    "load_image",
    "look_through",
    "read_image",
    "repeat_factors",
    "training_loader",
]
