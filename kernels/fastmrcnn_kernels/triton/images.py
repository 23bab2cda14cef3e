"""Images, bytes in memory, to the batch that a network sees: resized, normalised, on a canvas of zeros.

The arithmetic is that of `reference/images.py`, bit by bit.

Far more is written than read, and each value takes few operations, so what counts is that stores are wide and that
nothing is done twice.  A row of the canvas is a row of values, C of each pixel, and lanes own values of it, whichever
channel they are of: neighbours are written together, 128 bits at a time.  A program goes down a few rows and keeps the
two rows of the image that it is between, each interpolated along x once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels import views as layout
from fastmrcnn_kernels.triton.elementary import fma
from fastmrcnn_kernels.triton.launch import cdiv, on_device_of
from fastmrcnn_kernels.triton.roi_geometry import select

ROWS, LANES = 8, 1024  # of a program
GROUP = 8  # columns; canvases have whole groups while they are written, so that rows begin where wide stores can

FIELDS = tl.constexpr(layout.COLUMNS)
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@triton.jit
def _load_axis(axis_ptr):
    """What a view says of an axis, int32: lengths of the image and of it resized, start and length of the window.

    The first two are 1 at least; an image that has no pixels, before or after, has no window.
    """
    length = tl.load(axis_ptr).to(tl.int32)
    resized = tl.load(axis_ptr + 2).to(tl.int32)
    start = tl.load(axis_ptr + 4).to(tl.int32)
    window = tl.load(axis_ptr + 6).to(tl.int32)
    window = tl.where((length > 0) & (resized > 0), window, 0)
    return tl.maximum(length, 1), tl.maximum(resized, 1), start, window


@triton.jit
def _places(pixel, length, resized, start):
    """Where each `pixel` of the window of an axis lies in the image, float32, 0 to the last pixel."""
    ratio = tl.div_rn(length.to(tl.float32), resized.to(tl.float32))
    place = fma((start + pixel).to(tl.float32) + 0.5, ratio, ratio * 0.0 - 0.5)
    return tl.minimum(tl.maximum(place, 0.0), (length - 1).to(tl.float32))


@triton.jit
def _load_row(row_ptr, offset, share, width, C: tl.constexpr):
    """A row of an image of `width`, `share` of the way from bytes `offset` to the same of the next pixel: float32.

    The only pixel of a row is its own neighbour.
    """
    first = tl.load(row_ptr + offset).to(tl.float32)
    second = tl.load(row_ptr + tl.minimum(width - 1, 1) * C + offset).to(tl.float32)
    return fma(share, second - first, first)


@triton.jit(do_not_specialize=["height", "groups"])
def _resize_images_kernel(
    out_ptr,
    pixels_ptr,
    offsets_ptr,
    views_ptr,
    scale,
    shift,
    height,
    groups,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[i, y, x, c] = scale[c] v + shift[c], where v is channel c of image i, interpolated; 0 beyond its window.

    A program owns ROWS rows of a canvas of `height` x GROUP `groups` pixels, and in each LANES of the values x C + c.
    """
    tiles = tl.cdiv(height, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * ROWS
    end = tl.minimum(begin + ROWS, height)
    image_height, resized_height, top, window_height = _load_axis(views_ptr + image * FIELDS)
    image_width, resized_width, left, window_width = _load_axis(views_ptr + image * FIELDS + 1)
    image_ptr = pixels_ptr + tl.load(offsets_ptr + image)
    pitch = groups * (GROUP * C)

    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    c = lane % C
    place_x = _places(lane // C, image_width, resized_width, left)
    # The second tap is the pixel after the first also at the end of a row, where its share then is 1.  That gives the
    # last byte exactly, since differences of bytes are exact.
    column = tl.minimum(place_x.to(tl.int32), tl.maximum(image_width - 2, 0))
    share_x = place_x - column.to(tl.float32)
    offset = column * C + c
    # Lanes beyond the window read the image, too, and are multiplied by 0: loads need no masks.
    inside = lane // C < window_width
    scales = tl.where(inside, select(scale, c), 0.0)
    shifts = tl.where(inside, select(shift, c), 0.0)

    held = begin * 0 - 2  # the row of the image that `above` is; `below` is the next
    above = tl.zeros([LANES], tl.float32)
    below = above
    seen = tl.where(tl.program_id(1) * LANES < window_width * C, tl.minimum(end, window_height), 0)
    seen = tl.maximum(seen, begin)
    for y in range(begin, seen):
        place_y = _places(y, image_height, resized_height, top)
        row = place_y.to(tl.int32)
        if row != held:
            row_ptr = image_ptr + row.to(tl.int64) * image_width * C
            if row == held + 1:
                above = below
            else:
                above = _load_row(row_ptr, offset, share_x, image_width, C)
            row_ptr += tl.where(row + 1 < image_height, image_width * C, 0)
            below = _load_row(row_ptr, offset, share_x, image_width, C)
            held = row
        value = fma(fma(place_y - row.to(tl.float32), below - above, above), scales, shifts)
        target_ptr = out_ptr + (image * height + y) * pitch
        tl.store(target_ptr + lane, value.to(out_ptr.dtype.element_ty), mask=lane < pitch)
    for y in range(seen, end):
        target_ptr = out_ptr + (image * height + y) * pitch
        tl.store(target_ptr + lane, tl.zeros([LANES], out_ptr.dtype.element_ty), mask=lane < pitch)


def resize_images(
    pixels: Tensor,
    offsets: Tensor,
    views: Tensor,
    height: int,
    width: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Images resized, times `scale`, plus `shift` of each channel: [N, C, height, width] in `dtype`, channels_last.

    Where `width` is no multiple of `GROUP` they are copied once more.
    """
    images, channels, groups = len(views), len(scale), cdiv(width, GROUP)
    batch = torch.empty(images, height, groups * GROUP, channels, dtype=dtype, device=pixels.device)
    if images:
        with on_device_of(pixels):
            _resize_images_kernel[(images * cdiv(height, ROWS), cdiv(groups * GROUP * channels, LANES))](
                batch,
                pixels.contiguous(),
                offsets.contiguous(),
                views.contiguous(),
                tuple(map(float, scale)),
                tuple(map(float, shift)),
                height,
                groups,
                channels,
                GROUP,
                ROWS,
                LANES,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return batch[:, :, :width].contiguous().permute(0, 3, 1, 2)
