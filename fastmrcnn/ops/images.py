"""Images as bytes in one buffer, and the batch that a network sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastmrcnn.ops.checks import check, pair
from fastmrcnn.ops.implementations import Impl, choose_kernel
from fastmrcnn_kernels import views as layout
from fastmrcnn_kernels.host import on_host

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def resize_images(
    pixels: Tensor,
    offsets: Tensor,
    views: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Images resized, normalised, and put onto canvases of zeros, as torchvision's `GeneralizedRCNNTransform` does it.

    Args:
        pixels: bytes of all images, uint8 [B]; each image is [H, W, C].
        offsets: the first byte of each image, int64 [N].
        views: size of each image, the size that it is resized to, and which window of that the network sees, int64
            [N, 8]; see `fastmrcnn_kernels.views`.
        size: (Hp, Wp) of the canvas; each window lies in its top left corner.  On a GPU a Wp that is no multiple of 8
            costs a copy.
        mean: of each channel, of images in 0 .. 1: C numbers.
        std: deviation of each channel, by which it is divided after its mean was subtracted: C numbers.
        dtype: of the result.  Float64, for comparisons, has no kernel.  16-bit results are computed in float32.

    Returns:
        [N, C, Hp, Wp] in `dtype`, channels_last.  Bilinear (`interpolate`, `align_corners=False`, no antialiasing)
        within windows, 0 beyond.

    Raises:
        ValueError: an argument has a wrong shape.  Where `offsets` and `views` are in CPU memory, also: an image is not
            within `pixels`, a window not within the resized image or the canvas, or a size is not positive.  Elsewhere
            nothing is read back to look: what a window shows beyond the resized image are its last pixels, what is
            beyond the canvas is not written, and an image without pixels is 0; images have to be within `pixels`.
        TypeError: an argument has a wrong dtype.
    """
    check("pixels", pixels, None, dtype=torch.uint8)
    check("views", views, None, layout.COLUMNS, dtype=torch.int64)
    check("offsets", offsets, len(views), dtype=torch.int64)
    size = pair(size, "size")
    if len(mean) != len(std) or not len(mean):
        raise ValueError(f"mean, std: expected a number of each per channel, got {len(mean)} and {len(std)}")
    if not all(std):
        raise ValueError(f"std={std!r}: expected no zeros")
    if dtype not in DTYPES or (dtype == torch.float64 and impl == "triton"):
        raise TypeError(f"dtype={dtype}: expected float32, float16 or bfloat16, or float64 without a kernel")
    if on_host(offsets) and on_host(views):
        _check_views(pixels.numel(), offsets, views, size, len(mean))
    without_kernel: Impl = "torchvision" if on_host(pixels) and on_host(views) else "reference"
    if impl == "auto" and dtype == torch.float64:
        impl = without_kernel
    run = choose_kernel("resize_images", impl, pixels, without_kernel, "pixels", (torch.uint8,))[1]
    return run(pixels, offsets, views, size, mean, std, dtype)


def _check_views(total: int, offsets: Tensor, views: Tensor, canvas: tuple[int, int], channels: int) -> None:
    """Raise unless all images are within `total` bytes, and all windows within resized images and the canvas."""
    for i, (offset, view) in enumerate(zip(offsets.tolist(), views.tolist(), strict=True)):
        lengths, resized, starts, windows = (view[field : field + 2] for field in range(0, layout.COLUMNS, 2))
        end = offset + lengths[0] * lengths[1] * channels
        if min(lengths + resized + windows) < 1:
            raise ValueError(f"views[{i}]={view}: expected sizes of 1 or more")
        if offset < 0 or end > total:
            raise ValueError(f"offsets[{i}]={offset}: image {i} has bytes up to {end}, and there are {total} of pixels")
        for start, window, length, side in zip(starts, windows, resized, canvas, strict=True):
            if not 0 <= start <= length - window or window > side:
                raise ValueError(
                    f"views[{i}]={view}: expected a window within the resized image and a canvas of {list(canvas)}"
                )


def pack_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images in one buffer, as `resize_images` reads them.

    Args:
        images: uint8 [C, H, W] each, in CPU memory; C in common.  Those that lie there as [H, W, C], as most decoders
            return them, are copied fastest.

    Returns:
        Their bytes, uint8 [B], one image after the other as [H, W, C], and where each begins, int64 [N].

    Raises:
        ValueError: an image has not three dimensions, or another number of channels than the first.
        TypeError: an image is not uint8.
    """
    for i, image in enumerate(images):
        check(f"images[{i}]", image, None, None, None, dtype=torch.uint8)
        check(f"images[{i}]", image, len(images[0]), None, None, dtype=torch.uint8)
    lengths = [image.numel() for image in images]
    pixels = torch.empty(sum(lengths), dtype=torch.uint8)
    for image, part in zip(images, pixels.split(lengths), strict=True):
        copy_pixels(image, part.view(*image.shape[1:], len(image)).permute(2, 0, 1))
    return pixels, torch.tensor([0, *accumulate(lengths)][:-1], dtype=torch.int64)


def copy_pixels(image: Tensor, target: Tensor) -> None:
    """Copy an image [C, H, W] in CPU memory to `target`, which lies there as [H, W, C]."""
    if image.permute(1, 2, 0).is_contiguous():
        target.copy_(image)
    else:
        for channel, plane in zip(target, image, strict=True):  # one by one, in a third of the time
            channel.copy_(plane)
