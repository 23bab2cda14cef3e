"""Pictures of detections and annotations: masks, contours, boxes, labels and keypoints over the image."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from fastmrcnn.data.masks import check_segmentation, rasterise

__all__ = ["comparison", "draw", "grid", "side_by_side"]

_FILL = 0.42  # opacity of a mask: the object stays visible under it
_LEGIBLE = 512  # a picture smaller than this is enlarged, so that labels fit
_CROWD = 25  # from this many instances on, lines get thin and labels give way to each other


def draw(
    image: Tensor,
    result: Mapping[str, Any],
    *,
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    upscale: int | None = None,
    max_side: int | None = None,
    skeleton: Sequence[tuple[int, int]] | None = None,
) -> Image.Image:
    """Draw a prediction or a target over its image.

    torchvision's ``draw_segmentation_masks`` blackens where masks overlap and its box labels leave the picture, hence
    this. Nothing is changed in place; the same input always gives the same picture.

    Args:
        image: [3, H, W] or [1, H, W], float in 0..1 or uint8.
        result: boxes [D, 4] (x1, y1, x2, y2 in pixels) and labels int [D] from 1; optionally scores [D], masks
            [D, 1, H, W] or [D, H, W] (soft, bool or uint8), or D COCO segmentations (RLE or polygons), and keypoints
            [D, K, 3] (x, y, visible).
        class_names: the name of label ``l`` is ``class_names[l - 1]``; by default the number is shown.
        score_threshold: instances scored below are left out; a target has no scores and is drawn whole.
        mask_threshold: a pixel belongs to a mask where the soft mask is above this.
        upscale: whole factor to enlarge by; by default a longer side under 512 pixels is brought to at least that.
        max_side: longest side of the picture in pixels; larger ones are shrunk.
        skeleton: pairs of keypoints (from 0) to join by a line.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the image or the masks do not have one of the shapes above, or a segmentation is malformed.
    """
    picture = _to_pil(image)
    height, width = image.shape[-2:]
    boxes, labels = result["boxes"].detach().float().cpu(), result["labels"].tolist()
    scores = result["scores"].tolist() if "scores" in result else None
    shown = [i for i in range(len(labels)) if scores is None or scores[i] >= score_threshold]
    masks = _mask_planes(result.get("masks"), shown, len(labels), height, width)

    scale = float(upscale or max(1, math.ceil(_LEGIBLE / max(height, width))))
    if max_side is not None:
        scale = min(scale, max_side / max(height, width))
    if scale != 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    crowded = len(shown) >= _CROWD
    line = max(1, round(max(picture.size) / (900 if crowded else 400)))
    colours = _palette(len(shown))

    # Large instances first, so that small ones on top of them stay visible.
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = sorted(range(len(shown)), key=lambda k: -float(area[shown[k]]))
    if masks is not None and shown:
        picture = _paint_masks(picture, [(masks[k], colours[k]) for k in order], mask_threshold, line)
    canvas = ImageDraw.Draw(picture)
    scaled = (boxes * scale).tolist()
    for k in order:
        _outline(canvas, scaled[shown[k]], colours[k], line if masks is None else max(1, line // 2))
    if "keypoints" in result:
        points = result["keypoints"].detach().float().cpu()
        for k in order:
            _skeleton(canvas, points[shown[k]], scale, colours[k], skeleton or (), line)
    texts = [_label(labels[i], class_names, None if scores is None else scores[i]) for i in shown]
    ranked = sorted(range(len(shown)), key=lambda k: -scores[shown[k]]) if scores is not None else order
    _write_labels(canvas, picture.size, [(scaled[shown[k]], texts[k], colours[k]) for k in ranked], crowded)
    return picture


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str] | None = None) -> Image.Image:
    """Two pictures in one row, with a title above each if given."""
    return grid([[left, right]], titles)


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] | None = None) -> Image.Image:
    """Pictures in rows on white, each column as wide and each row as high as its largest picture.

    Args:
        rows: the pictures; rows may differ in length.
        titles: one per column, written on top.
    """
    if not any(rows):
        raise ValueError("rows must hold at least one picture")
    columns = max(len(row) for row in rows)
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(columns)]
    heights = [max((cell.height for cell in row), default=0) for row in rows]
    gap = max(4, max(widths) // 80)
    font = ImageFont.load_default(max(12, max(widths) // 28))
    top = gap + (math.ceil(font.getbbox("Ag")[3]) + gap if titles else 0)
    sheet = Image.new("RGB", (sum(widths) + gap * (columns + 1), top + sum(heights) + gap * len(rows)), "white")
    canvas = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles or ()):
        canvas.text((gap + sum(widths[:c]) + gap * c, gap // 2), title, fill=(30, 30, 30), font=font)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            sheet.paste(cell, (gap + sum(widths[:c]) + gap * c, top + sum(heights[:r]) + gap * r))
    return sheet


def comparison(
    images: Sequence[Tensor],
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Image.Image:
    """One row per image: the prediction beside the ground truth.

    Args:
        images: as for :func:`draw`, one per row.
        predictions: the model's output for each image.
        targets: the annotations of each image.
        class_names: the name of each label.
        options: further arguments of :func:`draw`.
    """
    rows = [
        [draw(image, result, class_names=class_names, **options) for result in (prediction, target)]
        for image, prediction, target in zip(images, predictions, targets, strict=True)
    ]
    return grid(rows, ("prediction", "ground truth"))


def _to_pil(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be [3, H, W] or [1, H, W], got {list(image.shape)}")
    pixels = image.detach().cpu()
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _mask_planes(masks: Any, shown: Sequence[int], count: int, height: int, width: int) -> list[Tensor] | None:
    """The masks that are shown, each [H, W], or None if there are none to draw."""
    if masks is None:
        return None
    if not isinstance(masks, Tensor):
        if len(masks) != count:
            raise ValueError(f"masks must be {count} RLEs or lists of polygons, got {len(masks)}")
        # Of a mask that is empty there are no polygons.
        wanted = [masks[i] or {"size": [height, width], "counts": [height * width]} for i in shown]
        for i, segmentation in zip(shown, wanted, strict=True):
            if problem := check_segmentation(segmentation, height, width):
                raise ValueError(f"masks[{i}] {problem}")
        return [torch.from_numpy(plane) for plane in rasterise(wanted, height, width)]
    planes = masks.detach()
    planes = planes[:, 0] if planes.ndim == 4 else planes
    if planes.shape != (count, height, width):
        raise ValueError(f"masks must be [{count}, 1, {height}, {width}], got {list(masks.shape)}")
    return [planes[i] for i in shown]


def _palette(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ most between neighbours: hues a golden ratio apart, in three tones."""
    tones = [(0.85, 1.0), (0.65, 0.9), (1.0, 0.8)]
    colours = []
    for i in range(count):
        saturation, value = tones[i % len(tones)]
        red, green, blue = colorsys.hsv_to_rgb((0.58 + i * 0.618034) % 1, saturation, value)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours


