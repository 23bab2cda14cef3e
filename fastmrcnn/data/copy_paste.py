"""Objects of one image pasted into another: simple copy-paste (Ghiasi et al., 2021)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F

from fastmrcnn.data.types import DetectionDataset, Target
from fastmrcnn.data.views import PER_OBJECT


class CopyPaste:
    """With probability `p`, some objects of another image of the data set are pasted into the one given.

    Another image is drawn, scaled to the largest size that fits into the one given times a factor drawn from `low` to
    `high`, mirrored or not, and put at a random place: within the given image if it is smaller, over it if it is
    larger. Each of its objects is taken with probability 1/2, if at least `min_visible` of it lies in the image. Their
    pixels replace those of the image, without blending, which the paper found to be as good.

    They cover what was there: objects of the given image lose these pixels from their masks, and go if less than
    `min_visible` of their former area remains; those that changed and stay get the boxes and areas of their masks, as
    pasted ones do. Pasted objects come last. Nothing given is modified.

    Args:
        dataset: where the other image comes from: items with masks and without keypoints, and not those that this
            transform is applied to already, such as a data set of which it is among the `transforms`.
        p: probability that anything is pasted, 0..1.
        low: least factor.
        high: greatest factor.
        min_visible: share of an object's area, 0..1; at least one pixel always is needed.

    Raises:
        ValueError: an argument is out of range, or the data set has no masks, or keypoints.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        p: float = 0.5,
        *,
        low: float = 0.1,
        high: float = 2.0,
        min_visible: float = 0.1,
    ) -> None:
        if not (0 <= p <= 1 and 0 <= min_visible <= 1):
            raise ValueError(f"p and min_visible must be in 0..1, got {p!r} and {min_visible!r}")
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"0 < low <= high is needed, got {low!r} and {high!r}")
        if not getattr(dataset, "masks", True) or dataset.num_keypoints:
            raise ValueError("dataset: copy-paste needs masks, and no keypoints")
        self.dataset = dataset
        self.p = p
        self.low = low
        self.high = high
        self.min_visible = min_visible

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Image [C,H,W] and target of one item, with more objects or as they are."""
        if torch.rand(()) >= self.p:
            return image, target
        other, source = self.dataset[int(torch.randint(len(self.dataset), ()))]
        taken = torch.rand(len(source["labels"])) < 0.5
        factor = self.low + (self.high - self.low) * torch.rand((), dtype=torch.float64).item()
        overlay = _overlay((image.shape[-2], image.shape[-1]), (other.shape[-2], other.shape[-1]), factor)
        if not taken.any():
            return image, target

        whole = source["masks"][taken]
        masks = whole.new_zeros(len(whole), *image.shape[-2:])
        rows, columns = (
            place * old // new for place, old, new in zip(overlay.seen, other.shape[-2:], overlay.size, strict=True)
        )
        masks[overlay.place] = whole.index_select(1, rows).index_select(2, columns)
        expected = _areas(whole) * (overlay.size[0] * overlay.size[1] / other[0].numel())
        kept = _areas(masks) >= torch.clamp(expected * self.min_visible, min=1)
        if not kept.any():
            return image, target
        masks, labels = masks[kept], source["labels"][taken][kept]
        covered = masks.amax(dim=0)
        resized = F.resize(other, list(overlay.size), antialias=True)
        resized = resized.index_select(1, overlay.seen[0]).index_select(2, overlay.seen[1])
        pasted = image.clone()
        pasted[overlay.place] = torch.where(covered[overlay.place].bool(), resized, image[overlay.place])
        return pasted, self._joined(target, masks, labels, covered)

    def _joined(self, target: Target, masks: Tensor, labels: Tensor, covered: Tensor) -> Target:
        """The target with masks [G, H, W] and their labels above those that it has; `covered` [H, W] is their union."""
        before = _areas(target["masks"])
        remaining = target["masks"] * (1 - covered)
        after = _areas(remaining)
        changed = after < before
        stays = ~changed | (after >= torch.clamp(before * self.min_visible, min=1))
        tight = stays & changed
        boxes, area = target["boxes"].clone(), target["area"].clone()
        boxes[tight] = _boxes(remaining[tight])
        area[tight] = after[tight].to(area.dtype)
        own = {name: target[name] for name in PER_OBJECT if name in target}
        own |= {"boxes": boxes, "area": area, "masks": remaining}
        pasted = {
            "boxes": _boxes(masks),
            "labels": labels,
            "masks": masks,
            "area": _areas(masks).to(area.dtype),
            "iscrowd": torch.zeros(len(labels), dtype=torch.uint8),
        }
        return target | {name: torch.cat((value[stays], pasted[name])) for name, value in own.items()}


class _Overlay(NamedTuple):
    """How an image lies over another: resized to `size`, of which rows and columns `seen` lie at index `place`."""

    size: tuple[int, int]
    seen: tuple[Tensor, Tensor]
    place: tuple[Any, ...]


def _overlay(below: tuple[int, int], above: tuple[int, int], factor: float) -> _Overlay:
    """An image of size `above` over one of size `below`: as large as fits times `factor`, anywhere, maybe mirrored."""
    scale = min(below[0] / above[0], below[1] / above[1]) * factor
    size = (max(1, int(above[0] * scale)), max(1, int(above[1] * scale)))
    seen, place = [], []
    for old, new in zip(below, size, strict=True):
        # Of the first pixel, which lies before the image below if that is the smaller one.
        first = int(torch.randint(min(old - new, 0), max(old - new, 0) + 1, ()))
        seen.append(torch.arange(max(-first, 0), min(new, old - first)))
        place.append(slice(max(first, 0), min(old, first + new)))
    if torch.rand(()) < 0.5:
        seen[1] = size[1] - 1 - seen[1]
    return _Overlay(size, (seen[0], seen[1]), (..., *place))


def _areas(masks: Tensor) -> Tensor:
    """Pixels of each of the masks [G, H, W]."""
    return masks.flatten(1).sum(dim=1)


def _boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks that are not empty, float32 [G, 4]; the last pixel of each side belongs to them."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
