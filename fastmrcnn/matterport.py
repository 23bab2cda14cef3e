"""The surface of matterport's Mask R-CNN, for programs that were written for it.

    class InferenceConfig(matterport.Config):
        NAME, NUM_CLASSES, BACKBONE = "coco", 81, "resnet101"

    model = matterport.MaskRCNN("inference", InferenceConfig())
    model.load_weights("mask_rcnn_coco.h5", by_name=True)
    result = model.detect([image])[0]
    matterport.display_instances(image, result["rois"], result["masks"], result["class_ids"], names, result["scores"])

Networks trained there give here what they gave there.  Training is `fastmrcnn train`, whose networks are torchvision's,
detectron2's or MMDetection's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmrcnn import ops
from fastmrcnn.checkpoints import matterport as converter
from fastmrcnn.checkpoints.hdf5 import is_hdf5, load_layers
from fastmrcnn.checkpoints.native import load_strictly
from fastmrcnn.checkpoints.reading import read_weights
from fastmrcnn.checkpoints.tensors import existing
from fastmrcnn.checkpoints.weights import some
from fastmrcnn.inference import default_device, device_of
from fastmrcnn.models.config import ModelConfig, ModelName, build_model
from fastmrcnn.models.matterport import SquareRPN
from fastmrcnn.visualize import draw

MASK_THRESHOLD = 0.5


class Config:
    """matterport's settings by their names there, with its defaults; a subclass sets those that differ.

    Only those that have a part in detection are here; a subclass may have others, such as LEARNING_RATE.
    """

    NAME: str | None = None
    NUM_CLASSES: int = 1
    """With the background."""
    BACKBONE: str = "resnet101"
    BACKBONE_STRIDES: Sequence[int] = (4, 8, 16, 32, 64)
    TOP_DOWN_PYRAMID_SIZE: int = 256
    FPN_CLASSIF_FC_LAYERS_SIZE: int = 1024
    IMAGE_RESIZE_MODE: str = "square"
    IMAGE_MIN_DIM: int = 800
    IMAGE_MAX_DIM: int = 1024
    IMAGE_MIN_SCALE: float = 0
    IMAGE_CHANNEL_COUNT: int = 3
    MEAN_PIXEL: Sequence[float] = (123.7, 116.8, 103.9)
    RPN_ANCHOR_SCALES: Sequence[int] = (32, 64, 128, 256, 512)
    RPN_ANCHOR_RATIOS: Sequence[float] = (0.5, 1, 2)
    RPN_ANCHOR_STRIDE: int = 1
    RPN_NMS_THRESHOLD: float = 0.7
    RPN_BBOX_STD_DEV: Sequence[float] = (0.1, 0.1, 0.2, 0.2)
    BBOX_STD_DEV: Sequence[float] = (0.1, 0.1, 0.2, 0.2)
    PRE_NMS_LIMIT: int = 6000
    POST_NMS_ROIS_INFERENCE: int = 1000
    POOL_SIZE: int = 7
    MASK_POOL_SIZE: int = 14
    DETECTION_MAX_INSTANCES: int = 100
    DETECTION_MIN_CONFIDENCE: float = 0.7
    DETECTION_NMS_THRESHOLD: float = 0.3

    def display(self) -> None:
        """Print all settings."""
        names = [name for name in dir(self) if name.isupper()]
        print("\n".join(["Configurations:", *(f"{name:30} {getattr(self, name)}" for name in names)]))


FIXED = (
    "BACKBONE_STRIDES",
    "TOP_DOWN_PYRAMID_SIZE",
    "FPN_CLASSIF_FC_LAYERS_SIZE",
    "IMAGE_RESIZE_MODE",
    "IMAGE_MIN_SCALE",
    "IMAGE_CHANNEL_COUNT",
    "RPN_ANCHOR_RATIOS",
    "RPN_ANCHOR_STRIDE",
    "RPN_BBOX_STD_DEV",
    "BBOX_STD_DEV",
    "POOL_SIZE",
    "MASK_POOL_SIZE",
)
"""Settings that have one value here."""


class MaskRCNN:
    """A network with matterport's conventions, and its methods.

    Args:
        mode: "inference".
        config: settings.
        model_dir: as there; nothing is written.
        device: where to run; by default on the GPU if there is one.

    Attributes:
        model: the network, as `fastmrcnn.load` makes it.

    Raises:
        ValueError: the mode, or a setting, is one that there is only in matterport's.
    """

    def __init__(
        self,
        mode: str = "inference",
        config: Config | None = None,
        model_dir: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if mode != "inference":
            raise ValueError(f'mode={mode!r}: expected "inference"; `fastmrcnn train` trains')
        self.mode, self.model_dir = mode, model_dir
        self.config = Config() if config is None else config
        model = build_model(_model_config(self.config), self.config.NUM_CLASSES)
        rpn, heads = cast(SquareRPN, model.rpn), model.roi_heads
        rpn.nms_thresh = self.config.RPN_NMS_THRESHOLD
        rpn._pre_nms_top_n["testing"] = self.config.PRE_NMS_LIMIT
        rpn._post_nms_top_n["testing"] = self.config.POST_NMS_ROIS_INFERENCE
        heads.score_thresh = self.config.DETECTION_MIN_CONFIDENCE
        heads.nms_thresh = self.config.DETECTION_NMS_THRESHOLD
        self.model = model.to(default_device() if device is None else device).eval()

    def load_weights(
        self, filepath: str | os.PathLike[str], by_name: bool = False, exclude: Sequence[str] | None = None
    ) -> None:
        """Load a file of Keras, or one that `fastmrcnn convert` made of it.

        Args:
            filepath: the file.
            by_name: layers that the file lacks keep their values; otherwise that is an error.
            exclude: names of layers, or regular expressions, to leave as they are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of this network, or one for another number of classes; nothing has changed then.
        """
        path = existing(filepath)
        if not is_hdf5(path):
            if exclude:
                raise ValueError(f"exclude: {path} is no file of Keras, and has no layers of these names")
            state, lacking = read_weights(path).state, []
        else:
            layers = load_layers(path)
            try:
                weights = converter.convert(layers, tuple(exclude or ()), partial=by_name or bool(exclude))
            except ValueError as error:
                raise ValueError(f"load_weights: {path}: {error}") from error
            state = weights.state
            lacking = [name for name in self.model.state_dict() if name not in state]
        try:
            load_strictly(self.model, self.model.state_dict() | state)
        except ValueError as error:
            raise ValueError(
                f"load_weights: {path} is of another network than NUM_CLASSES={self.config.NUM_CLASSES} and "
                f"BACKBONE={self.config.BACKBONE!r}: {error}. For other classes "
                "exclude=['mrcnn_class_logits', 'mrcnn_bbox_fc', 'mrcnn_mask']"
            ) from error
        if lacking:
            print(f"new, not in {path}: {some(lacking)}")

    def detect(self, images: Sequence[NDArray[np.uint8]], verbose: int = 0) -> list[dict[str, NDArray[Any]]]:
        """What is in each image.

        Args:
            images: uint8 [H, W, 3] each, RGB.
            verbose: 1 prints their sizes.

        Returns:
            One dict per image, of N objects: `rois` int32 [N, 4] (y1, x1, y2, x2), `class_ids` int32 [N], `scores`
            float32 [N], `masks` bool [H, W, N].

        Raises:
            TypeError, ValueError: an image is none.
        """
        inputs = [_as_input(image, i) for i, image in enumerate(images)]
        if verbose:
            print(f"Processing {len(inputs)} images: {', '.join(str(image.shape) for image in images)}")
        if not inputs:
            return []
        device = device_of(self.model)
        sizes = [(image.shape[-2], image.shape[-1]) for image in inputs]
        with torch.inference_mode():
            batch, _, resized = self.model.transform.batch([image.to(device) for image in inputs], None)
            found = self.model.transform.in_original_pixels(self.model.detect(batch), resized, sizes)
            assert found.masks is not None
            results = []
            for i, count in enumerate(found.count.tolist()):
                boxes, masks = found.boxes[i, :count], found.masks[i, :count]
                results.append(
                    {
                        "rois": boxes[:, [1, 0, 3, 2]].to(torch.int32).cpu().numpy(),
                        "class_ids": found.labels[i, :count].to(torch.int32).cpu().numpy(),
                        "scores": found.scores[i, :count].float().cpu().numpy(),
                        "masks": _full_masks(masks, boxes, sizes[i]).permute(1, 2, 0).cpu().numpy(),
                    }
                )
        return results


def display_instances(
    image: NDArray[np.uint8],
    boxes: NDArray[Any],
    masks: NDArray[np.bool_],
    class_ids: NDArray[Any],
    class_names: Sequence[str],
    scores: NDArray[Any] | None = None,
    title: str = "",
    figsize: tuple[float, float] = (16, 16),
    ax: Any = None,
) -> Image.Image:
    """Draw objects over their image, as `detect` returns them, and show the picture if matplotlib can.

    Args:
        image: uint8 [H, W, 3].
        boxes: [N, 4] (y1, x1, y2, x2).
        masks: bool [H, W, N].
        class_ids: [N].
        class_names: name of each class, the background's first.
        scores: [N].
        title: of the picture.
        figsize: inches, where a figure is made.
        ax: axes of matplotlib to draw in; by default a figure of its own.

    Returns:
        The picture.
    """
    if not boxes.shape[0] == masks.shape[-1] == class_ids.shape[0]:
        raise ValueError(
            f"boxes, masks, class_ids: expected as many of each, got {len(boxes)}, {masks.shape[-1]}, {len(class_ids)}"
        )
    result: dict[str, Any] = {
        "boxes": torch.as_tensor(boxes).reshape(-1, 4)[:, [1, 0, 3, 2]].float(),
        "labels": torch.as_tensor(class_ids).long(),
        "masks": torch.as_tensor(masks).permute(2, 0, 1),
    }
    if scores is not None:
        result["scores"] = torch.as_tensor(scores)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    picture = draw(pixels, result, class_names=list(class_names)[1:], score_threshold=0.0)
    if ax is None:
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError:
            return picture
        ax = pyplot.figure(figsize=figsize).add_subplot()
        shown = True
    else:
        shown = False
    ax.axis("off")
    ax.set_title(title)
    ax.imshow(picture)
    if shown:
        pyplot.show()
    return picture


def _model_config(config: Config) -> ModelConfig:
    """The settings of a network; ValueError for those that there are only in matterport's."""
    for name in FIXED:
        value, only = (_plain(x) for x in (getattr(config, name), vars(Config)[name]))
        if value != only:
            raise ValueError(f"config.{name} is {value}: expected {only}, which is all that this library has")
    if config.BACKBONE not in ("resnet50", "resnet101"):
        raise ValueError(f"config.BACKBONE is {config.BACKBONE!r}: expected 'resnet50' or 'resnet101'")
    if config.NUM_CLASSES < 2:
        raise ValueError(f"config.NUM_CLASSES is {config.NUM_CLASSES}: expected the background and at least one more")
    if config.IMAGE_MAX_DIM % 64:
        raise ValueError(f"config.IMAGE_MAX_DIM is {config.IMAGE_MAX_DIM}: expected a multiple of 64")
    return ModelConfig(
        cast(ModelName, f"maskrcnn_{config.BACKBONE}_fpn"),
        min_size=config.IMAGE_MIN_DIM,
        max_size=config.IMAGE_MAX_DIM,
        anchor_sizes=[int(size) for size in config.RPN_ANCHOR_SCALES],
        detections_per_image=config.DETECTION_MAX_INSTANCES,
        image_mean=[float(mean) / 255 for mean in config.MEAN_PIXEL],
        conventions="matterport",
    )


def _plain(value: Any) -> Any:
    """A setting that can be compared, whether it is a tuple, a list or an array."""
    return value if isinstance(value, str) else np.asarray(value).tolist()


def _as_input(image: Any, number: int) -> Tensor:
    """An image as the network takes it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        what = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"images[{number}]: expected a uint8 array [H, W, 3], got {what}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"images[{number}]: expected [H, W, 3], got {list(image.shape)}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _full_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [N, H, W] of [N, 28, 28] in whole boxes.

    What enlarges them there counts what is outside of a mask as 0, but clips to its least value: one that is inside
    everywhere stays so up to the border of its box.
    """
    pasted = ops.paste_masks(masks, boxes, size, out="bool", threshold=MASK_THRESHOLD, semantics="detectron2")
    y, x = (torch.arange(side, device=boxes.device) for side in size)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]
    full = masks.flatten(1).amin(dim=1) >= MASK_THRESHOLD
    return pasted | (inside & full[:, None, None])


__all__ = ["Config", "MaskRCNN", "display_instances"]