def _paint_masks(
    picture: Image.Image, masks: list[tuple[Tensor, tuple[int, int, int]]], threshold: float, line: int
) -> Image.Image:
    """Fill each mask and trace its edge, later ones on top."""
    height, width = picture.height, picture.width
    # One map of who is on top gives fill and contours at once, whatever the number of masks.
    owner = torch.zeros(height, width, dtype=torch.int32)
    for number, (mask, _) in enumerate(masks, start=1):
        _stamp(owner, mask, number, threshold)
    inside = owner > 0
    edge = inside & _near_change(owner, line)
    colours = torch.tensor([(0, 0, 0)] + [colour for _, colour in masks], dtype=torch.float32)[owner[inside]]
    opacity = torch.where(edge[inside], 0.95, _FILL)[:, None]
    pixels = torch.from_numpy(np.array(picture))
    pixels[inside] = (pixels[inside] * (1 - opacity) + colours * opacity).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def _stamp(owner: Tensor, mask: Tensor, number: int, threshold: float) -> None:
    """Write ``number`` into [H, W] where a mask, of this or a smaller size, is set; looks at the object only."""
    mask, factor = mask.float(), owner.shape[0] // mask.shape[0]
    if owner.shape != (factor * mask.shape[0], factor * mask.shape[1]):
        size = [owner.shape[0], owner.shape[1]]
        mask, factor = functional.interpolate(mask[None, None], size, mode="bilinear")[0, 0], 1
    # On the CPU with numpy: hundreds of small torch ops wait for the thread pool each, seconds on a busy machine.
    inside = (mask > threshold).cpu().numpy() if mask.is_cuda else mask.numpy() > threshold
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return
    # One pixel more on each side, for the interpolation.
    top, bottom = max(int(rows[0]) - 1, 0), int(rows[-1]) + 2
    left, right = max(int(columns[0]) - 1, 0), int(columns[-1]) + 2
    patch = inside[top:bottom, left:right]
    if factor > 1:
        # Enlarged while still soft: a smooth contour instead of steps.
        soft = mask[top:bottom, left:right].cpu()[None, None]
        patch = functional.interpolate(soft, scale_factor=factor, mode="bilinear")[0, 0].numpy() > threshold
    owner.numpy()[top * factor : bottom * factor, left * factor : right * factor][patch] = number


