"""Box coding: deltas from boxes, boxes from deltas, and proposals from the anchors that were selected.

Float32 in the order of operations of `reference/boxes.py`, divisions correctly rounded.  Launched without fused
multiply-add (`LAUNCH_OPTIONS`), all but exp and log is bit-equal to the reference on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmrcnn_kernels.triton.elementary import exp, log
from fastmrcnn_kernels.triton.launch import cdiv, on_device_of, runtime_ints
from fastmrcnn_kernels.triton.roi_geometry import LAUNCH_OPTIONS, select, select_int

MAX_LOG_SCALE = tl.constexpr(math.log(1000.0 / 16))
BLOCK_BOXES = 256
BLOCK_SLOTS = 128


@triton.jit
def centre_and_size(low, high):
    """Centre and size of boxes along one axis."""
    size = high - low
    return low + 0.5 * size, size


@triton.jit
def decode_axis(offset, growth, low, high):
    """First and last coordinate, along one axis, of boxes decoded from anchors that span `low` .. `high`."""
    centre, size = centre_and_size(low, high)
    growth = tl.minimum(growth, MAX_LOG_SCALE, propagate_nan=tl.PropagateNan.ALL)
    new_centre = offset * size + centre
    half_size = 0.5 * (exp(growth) * size)
    return new_centre - half_size, new_centre + half_size


@triton.jit
def decode(dx, dy, dw, dh, x1, y1, x2, y2):
    """Corners of the boxes reached from anchors (x1, y1, x2, y2) by deltas that are divided by their weights."""
    new_x1, new_x2 = decode_axis(dx, dw, x1, x2)
    new_y1, new_y2 = decode_axis(dy, dh, y1, y2)
    return new_x1, new_y1, new_x2, new_y2


@triton.jit
def within(x, limit):
    """`x` limited to [0, `limit`].  NaN stays NaN."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip(x1, y1, x2, y2, width, height):
    """Boxes limited to an image of `width` x `height` pixels.  NaN stays NaN."""
    return within(x1, width), within(y1, height), within(x2, width), within(y2, height)


@triton.jit
def load_rows(ptr, row, usable):
    """The four columns of rows `row` (int64) of [..., 4], float32; 0 where not `usable`, where nothing is read."""
    rows = tl.load(ptr + (row * 4)[:, None] + tl.arange(0, 4)[None, :], mask=usable[:, None], other=0.0)
    left, right = tl.split(tl.reshape(rows.to(tl.float32), [row.shape[0], 2, 2]))
    a, c = tl.split(left)
    b, d = tl.split(right)
    return a, b, c, d


@triton.jit
def store_rows(ptr, row, a, b, c, d, usable):
    """Write a, b, c, d to rows `row` (int64) of float32 [..., 4], where `usable`: 128 bits at once."""
    rows = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [row.shape[0], 4])
    tl.store(ptr + (row * 4)[:, None] + tl.arange(0, 4)[None, :], rows, mask=usable[:, None])


