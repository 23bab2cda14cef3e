"""An image of an epoch, ready to be put into a batch: read, augmented, checked, and as few bytes as there are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmrcnn import ops
from fastmrcnn.data.sampling import Key, mixed_seed
from fastmrcnn.data.types import DataError, DetectionDataset, Target
from fastmrcnn.data.views import View, look_through


@dataclass
class LoadedSample:
    """One image with its objects, for `collate_loaded`.

    Args:
        image_id: of the image.
        image: uint8 [C, H, W], not resized.
        view: how it is resized and cropped, eight integers: see `fastmrcnn_kernels.views`.
        boxes: float32 [G, 4], pixels of the view's window.
        labels: int64 [G].
        words: masks of the whole image, not resized, packed: int32 [G, H, ceil(W / 32)]; or None.
        keypoints: float32 [G, K, 3], pixels of the window; or None.
    """

    image_id: int
    image: Tensor
    view: View
    boxes: Tensor
    labels: Tensor
    words: Tensor | None = None
    keypoints: Tensor | None = None


class TrainingItems(Dataset[LoadedSample]):
    """What a DataLoader with `TrainingBatches` reads: `items[key]` is the sample of a `Key`.

    Whatever is random in it is drawn from (seed, epoch, position) alone, so that it does not depend on which process
    or worker makes it, nor on what was made before. That holds of all that draws from torch's global generator on the
    CPU, which afterwards is in the state that it was in. Floating-point images are rounded to bytes.

    Args:
        dataset: where images and targets come from.
        seed: of all that is random, not negative.
        transforms: `(image, target) -> (image, target)`, applied to what the dataset returns.
        view: how an image of (height, width) pixels is resized and cropped: `Resize` or `LargeScaleJitter`.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        seed: int,
        transforms: Callable[[Tensor, Target], tuple[Tensor, Target]] | None,
        view: Callable[[int, int], View],
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.transforms = transforms
        self.view = view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | tuple[int, int, int]) -> LoadedSample:
        """The sample of a key (epoch, position, item).

        Raises:
            DataError: the image cannot be read, or its target is not what `DetectionDataset` promises.
        """
        epoch, position, item = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the generators of GPUs, too.
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, position))
            image, target = self.dataset[item]
            if self.transforms is not None:
                image, target = self.transforms(image, target)
            view = self.view(image.shape[-2], image.shape[-1])
        check_target(image, target, self.dataset.num_classes)
        seen = look_through(target, view)
        masks = seen.get("masks")
        return LoadedSample(
            int(seen["image_id"]),
            in_bytes(image),
            view,
            seen["boxes"],
            seen["labels"],
            None if masks is None else ops.pack_bits(masks.view(torch.bool)),
            seen.get("keypoints"),
        )


def in_bytes(image: Tensor) -> Tensor:
    """An image in 0..1 as uint8, each value rounded to the nearest of 0/255 .. 255/255; of uint8 itself."""
    return image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)


def check_target(image: Tensor, target: Target, num_classes: int) -> None:
    """Check an item of a dataset after its transforms.

    Raises:
        DataError: image or target are not what `DetectionDataset` promises; the message names the image.
    """
    name = f"image {target.get('image_id')!r}"
    if image.dim() != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise DataError(f"{name}: it is {_kind(image)}; accepted is uint8 or floating point [C, H, W]")
    if missing := {"boxes", "labels", "image_id"} - target.keys():
        raise DataError(f"{name}: its target has no {sorted(missing)}")
    boxes, labels = target["boxes"], target["labels"]
    expected: dict[str, tuple[torch.dtype, tuple[Any, ...]]] = {
        "boxes": (torch.float32, (len(labels), 4)),
        "labels": (torch.int64, (len(labels),)),
        "masks": (torch.uint8, (len(labels), *image.shape[1:])),
        "keypoints": (torch.float32, (len(labels), None, 3)),
    }
    for key, (dtype, shape) in expected.items():
        if key not in target:
            continue
        value = target[key]
        right = value.dim() == len(shape) and all(b in (a, None) for a, b in zip(value.shape, shape, strict=True))
        if value.dtype != dtype or not right:
            raise DataError(f"{name}: {key} are {_kind(value)}; accepted is {dtype} {list(shape)}")
    if not boxes.isfinite().all() or not (boxes[:, 2:] > boxes[:, :2]).all():
        bad = ~(boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1))
        raise DataError(f"{name}: boxes must be finite x1 < x2, y1 < y2 in pixels, got {boxes[bad][0].tolist()}")
    if len(labels) and not (labels.min() >= 1 and labels.max() < num_classes):
        raise DataError(f"{name}: labels must be in 1..{num_classes - 1}, got {labels.tolist()}")
    if "keypoints" in target and not target["keypoints"].isfinite().all():
        raise DataError(f"{name}: keypoints must be finite")


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