def _near_change(owner: Tensor, reach: int) -> Tensor:
    """Where [H, W] another value is ``reach`` pixels up, down, left or right; a max pool of that size takes seconds."""
    change = torch.zeros_like(owner, dtype=torch.bool)
    for axis, length in enumerate(owner.shape):
        if length > reach:
            differs = owner.narrow(axis, 0, length - reach) != owner.narrow(axis, reach, length - reach)
            change.narrow(axis, 0, length - reach).logical_or_(differs)
            change.narrow(axis, reach, length - reach).logical_or_(differs)
    return change


def _outline(canvas: ImageDraw.ImageDraw, box: list[float], colour: tuple[int, int, int], line: int) -> None:
    x1, y1, x2, y2 = box
    if x2 >= x1 and y2 >= y1:
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _skeleton(
    canvas: ImageDraw.ImageDraw,
    points: Tensor,
    scale: float,
    colour: tuple[int, int, int],
    pairs: Sequence[tuple[int, int]],
    line: int,
) -> None:
    """Visible keypoints as dots, and the lines between those of a pair."""
    places = [(x * scale, y * scale) if visible > 0 else None for x, y, visible in points.tolist()]
    for a, b in pairs:
        start, end = places[a], places[b]
        if start and end:
            canvas.line((*start, *end), fill=colour, width=line)
    radius = line * 1.5
    for place in filter(None, places):
        x, y = place
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline=colour, width=line)


def _label(label: int, class_names: Sequence[str] | None, score: float | None) -> str:
    known = class_names is not None and 1 <= label <= len(class_names)
    name = class_names[label - 1] if known and class_names is not None else str(label)
    return name if score is None else f"{name} {score:.2f}"


def _write_labels(
    canvas: ImageDraw.ImageDraw,
    size: tuple[int, int],
    labels: list[tuple[list[float], str, tuple[int, int, int]]],
    crowded: bool,
) -> None:
    """Each label on a plate in its instance's colour, above, in or below its box.

    In a crowd a label is left out where it would cover another or be larger than what it names.
    """
    width, height = size
    font = ImageFont.load_default(max(9 if crowded else 11, max(size) / (70 if crowded else 45)))
    placed: list[tuple[float, float, float, float]] = []
    for (x1, y1, x2, y2), text, colour in labels:
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        margin = max(1, round((bottom - top) / 6))
        w, h = right - left + 2 * margin, bottom - top + 2 * margin
        x = min(max(x1, 0), max(width - w, 0))
        spots = [(x, min(max(y, 0), max(height - h, 0))) for y in (y1 - h, y1, y2)]
        free = [
            spot for spot in spots if not any(_overlap((*spot, spot[0] + w, spot[1] + h), other) for other in placed)
        ]
        if crowded and (not free or w * h > (x2 - x1) * (y2 - y1)):
            continue
        # Whole pixels: Pillow cuts the top off text that starts at a negative fraction, as near the upper border.
        x, y = map(round, (free or spots)[0])
        plate = (x, y, x + w, y + h)
        placed.append(plate)
        canvas.rectangle(plate, fill=colour)
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        canvas.text((x + margin - left, y + margin - top), text, fill="black" if light else "white", font=font)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
