"""Which images make which batch: the same for any number of processes, and of loaders, and from any step on."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastmrcnn.data.types import DetectionDataset


class Key(NamedTuple):
    """An image of an epoch: `item` of the data set, at `position` in the order of the epoch over all processes."""

    epoch: int
    position: int
    item: int


def mixed_seed(*numbers: int) -> int:
    """A seed of 64 bits that depends on each of some numbers, none negative, the same on every machine."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0])


def repeat_factors(dataset: DetectionDataset, threshold: float) -> Tensor:
    """How often each image is to be drawn per epoch on average, so that rare classes are seen: float64 [images], >= 1.

    Repeat-factor sampling (Gupta et al., 2019, for LVIS): a class that the share f of the images have is worth
    max(1, sqrt(threshold / f)), an image what the rarest class in it is worth. Crowds do not count, since items leave
    them out.

    Raises:
        ValueError: `threshold` is not in 0..1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share of the images, in 0..1, got {threshold!r}")
    images_of: defaultdict[int, set[int]] = defaultdict(set)
    for annotation in dataset.coco["annotations"]:
        if not annotation["iscrowd"]:
            images_of[annotation["category_id"]].add(annotation["image_id"])
    factors = dict.fromkeys(dataset.image_ids, 1.0)
    for images in images_of.values():
        worth = math.sqrt(threshold * len(dataset) / len(images))
        for image_id in images:
            factors[image_id] = max(factors[image_id], worth)
    return torch.tensor([factors[image_id] for image_id in dataset.image_ids], dtype=torch.float64)


def aspect_ratio_groups(dataset: DetectionDataset, k: int) -> Tensor:
    """The group of each image by width / height, int64 [images]: between 2 k + 1 bounds from 1/2 to 2, and beyond.

    The bounds are those of torchvision's references, evenly apart on a logarithmic scale; 0 makes one group.
    """
    if k < 1:
        return torch.zeros(len(dataset), dtype=torch.int64)
    sizes = np.array([dataset.image_size(i) for i in range(len(dataset))], np.float64)
    bounds = 2 ** np.linspace(-1, 1, 2 * k + 1)
    return torch.from_numpy(np.searchsorted(bounds, sizes[:, 1] / sizes[:, 0], side="right"))


class TrainingBatches(Sampler[list[Key]]):
    """A DataLoader's `batch_sampler`: for each step the keys of the images that this process loads.

    An epoch is an order of all images, drawn from (seed, epoch) alone, cut into global batches, of which each process
    takes an equal slice; so the union over processes depends on `batch_size * world_size` only. With `aspect_groups`
    the images of a global batch are of one group; those that are left, too few to fill batches of their group, make
    mixed ones. Every epoch has as many batches, and those images that are too many for full batches are drawn anew in
    each: none is left out twice by rule. A dataset smaller than a global batch is gone through more than once.

    Args:
        dataset: its sizes and annotations are read, not its images.
        batch_size: images per process.
        seed: of all orders, not negative.
        rank: number of this process.
        world_size: number of processes.
        repeats: how often each image is drawn per epoch on average, float64 [images], see `repeat_factors`; fractions
            are rounded at random in each epoch. By default once.
        aspect_groups: the k of `aspect_ratio_groups`; 0 mixes all images.
        skip_empty: leave out images without objects.

    Raises:
        ValueError: an argument is out of range, or there are no images.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: Tensor | None = None,
        aspect_groups: int = 0,
        skip_empty: bool = False,
    ) -> None:
        if batch_size < 1 or seed < 0 or not 0 <= rank < world_size or aspect_groups < 0:
            raise ValueError(
                "batch_size >= 1, seed >= 0, 0 <= rank < world_size and aspect_groups >= 0 are needed, "
                f"got {batch_size}, {seed}, {rank}, {world_size} and {aspect_groups}"
            )
        factors = torch.ones(len(dataset), dtype=torch.float64) if repeats is None else repeats.double()
        if factors.shape != (len(dataset),) or not (factors.isfinite() & (factors >= 1)).all():
            raise ValueError(f"repeats must be {len(dataset)} numbers from 1, got {list(factors.shape)}: {factors}")
        if skip_empty:
            annotated = {a["image_id"] for a in dataset.coco["annotations"] if not a["iscrowd"]}
            factors = factors * torch.tensor([image_id in annotated for image_id in dataset.image_ids])
        draws = round(factors.sum().item())
        if draws < 1:
            raise ValueError(f"there are no images to draw among {len(dataset)}" + " with objects" * skip_empty)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = factors
        self.groups = aspect_ratio_groups(dataset, aspect_groups)
        self._batches = max(1, draws // (batch_size * world_size))
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        """Batches of an epoch, wherever `set_position` makes it begin."""
        return self._batches

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let iterators made from now on begin at a batch of an epoch; what is skipped is not loaded.

        Raises:
            ValueError: there is no such batch.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"epoch >= 0 and batch in 0..{len(self)} are needed, got {epoch} and {batch}")
        self.epoch, self.first = epoch, batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first = self.epoch, self.first
        order = self._order(epoch)
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [Key(epoch, start + i, item) for i, item in enumerate(order[start : start + self.batch_size])]

    def _order(self, epoch: int) -> list[int]:
        """Indices of all images of an epoch, global batch after global batch."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        whole = self.repeats.floor()
        once_more = torch.rand(len(whole), generator=generator, dtype=torch.float64) < self.repeats - whole
        drawn = torch.repeat_interleave(whole.long() + once_more)
        size = self.batch_size * self.world_size
        # Whom chance leaves out is decided before images are grouped, or it would be those of small groups.
        pool = drawn[torch.randperm(len(drawn), generator=generator)]
        pool = pool.repeat(-(-len(self) * size // len(pool)))[: len(self) * size]
        if not self.groups.any():
            return pool.tolist()
        return self._grouped(pool, size, generator).flatten().tolist()

    def _grouped(self, pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Batches [batches, size] of images of one group each, then of what is left, in an order drawn anew."""
        groups = self.groups[pool]
        full, left = [], []
        for group in groups.unique().tolist():
            members = pool[groups == group]
            whole = len(members) // size * size
            full.append(members[:whole])
            left.append(members[whole:])  # by group: in mixed batches, too, alike images lie side by side
        batches = torch.cat(full + left).view(-1, size)
        return batches[torch.randperm(len(batches), generator=generator)]
