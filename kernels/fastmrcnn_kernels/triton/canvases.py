"""Maps of a batch of which each image fills a part, its canvas: what lies beyond is overwritten, in place.

Where images fill their maps nothing is written, and programs end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.launch import on_device_of, runtime_ints
from fastmrcnn_kernels.triton.roi_geometry import int_of

LANES = 1024


@triton.jit(do_not_specialize=["height", "width", "stride"])
def _clear_beyond_kernel(
    maps_ptr,
    canvases_ptr,
    height,
    width,
    stride,
    steps,
    value,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    LANES: tl.constexpr,
):
    """maps[n, c, y, x] = value where y or x is beyond the canvas of image n.  A program owns a row y of an image.

    Lanes own values x C + c, so that those of maps laid out channels_last (PACKED) are written side by side.
    """
    image = (tl.program_id(0) // height).to(tl.int64)
    y = (tl.program_id(0) % height).to(tl.int64)
    rows = tl.cdiv(tl.load(canvases_ptr + image * 2), stride)
    columns = tl.cdiv(tl.load(canvases_ptr + image * 2 + 1), stride).to(tl.int32)
    begin = tl.where(y < rows, tl.minimum(columns, width), 0)
    for first in range(0, (width - begin) * C, LANES):
        lane = first + tl.arange(0, LANES)
        x, channel = begin.to(tl.int64) + lane // C, lane % C
        if PACKED:  # the compiler sees that neighbours are neighbours, and where they begin
            place = ((image * height + y) * width + x) * C + channel
        else:
            place = image * int_of(steps[0]) + y * int_of(steps[2])
            place += x * int_of(steps[3]) + channel * int_of(steps[1])
        tl.store(maps_ptr + place, tl.full([LANES], value, tl.float32), mask=lane < (width - begin) * C)


def clear_beyond_(maps: Tensor, canvases: Tensor, stride: int, value: float) -> None:
    """Set what lies beyond `canvases`, int64 [N, 2] in pixels, in maps [N, C, H, W] of any strides to `value`."""
    images, channels, height, width = maps.shape
    if maps.numel():
        with on_device_of(maps):
            _clear_beyond_kernel[(images * height,)](
                maps,
                canvases.contiguous(),
                height,
                width,
                stride,
                runtime_ints(maps.stride()),
                float(value),
                channels,
                maps.is_contiguous(memory_format=torch.channels_last),
                LANES,
                num_warps=4,
            )
