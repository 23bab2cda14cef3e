"""Masks pasted into images: soft, as bool, or as bits of words.

Most of a canvas is zero, and is cleared at the speed of memory.  The kernel then writes what lies in boxes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.pasting import WORD, layout
from fastmrcnn_kernels.triton.launch import cdiv, on_device_of
from fastmrcnn_kernels.triton.mask_geometry import LAUNCH_OPTIONS, exceeds, load_mask, sample, window

ROWS, COLUMNS = 16, 64  # pixels of a tile
PROGRAMS = 4096  # at least so many, where there are as many tiles: a mask may fill all of its image


@triton.jit(do_not_specialize=["slots", "height", "width"])
def _paste_kernel(
    out_ptr,
    masks_ptr,
    boxes_ptr,
    sizes_ptr,
    counts_ptr,
    slots,
    height,
    width,
    expansion,
    threshold,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    DETECTRON2: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORD: tl.constexpr,
):
    """out[b, y, x] = interpolated mask b, or whether it exceeds the threshold, as bool or as a bit of word x / 32.

    The programs of a mask take its tiles of ROWS x COLUMNS pixels in turn, those alone that its box touches; columns
    begin at whole words.
    """
    mask = tl.program_id(0).to(tl.int64)
    x1, y1, x2, y2, image_height, image_width = load_mask(boxes_ptr, sizes_ptr, counts_ptr, mask, slots, height, width)
    top, bottom = window(y1, y2, image_height, expansion, M, DETECTRON2)
    left, right = window(x1, x2, image_width, expansion, M, DETECTRON2)
    seen = (bottom > top) & (right > left)
    left = left // WORD * WORD
    across = tl.cdiv(right - left, COLUMNS)
    tiles = tl.where(seen, across * tl.cdiv(bottom - top, ROWS), 0)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        y = top + tile // across * ROWS + tl.arange(0, ROWS)
        x = left + tile % across * COLUMNS + tl.arange(0, COLUMNS)
        value = sample(masks_ptr + mask * (M * M), y, x, x1, y1, x2, y2, expansion, M, PADDING, DETECTRON2)
        value = tl.where((y < image_height)[:, None] & (x < image_width)[None, :], value, 0.0)
        row = (mask * height + y)[:, None]
        if OUT == "bits":
            inside = tl.where(exceeds(value, threshold, DETECTRON2), 1, 0).reshape(ROWS, COLUMNS // WORD, WORD)
            words = tl.sum(inside << tl.arange(0, WORD)[None, None, :], axis=2)
            word = left // WORD + tile % across * (COLUMNS // WORD) + tl.arange(0, COLUMNS // WORD)
            pitch = tl.cdiv(width, WORD)
            tl.store(out_ptr + row * pitch + word[None, :], words, mask=(y < bottom)[:, None] & (word < pitch)[None, :])
        else:
            if OUT == "bool":
                value = exceeds(value, threshold, DETECTRON2)
            stored = (y < bottom)[:, None] & (x < right)[None, :]
            tl.store(out_ptr + row * width + x[None, :], value, mask=stored)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    sizes: Tensor | None,
    counts: Tensor | None,
    detectron2: bool,
    padding: int,
    threshold: float,
    out: str,
) -> Tensor:
    """Masks, float32 [N, D, M, M], in boxes, float32 [N, D, 4], on a canvas; as the reference returns them."""
    images, slots, mask_size = masks.shape[:3]
    shape, dtype = layout((height, width), out, torch.float32)
    result = torch.zeros(images, slots, *shape, dtype=dtype, device=masks.device)
    number = images * slots
    if not number:
        return result
    tiles = cdiv(height, ROWS) * (cdiv(width, COLUMNS) + 1)
    with on_device_of(masks):
        _paste_kernel[(number, min(tiles, cdiv(PROGRAMS, number)))](
            result,
            masks.contiguous(),
            boxes.contiguous(),
            None if sizes is None else sizes.contiguous(),
            None if counts is None else counts.contiguous(),
            slots,
            height,
            width,
            (mask_size + 2 * padding) / mask_size,
            threshold,
            mask_size,
            padding,
            detectron2,
            out,
            ROWS,
            COLUMNS,
            WORD,
            num_warps=4,
            **LAUNCH_OPTIONS,
        )
    return result