@triton.jit(do_not_specialize=["num_boxes", "boxes_per_anchor"])
def _decode_boxes_kernel(
    boxes_ptr,
    deltas_ptr,
    anchors_ptr,
    weights,
    num_boxes,
    boxes_per_anchor,
    BLOCK: tl.constexpr,
):
    """boxes[i] = decode(deltas[i] / weights, anchors[i // boxes_per_anchor]).  A program owns BLOCK boxes."""
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    usable = box < num_boxes
    dx, dy, dw, dh = load_rows(deltas_ptr, box, usable)
    x1, y1, x2, y2 = load_rows(anchors_ptr, box // boxes_per_anchor, usable)
    dx, dy = tl.div_rn(dx, weights[0]), tl.div_rn(dy, weights[1])
    dw, dh = tl.div_rn(dw, weights[2]), tl.div_rn(dh, weights[3])
    x1, y1, x2, y2 = decode(dx, dy, dw, dh, x1, y1, x2, y2)
    store_rows(boxes_ptr, box, x1, y1, x2, y2, usable)


@triton.jit
def _encode_axis(low, high, anchor_low, anchor_high, offset_weight, growth_weight):
    """Offset and growth along one axis, times their weights."""
    centre, size = centre_and_size(low, high)
    anchor_centre, anchor_size = centre_and_size(anchor_low, anchor_high)
    offset = tl.div_rn(offset_weight * (centre - anchor_centre), anchor_size)
    return offset, growth_weight * log(tl.div_rn(size, anchor_size))


@triton.jit(do_not_specialize=["num_boxes", "num_anchors"])
def _encode_boxes_kernel(
    deltas_ptr,
    boxes_ptr,
    anchors_ptr,
    weights,
    num_boxes,
    num_anchors,
    BLOCK: tl.constexpr,
):
    """deltas[i] = what moves anchors[i % num_anchors] onto boxes[i], times `weights`.  A program owns BLOCK boxes."""
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    usable = box < num_boxes
    x1, y1, x2, y2 = load_rows(boxes_ptr, box, usable)
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = load_rows(anchors_ptr, box % num_anchors, usable)
    dx, dw = _encode_axis(x1, x2, anchor_x1, anchor_x2, weights[0], weights[2])
    dy, dh = _encode_axis(y1, y2, anchor_y1, anchor_y2, weights[1], weights[3])
    store_rows(deltas_ptr, box, dx, dy, dw, dh, usable)


@triton.jit(do_not_specialize=["num_slots"])
def _decode_proposals_kernel(
    boxes_ptr,
    valid_ptr,
    deltas,
    indices_ptr,
    scores_ptr,
    base_anchors,
    sizes_ptr,
    strides_ptr,
    weights,
    heights,
    widths,
    num_anchors,
    image_steps,
    channel_steps,
    row_steps,
    column_steps,
    cell_heights,
    cell_widths,
    num_slots,
    min_size,
    min_score,
    BLOCK: tl.constexpr,
):
    """boxes[n, l, k] = clip(decode(deltas at the anchor indices[n, l, k], that anchor)), and whether it is usable.

    A program owns BLOCK of the K slots of one level of one image.  It computes its anchors from their numbers
    (y W + x) A + a and reads their four deltas where the head wrote them: `*_steps` are the strides of the maps, in
    elements; `cell_*` those of the anchors, in pixels, unless each image has its own, strides[n, l] (height, width).
    Numbers outside 0 .. H W A - 1 are padding.
    """
    blocks = tl.cdiv(num_slots, BLOCK)
    segment = tl.program_id(0) // blocks
    level = segment % len(deltas)
    image = (segment // len(deltas)).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = segment.to(tl.int64) * num_slots + slot
    stored = slot < num_slots

    anchors = select_int(num_anchors, level)
    width = select_int(widths, level)
    index = tl.load(indices_ptr + row, mask=stored, other=-1)
    usable = (index >= 0) & (index < select_int(heights, level).to(tl.int64) * width * anchors)
    index = tl.where(usable, index, 0)
    a = index % anchors
    x = index // anchors % width
    y = index // anchors // width

    step = select_int(channel_steps, level).to(tl.int64)
    delta = select(deltas, level) + image * select_int(image_steps, level)
    delta += y * select_int(row_steps, level) + x * select_int(column_steps, level) + a * 4 * step
    dx = tl.load(delta, mask=usable, other=0.0).to(tl.float32)
    dy = tl.load(delta + step, mask=usable, other=0.0).to(tl.float32)
    dw = tl.load(delta + 2 * step, mask=usable, other=0.0).to(tl.float32)
    dh = tl.load(delta + 3 * step, mask=usable, other=0.0).to(tl.float32)
    dx, dy = tl.div_rn(dx, weights[0]), tl.div_rn(dy, weights[1])
    dw, dh = tl.div_rn(dw, weights[2]), tl.div_rn(dh, weights[3])

    x1, y1, x2, y2 = load_rows(select(base_anchors, level), a, usable)
    if strides_ptr is None:
        cell_height, cell_width = select_int(cell_heights, level), select_int(cell_widths, level)
    else:
        cell_height = tl.load(strides_ptr + segment * 2).to(tl.int32)
        cell_width = tl.load(strides_ptr + segment * 2 + 1).to(tl.int32)
    shift_x, shift_y = (x * cell_width).to(tl.float32), (y * cell_height).to(tl.float32)
    x1, y1, x2, y2 = decode(dx, dy, dw, dh, shift_x + x1, shift_y + y1, shift_x + x2, shift_y + y2)
    image_height = tl.load(sizes_ptr + image * 2).to(tl.float32)
    image_width = tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
    x1, y1, x2, y2 = clip(x1, y1, x2, y2, image_width, image_height)

    valid = usable & (x2 - x1 >= min_size) & (y2 - y1 >= min_size)
    if scores_ptr is not None:
        score = tl.load(scores_ptr + row, mask=usable, other=float("nan"))
        valid = valid & (score >= min_score)
    # Padding was decoded from zeros; but where a map is empty, its x and y are the results of a division by zero.
    x1, y1 = tl.where(usable, x1, 0.0), tl.where(usable, y1, 0.0)
    x2, y2 = tl.where(usable, x2, 0.0), tl.where(usable, y2, 0.0)
    store_rows(boxes_ptr, row, x1, y1, x2, y2, stored)
    tl.store(valid_ptr + row, valid, mask=stored)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes, float32, of `deltas` [..., 4] from `anchors` [..., 4], or from one [..., 4] for all C of [..., C, 4]."""
    boxes = torch.empty(deltas.shape, dtype=torch.float32, device=deltas.device)
    num_boxes = boxes.numel() // 4
    if num_boxes:
        with on_device_of(boxes):
            _decode_boxes_kernel[(cdiv(num_boxes, BLOCK_BOXES),)](
                boxes,
                deltas.contiguous(),
                anchors.float().contiguous(),
                tuple(map(float, weights)),
                num_boxes,
                1 if anchors.dim() == deltas.dim() else deltas.shape[-2],
                BLOCK_BOXES,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return boxes


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas, float32, that move `anchors` onto `boxes` [..., 4], to whose shape anchors are broadcast."""
    deltas = torch.empty(boxes.shape, dtype=torch.float32, device=boxes.device)
    num_boxes = deltas.numel() // 4
    if num_boxes:
        while anchors.dim() > 1 and len(anchors) == 1:  # the kernel repeats them without a copy
            anchors = anchors[0]
        anchors = anchors.expand(boxes.shape[-anchors.dim() :])
        with on_device_of(deltas):
            _encode_boxes_kernel[(cdiv(num_boxes, BLOCK_BOXES),)](
                deltas,
                boxes.float().contiguous(),
                anchors.float().contiguous(),
                tuple(map(float, weights)),
                num_boxes,
                anchors.numel() // 4,
                BLOCK_BOXES,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return deltas


def decode_proposals(
    deltas: Sequence[Tensor],
    indices: Tensor,
    scores: Tensor | None,
    base_anchors: Sequence[Tensor],
    cell_heights: Sequence[int],
    cell_widths: Sequence[int],
    strides: Tensor | None,
    sizes: Tensor,
    min_size: float,
    min_score: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Clipped boxes, float32 [N, L, K, 4], of the anchors `indices`, int64 [N, L, K], and which are usable, bool.

    `deltas` [N, 4 A, Hl, Wl] per level are read in place, whatever their strides.  Usable is a box of an anchor that
    exists, no side shorter than `min_size`, no score below `min_score`; where there is no such anchor the box is 0.
    `strides`, int64 [N, L, 2], take the place of `cell_heights` and `cell_widths`.
    """
    boxes = torch.empty(*indices.shape, 4, dtype=torch.float32, device=indices.device)
    valid = torch.empty(indices.shape, dtype=torch.bool, device=indices.device)
    num_images, num_levels, num_slots = indices.shape
    programs = num_images * num_levels * cdiv(num_slots, BLOCK_SLOTS)
    if programs:
        with on_device_of(boxes):
            _decode_proposals_kernel[(programs,)](
                boxes,
                valid,
                tuple(deltas),
                indices.contiguous(),
                None if scores is None else scores.float().contiguous(),
                tuple(base.float().contiguous() for base in base_anchors),
                sizes.contiguous(),
                None if strides is None else strides.contiguous(),
                tuple(map(float, weights)),
                runtime_ints(level.shape[2] for level in deltas),
                runtime_ints(level.shape[3] for level in deltas),
                runtime_ints(len(base) for base in base_anchors),
                *map(runtime_ints, zip(*(level.stride() for level in deltas), strict=True)),
                runtime_ints(cell_heights),
                runtime_ints(cell_widths),
                num_slots,
                float(min_size),
                float(min_score),
                BLOCK_SLOTS,
                num_warps=2,
                **LAUNCH_OPTIONS,
            )
    return boxes, valid
