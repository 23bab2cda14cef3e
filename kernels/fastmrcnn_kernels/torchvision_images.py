"""Images resized as torchvision's detectors do it, one by one: fast on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def show(canvas: Tensor, image: Tensor, view: Sequence[int], mean: Tensor, std: Tensor) -> None:
    """Write to `canvas` [C, Hp, Wp] what its `view` [8] shows of an image, uint8 [C, H, W].

    The operations of `GeneralizedRCNNTransform`, in its order and its memory format, so that the result is to the bit
    what it makes of `image / 255` in the dtype of `mean` and `std`, [C, 1, 1].  All of the image is resized, and cut
    afterwards: PyTorch's `interpolate` cannot begin in the middle.
    """
    _, _, *size, top, left, height, width = view
    values = image.to(mean.dtype, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
    resized = functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]
    window = resized[:, top : top + height, left : left + width]
    for target, plane in zip(canvas, window, strict=True):  # one by one, in half the time
        target[:height, :width] = plane


def resize_images(
    pixels: Tensor,
    offsets: Tensor,
    views: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See `fastmrcnn.ops.resize_images`; synchronises."""
    exact, device, channels = torch.promote_types(dtype, torch.float32), pixels.device, len(mean)
    means, deviations = (torch.tensor(x, dtype=exact, device=device)[:, None, None] for x in (mean, std))
    batch = torch.zeros(len(views), *size, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)
    for canvas, offset, view in zip(batch, offsets.tolist(), views.tolist(), strict=True):
        height, width = view[:2]
        image = pixels[offset : offset + height * width * channels].view(height, width, channels).permute(2, 0, 1)
        show(canvas, image, view, means, deviations)
    return batch
