"""What every dataset here promises, and the errors it raises."""

from typing import Any, Protocol, TypeAlias

from torch import Tensor

# Box, label, mask and keypoint tensors of one image, under torchvision's detection-reference names.
Target: TypeAlias = dict[str, Any]


class DataError(ValueError):
    """Bad data. The message names the file and the record, what is wrong with it, and what is accepted."""


class MissingFile(DataError, FileNotFoundError):
    """A file or folder that is not there."""


class MissingImage(MissingFile):
    """An image file that is not there."""


class DetectionDataset(Protocol):
    """What training and evaluation need from a dataset; `CocoDetection` and `Shapes` have it.

    `dataset[i]` is `(image, target)`: image [3,H,W], RGB, float32 in 0..1, or uint8; target a dict of

    - `boxes` float32 [G,4]: x1, y1, x2, y2 in pixels
    - `labels` int64 [G] in 1..num_classes-1 (0 is the background)
    - `masks` uint8 [G,H,W], 0 or 1 (where the dataset has them)
    - `keypoints` float32 [G,K,3]: x, y in pixels, visibility 0, 1 or 2 (where the dataset has them)
    - `area` float32 [G] in square pixels, `iscrowd` uint8 [G] (always 0), `image_id` int
    """

    @property
    def category_ids(self) -> list[int]:
        """The category id of label l is `category_ids[l - 1]`."""
        ...

    @property
    def class_names(self) -> list[str]:
        """The name of label l is `class_names[l - 1]`: no background."""
        ...

    @property
    def num_classes(self) -> int:
        """Categories + 1, for the background."""
        ...

    @property
    def num_keypoints(self) -> int:
        """K, or 0 where targets hold no keypoints."""
        ...

    @property
    def image_ids(self) -> list[int]:
        """The image id of each item, in order."""
        ...

    @property
    def coco(self) -> dict[str, Any]:
        """The ground truth as a COCO annotation dict, crowds included: what `pycocotools.coco.COCO.dataset` holds."""
        ...

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width) of item i in pixels, before transforms, without reading the image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Tensor, Target]: ...


def collate(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A DataLoader's `collate_fn`: images differ in size, so a batch is a list of images and a list of targets."""
    return [image for image, _ in batch], [target for _, target in batch]
