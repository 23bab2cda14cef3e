"""Generated images of overlapping shapes with exact masks: a data set that needs no files."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.utils.data import Dataset

from fastmrcnn.data.drawing import Shape, paint, place
from fastmrcnn.data.types import Target

CLASS_NAMES = ("circle", "rectangle", "triangle")


class Shapes(Dataset[tuple[Tensor, Target]]):
    """Circles, rectangles and triangles on a noisy background; items as `DetectionDataset` describes them.

    Later shapes cover earlier ones, and masks are what remains visible, exactly: a pixel belongs to the topmost shape
    that its centre lies in. Of every object at least 20 pixels and a quarter of its area can be seen. Boxes are tight
    around the masks. Item i depends on (seed, i) alone, on every machine; torch's global generator is not used.

    Args:
        length: number of images.
        image_size: (height, width) in pixels, 32 or more each.
        max_objects: most objects in an image.
        min_objects: fewest objects wanted, 0 for images without any. A crowded image may end up with fewer, if not
            without any.
        tinted: give each class its own range of colours, which a network learns sooner than shapes alone.
        seed: non-negative; data sets of different seeds share no images.
        transforms: `(image, target) -> (image, target)`, applied last.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        length: int = 1000,
        *,
        image_size: tuple[int, int] = (128, 128),
        max_objects: int = 6,
        min_objects: int = 1,
        tinted: bool = False,
        seed: int = 0,
        transforms: Callable[[Tensor, Target], tuple[Tensor, Target]] | None = None,
    ) -> None:
        if length < 0 or seed < 0:
            raise ValueError(f"length and seed must not be negative, got {length} and {seed}")
        if len(image_size) != 2 or min(image_size) < 32:
            raise ValueError(f"image_size must be (height, width) from 32 pixels, got {image_size}")
        if not 0 <= min_objects <= max_objects:
            raise ValueError(f"0 <= min_objects <= max_objects is needed, got {min_objects} and {max_objects}")
        self.length = length
        self.size = (int(image_size[0]), int(image_size[1]))
        self.max_objects = max_objects
        self.min_objects = min_objects
        self.tinted = tinted
        self.seed = seed
        self.transforms = transforms
        self.category_ids = [1, 2, 3]
        self.class_names = list(CLASS_NAMES)
        self.num_classes = 4
        self.num_keypoints = 0
        # From 1, as COCO's own ids: tools take an id of 0 for "none".
        self.image_ids = list(range(1, length + 1))
        self._coco: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.length

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width) of item i in pixels."""
        self._index(i)
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        """Image and target of item i.

        Raises:
            IndexError: `i` is outside -len..len-1.
        """
        i = self._index(i)
        rng = self._generator(i)
        shapes, owner = place(rng, self.size, self.min_objects, self.max_objects)
        image = torch.from_numpy(paint(rng, shapes, owner, self.tinted).transpose(2, 0, 1).copy()).float() / 255
        target = self._target(i, shapes, owner)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    @property
    def coco(self) -> dict[str, Any]:
        """Ground truth of the whole data set as a COCO dict, masks as compressed RLE; built on first use."""
        if self._coco is None:
            self._coco = self._build_coco()
        return self._coco

    def _index(self, i: int) -> int:
        if not -self.length <= i < self.length:
            raise IndexError(f"index {i} is outside the dataset's {self.length} images")
        return i % self.length

    def _generator(self, i: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, i]))

    def _target(self, i: int, shapes: list[Shape], owner: NDArray[np.int64]) -> Target:
        masks = owner[None] == np.arange(1, len(shapes) + 1)[:, None, None]
        boxes = np.zeros((len(shapes), 4), np.float32)
        for box, mask in zip(boxes, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor([shape.label for shape in shapes], dtype=torch.int64),
            "masks": torch.from_numpy(masks.astype(np.uint8)),
            "image_id": self.image_ids[i],
            "area": torch.from_numpy(masks.sum((1, 2)).astype(np.float32)),
            "iscrowd": torch.zeros(len(shapes), dtype=torch.uint8),
        }

    def _build_coco(self) -> dict[str, Any]:
        height, width = self.size
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i, image_id in enumerate(self.image_ids):
            shapes, owner = place(self._generator(i), self.size, self.min_objects, self.max_objects)
            target = self._target(i, shapes, owner)
            file_name = f"shapes_{self.seed}_{i}.png"  # no such file: tools want a name
            images.append({"id": image_id, "height": height, "width": width, "file_name": file_name})
            for label, mask in zip(target["labels"].tolist(), target["masks"].numpy(), strict=True):
                rle = mask_utils.encode(np.asfortranarray(mask))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label,
                        "iscrowd": 0,
                        "area": int(mask_utils.area(rle)),
                        "bbox": mask_utils.toBbox(rle).tolist(),
                        "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                    }
                )
        categories = [{"id": id_, "name": name} for id_, name in zip(self.category_ids, self.class_names, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}
