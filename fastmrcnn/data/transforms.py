"""Augmentations of an image and its target, where torchvision.transforms.v2 cannot do them alone.

Each is called with `(image, target)` and returns them; `torchvision.transforms.v2.Compose` applies one after the other.
Randomness comes from torch's global generator, which seeds and DataLoader workers govern.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat

from fastmrcnn.data.types import Target


def left_right_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of the keypoints called `left_<x>` and `right_<x>`, as in COCO's person."""
    index = {name: i for i, name in enumerate(names)}
    pairs = []
    for name, left in index.items():
        right = index.get("right_" + name.removeprefix("left_")) if name.startswith("left_") else None
        if right is not None:
            pairs.append((left, right))
    return pairs


class HorizontalFlip:
    """Mirror image, boxes, masks and keypoints together with probability `p`.

    transforms.v2 flips images, boxes and masks, and does so here; it knows neither visibility nor that a mirrored left
    hand is a right hand. x becomes W - x for keypoints as for boxes (torchvision's detection reference); keypoints with
    visibility 0 become (0, 0, 0). The given target is not modified.

    Args:
        p: probability of a flip, 0..1.
        keypoint_pairs: index pairs that swap sides, see `left_right_pairs`. Required for targets with keypoints; `()`
            says that none do.

    Raises:
        ValueError: `p` is not in 0..1; on a call: the target has keypoints and `keypoint_pairs` was not given.
    """

    def __init__(self, p: float = 0.5, keypoint_pairs: Sequence[tuple[int, int]] | None = None) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in 0..1, got {p!r}")
        self.p = p
        self.keypoint_pairs = (
            None if keypoint_pairs is None else [(int(left), int(right)) for left, right in keypoint_pairs]
        )

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Image [...,H,W] and target of one item, mirrored or as they are."""
        if "keypoints" in target and self.keypoint_pairs is None:
            raise ValueError(
                "keypoint_pairs is needed to mirror keypoints: pass left_right_pairs(dataset.keypoint_names), "
                "or () if no keypoint has a side"
            )
        if torch.rand(()) >= self.p:
            return image, target
        height, width = image.shape[-2:]
        flipped = dict(target)
        flipped["boxes"] = F.horizontal_flip_bounding_boxes(target["boxes"], BoundingBoxFormat.XYXY, (height, width))
        if "masks" in target:
            flipped["masks"] = F.horizontal_flip_mask(target["masks"])
        if "keypoints" in target:
            flipped["keypoints"] = self._flip_keypoints(target["keypoints"], width)
        return F.horizontal_flip_image(image), flipped

    def _flip_keypoints(self, keypoints: Tensor, width: int) -> Tensor:
        order = list(range(keypoints.shape[1]))
        for left, right in self.keypoint_pairs or ():
            order[left], order[right] = right, left
        keypoints = keypoints[:, order].clone()
        keypoints[..., 0] = width - keypoints[..., 0]
        keypoints[keypoints[..., 2] == 0] = 0
        return keypoints


class PhotometricDistort:
    """Brightness, contrast, saturation, hue and the order of channels, each changed with probability `p`.

    torchvision's `RandomPhotometricDistort` with its ranges, those of SSD (Liu et al., 2016). Images of other than 3
    channels, which have neither saturation nor hue, are left as they are; so is every target.

    Args:
        p: probability of each change, 0..1.

    Raises:
        ValueError: `p` is not in 0..1.
    """

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in 0..1, got {p!r}")
        self.distort = v2.RandomPhotometricDistort(p=p)

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Image [C,H,W], uint8 or float in 0..1, with other colours, and the target itself."""
        return (self.distort(image) if image.shape[-3] == 3 else image), target
