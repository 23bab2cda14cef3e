"""Images resized as torchvision's detectors do it, one by one: fast on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def resize_images(
    pixels: Tensor,
    offsets: Tensor,
    views: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See `fastmrcnn.ops.resize_images`; synchronises.

    The operations of `GeneralizedRCNNTransform`, in its order and its memory format, so that images seen as a whole are
    to the bit what it makes of `bytes / 255`.  Of others, all of the resized image is computed, and cut afterwards:
    PyTorch's `interpolate` cannot begin in the middle of an image.
    """
    channels = len(mean)
    exact = torch.promote_types(dtype, torch.float32)
    means, deviations = (
        torch.tensor(values, dtype=exact, device=pixels.device)[:, None, None] for values in (mean, std)
    )
    batch = torch.zeros(len(views), *size, channels, dtype=dtype, device=pixels.device).permute(0, 3, 1, 2)
    for canvas, offset, view in zip(batch, offsets.tolist(), views.tolist(), strict=True):
        height, width, resized_height, resized_width, top, left, window_height, window_width = view
        image = pixels[offset : offset + height * width * channels].view(height, width, channels).permute(2, 0, 1)
        image = image.to(exact, memory_format=torch.contiguous_format).div_(255).sub_(means).div_(deviations)
        resized = functional.interpolate(
            image[None], size=(resized_height, resized_width), mode="bilinear", align_corners=False
        )[0]
        window = resized[:, top : top + window_height, left : left + window_width]
        for target, channel in zip(canvas, window, strict=True):  # one by one, in half the time
            target[:window_height, :window_width] = channel
    return batch
