"""Any folder of images with a COCO annotation file, as a dataset."""

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.utils.data import Dataset

from fastmrcnn.data.folder import ImageFolder
from fastmrcnn.data.images import load_image, read_image
from fastmrcnn.data.masks import rasterise, to_rle
from fastmrcnn.data.records import (
    AnnotationChecker,
    BadRecord,
    Record,
    Skipped,
    check_image,
    check_keypoints,
    read_coco,
)
from fastmrcnn.data.types import DataError, MissingFile, Target


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """A folder of images and a COCO-format JSON; items as `DetectionDataset` describes them.

    Items come in the order of their image ids. Category ids may have gaps: in sorted order they become labels 1, 2, ...
    Boxes may poke out of the image by 2 pixels, and are clipped. Crowds are no training objects: items leave them
    out, `coco` keeps them for evaluation. A missing "iscrowd" is 0, a missing "area" is that of the mask (of the box
    without masks), and both are filled in in `coco`, since COCO evaluation needs them. An object without "keypoints"
    gets keypoints of visibility 0 (not labelled).

    Every record is checked on construction, so that training does not stop at hour ten; only the contents of image
    files are not. With `on_error="skip"` bad records are dropped (an image with all its annotations), counted by kind
    in `skipped`, and summarised in one warning. With `on_unreadable="skip"` an image file that turns out unreadable
    later is counted and warned about once, and the next readable item is returned in its place: `target["image_id"]`
    says which. It stays in `coco`. Each DataLoader worker counts for itself.

    Args:
        images: folder the records' `file_name`s are relative to.
        annotations: the JSON file.
        masks: read segmentations (polygons, RLE, compressed RLE); every annotation must then have one.
        keypoints: read keypoints.
        on_error: "raise" or "skip", for bad records. A file that is not COCO at all always raises.
        on_unreadable: "raise" or "skip", for image files that turn out unreadable; by default as `on_error`.
        as_bytes: images are uint8, as files hold them, instead of float32 in 0..1: less to compute and to move.
        channels: of the images: 3 is RGB, for others see `load_image`.
        transforms: `(image, target) -> (image, target)`, applied last.

    Raises:
        MissingFile: the folder or the JSON is not there (`MissingImage`: an image).
        DataError: anything in them is unusable; the message names the file, the record, and what is accepted.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        masks: bool = True,
        keypoints: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        on_unreadable: Literal["raise", "skip"] | None = None,
        as_bytes: bool = False,
        channels: int = 3,
        transforms: Callable[[Tensor, Target], tuple[Tensor, Target]] | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
        if on_unreadable not in ("raise", "skip", None):
            raise ValueError(f'on_unreadable must be "raise", "skip" or None, got {on_unreadable!r}')
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.root = Path(images)
        self.file = Path(annotations)
        self.masks = masks
        self.keypoints = keypoints
        self.on_error = on_error
        self.on_unreadable = on_unreadable or on_error
        self.as_bytes = as_bytes
        self.channels = channels
        self.transforms = transforms
        if not self.root.is_dir():
            raise MissingFile(f"{self.root}: no such folder of images")
        self.coco: dict[str, Any] = read_coco(self.file)

        categories = sorted(self.coco["categories"], key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in categories]
        self.class_names: list[str] = [category["name"] for category in categories]
        self.num_classes = len(categories) + 1
        self._labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        self.keypoint_names = self._keypoint_names() if keypoints else []
        self.num_keypoints = len(self.keypoint_names) or (self._count_keypoints() if keypoints else 0)

        skipped = Skipped(self.file, on_error)
        self.skipped: Counter[str] = skipped.counts
        self._check_images(skipped)
        self._check_annotations(skipped)
        skipped.warn()
        self._unreadable: set[int] = set()

        self.image_ids: list[int] = sorted(self._sizes)
        self._objects: defaultdict[int, list[Record]] = defaultdict(list)
        for annotation in self.coco["annotations"]:
            if not annotation["iscrowd"]:
                self._objects[annotation["image_id"]].append(annotation)

    def _keypoint_names(self) -> list[str]:
        named = [category for category in self.coco["categories"] if category.get("keypoints")]
        for category in named:
            if len(category["keypoints"]) != len(named[0]["keypoints"]):
                raise DataError(
                    f"{self.file}: categories {named[0]['id']} and {category['id']} have {len(named[0]['keypoints'])} "
                    f"and {len(category['keypoints'])} keypoints; accepted is one number for all that have any"
                )
        return list(named[0]["keypoints"]) if named else []

    def _count_keypoints(self) -> int:
        for annotation in self.coco["annotations"]:
            keypoints = annotation.get("keypoints")
            if isinstance(keypoints, list) and keypoints and len(keypoints) % 3 == 0:
                return len(keypoints) // 3
        raise DataError(f'{self.file}: keypoints=True, but no category and no annotation has "keypoints"')

    def _check_images(self, skipped: Skipped) -> None:
        folder = ImageFolder(self.root)
        self._files: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        kept = []
        for position, image in enumerate(self.coco["images"]):
            try:
                check_image(image)
                self._files[image["id"]] = folder.find(image.get("file_name"))
            except BadRecord as bad:
                skipped.add(f"images[{position}] (id {image.get('id')!r})", bad)
                continue
            self._sizes[image["id"]] = (image["height"], image["width"])
            kept.append(image)
        if not kept:
            skipped.warn()
            raise DataError(f'{self.file}: no usable image among the {len(self.coco["images"])} of "images"')
        self._dropped = {image["id"] for image in self.coco["images"] if type(image.get("id")) is int} - set(
            self._sizes
        )
        self.coco["images"] = kept

    def _check_annotations(self, skipped: Skipped) -> None:
        annotations = self.coco["annotations"]
        checker = AnnotationChecker(annotations, self._sizes, self.category_ids, masks=self.masks)
        kept = []
        for position, annotation in enumerate(annotations):
            try:
                image_id = annotation.get("image_id")
                if type(image_id) is int and image_id in self._dropped:
                    raise BadRecord("annotation of a skipped image", f"its image {image_id} was skipped")
                checker.check(position, annotation)
                if self.keypoints and "keypoints" in annotation:
                    check_keypoints(annotation["keypoints"], self.num_keypoints)
            except BadRecord as bad:
                skipped.add(f"annotations[{position}] (id {annotation.get('id')!r})", bad)
                continue
            annotation.setdefault("iscrowd", 0)
            if "area" not in annotation:
                annotation["area"] = self._area(annotation)
            kept.append(annotation)
        self.coco["annotations"] = kept

    def _area(self, annotation: Record) -> float:
        if self.masks:
            return float(mask_utils.area(to_rle(annotation["segmentation"], *self._sizes[annotation["image_id"]])))
        return float(annotation["bbox"][2] * annotation["bbox"][3])

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_path(self, i: int) -> Path:
        """Path of item i's image."""
        return self.root / self._files[self.image_ids[i]]

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width) of item i in pixels, as the JSON declares it."""
        return self._sizes[self.image_ids[i]]

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        """Image and target of item i, or with `on_unreadable="skip"` of the next readable one.

        Raises:
            IndexError: `i` is outside -len..len-1.
            DataError: the image cannot be read or has another size than declared; with "skip", none can be read.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i} is outside the dataset's {len(self)} images")
        image, i = self._read(i % len(self))
        target = self._target(i)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _read(self, i: int) -> tuple[Tensor, int]:
        read = read_image if self.as_bytes else load_image
        for candidate in [*range(i, len(self)), *range(i)]:
            if candidate in self._unreadable:
                continue
            try:
                path, size = self.image_path(candidate), self.image_size(candidate)
                return read(path, size=size, channels=self.channels), candidate
            except DataError as error:
                message = f"{self.file}: image {self.image_ids[candidate]}: {error}"
                if self.on_unreadable == "raise":
                    raise type(error)(message) from error
                self._unreadable.add(candidate)
                self.skipped["unreadable image"] += 1
                warnings.warn(f"{message}; the next readable image takes its place", UserWarning, stacklevel=3)
        raise DataError(f"{self.file}: none of its {len(self)} images in {self.root} can be read")

    def _target(self, i: int) -> Target:
        image_id = self.image_ids[i]
        height, width = self.image_size(i)
        objects = self._objects.get(image_id, [])
        boxes = np.array([annotation["bbox"] for annotation in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, [width, height, width, height])
        target: Target = {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.tensor(
                [self._labels[annotation["category_id"]] for annotation in objects], dtype=torch.int64
            ),
            "image_id": image_id,
            "area": torch.tensor([annotation["area"] for annotation in objects], dtype=torch.float32),
            "iscrowd": torch.zeros(len(objects), dtype=torch.uint8),
        }
        if self.masks:
            segmentations = [annotation["segmentation"] for annotation in objects]
            target["masks"] = torch.from_numpy(rasterise(segmentations, height, width))
        if self.keypoints:
            unlabelled = [0] * (3 * self.num_keypoints)
            values = [annotation.get("keypoints", unlabelled) for annotation in objects]
            target["keypoints"] = torch.tensor(values, dtype=torch.float32).reshape(-1, self.num_keypoints, 3)
        return target
