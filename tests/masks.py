"""Masks for tests of packed ones, and what pycocotools and bool masks say of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch import Tensor

from fastmrcnn import ops

EDGES = [1, 2, 31, 32, 33, 64, 65, 100]


@st.composite
def masks(draw: st.DrawFn, count: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Bool [count, H, W]: rectangles with a few pixels flipped, some of them empty and some full."""
    count = draw(st.integers(0, 10)) if count is None else count
    height, width = size or (draw(st.sampled_from([1, 2, 17, 40])), draw(st.sampled_from(EDGES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def ranges(length: int) -> Tensor:
        ends = torch.randint(length + 1, (2, count, 1), generator=generator)
        place = torch.arange(length)
        return (ends.amin(dim=0) <= place) & (place < ends.amax(dim=0))

    flipped = torch.rand(count, height, width, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.5]))
    found = ranges(height)[:, :, None] & ranges(width)[:, None] ^ flipped
    for i in draw(st.lists(st.integers(0, max(count - 1, 0)), max_size=3)) if count else []:
        found[i] = draw(st.booleans())
    return found


def many(count: int, height: int, width: int) -> Tensor:
    """Bits of masks whose pixels are set at random."""
    generator = torch.Generator().manual_seed(count)
    return ops.pack_bits(
        torch.rand(count, height, width, generator=generator) < torch.rand(count, 1, 1, generator=generator)
    )


def by_coco(a: Tensor, b: Tensor, crowd: Tensor | None) -> Tensor:
    """pycocotools' numbers, whose lists must not be empty."""
    x, y = (coco.encode(np.asfortranarray(m.permute(1, 2, 0).numpy().view(np.uint8))) for m in (a, b))
    found = coco.iou(x, y, [0] * len(b) if crowd is None else crowd.int().tolist())
    return torch.from_numpy(found).float()


def eroded(mask: Tensor, distance: int) -> Tensor:
    """By 3 x 3 pixels, `distance` times, as cv2.erode does within a frame of zeros."""
    outside = 1 - mask[:, None].float()
    for _ in range(distance):
        outside = F.max_pool2d(F.pad(outside, (1, 1, 1, 1), value=1.0), 3, stride=1)
    return outside[:, 0] == 0
