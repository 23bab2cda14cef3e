"""Drawing shapes and their visible parts.

Every image is a function of its random generator alone. Only integers, uniform draws, and + - * / sqrt, which IEEE 754
rounds the same everywhere, go into a pixel: no sin, exp or BLAS, whose last bits differ between machines.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]

# An object is kept only where this much of it can be seen: pixels, and the part of its whole area.
MIN_VISIBLE_PIXELS = 20
MIN_VISIBLE_PART = 0.25


@dataclass(frozen=True)
class Shape:
    """A shape around (x, y) in pixels, its u axis along the unit vector (cos, sin).

    `label` is 1 (circle of radius a), 2 (rectangle of half sides a and b) or 3 (isosceles triangle of half base a and
    height 3b, its centroid at (x, y)).
    """

    label: int
    x: float
    y: float
    a: float
    b: float
    cos: float
    sin: float

    @property
    def area(self) -> float:
        """In square pixels, whole: neither cut by the border nor covered."""
        return {1: math.pi * self.a * self.a, 2: 4 * self.a * self.b, 3: 3 * self.a * self.b}[self.label]

    def local(self, xs: FloatArray, ys: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Pixel positions in the shape's own axes."""
        dx, dy = xs - self.x, ys - self.y
        return dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin

    def contains(self, xs: FloatArray, ys: FloatArray) -> NDArray[np.bool_]:
        """Whether the points (x, y) lie inside."""
        u, v = self.local(xs, ys)
        if self.label == 1:
            return u * u + v * v <= self.a * self.a
        if self.label == 2:
            return (np.abs(u) <= self.a) & (np.abs(v) <= self.b)
        # From the apex at v = -2b the half width grows to a at the base, v = b.
        return (v <= self.b) & (np.abs(u) * (3 * self.b) <= self.a * (v + 2 * self.b))


def _grid(size: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """x [1,W] and y [H,1] of the pixel centres."""
    return np.arange(size[1], dtype=np.float64)[None] + 0.5, np.arange(size[0], dtype=np.float64)[:, None] + 0.5


def _uniform(rng: np.random.Generator, low: float, high: float, size: tuple[int, ...] | None = None) -> Any:
    """Like `rng.uniform`, whose C code may fuse the multiplication and the addition, where the machine can."""
    return low + (high - low) * rng.random(size)


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    """A uniform unit vector: a point of the disc, normalised."""
    while True:
        x, y = _uniform(rng, -1, 1), _uniform(rng, -1, 1)
        squared = x * x + y * y
        if 0.01 < squared <= 1:
            root = math.sqrt(squared)
            return x / root, y / root


def place(
    rng: np.random.Generator, size: tuple[int, int], min_objects: int, max_objects: int
) -> tuple[list[Shape], NDArray[np.int64]]:
    """Draw shapes, later above earlier, and the map [H,W] of the topmost one's number from 1, 0 for none.

    A shape that would hide too much of an earlier one is drawn again: what can be seen is always annotated.
    """
    xs, ys = _grid(size)
    count = int(rng.integers(min_objects, max_objects + 1))
    shapes: list[Shape] = []
    owner = np.zeros(size, np.int64)
    attempts = 0
    while len(shapes) < count and (attempts < 8 * count or not shapes):
        attempts += 1
        shape = _draw_shape(rng, size)
        covered = np.where(shape.contains(xs, ys), len(shapes) + 1, owner)
        visible = np.bincount(covered.ravel(), minlength=len(shapes) + 2)[1:]
        whole = np.array([earlier.area for earlier in [*shapes, shape]])
        if (visible >= np.maximum(MIN_VISIBLE_PIXELS, MIN_VISIBLE_PART * whole)).all():
            shapes.append(shape)
            owner = covered
    return shapes, owner


def _draw_shape(rng: np.random.Generator, size: tuple[int, int]) -> Shape:
    a = min(size) * _uniform(rng, 0.13, 0.28)
    label = int(rng.integers(1, 4))
    b = a * (_uniform(rng, 0.4, 0.75) if label == 2 else _uniform(rng, 0.45, 0.75))
    margin = 0.3 * a
    x = _uniform(rng, margin, size[1] - margin)
    y = _uniform(rng, margin, size[0] - margin)
    return Shape(label, x, y, a, b, *_direction(rng))


def paint(rng: np.random.Generator, shapes: list[Shape], owner: NDArray[np.int64], tinted: bool) -> NDArray[np.uint8]:
    """RGB uint8 [H,W,3]: background, then every shape's visible pixels, then noise; `tinted`: see `Shapes`."""
    size = (owner.shape[0], owner.shape[1])
    xs, ys = _grid(size)
    canvas = _background(rng, size)
    for number, shape in enumerate(shapes, start=1):
        color = _tint(rng, shape.label) if tinted else _contrasting(rng, canvas[int(shape.y), int(shape.x)])
        u, _ = shape.local(xs, ys)
        shade = 1 + _uniform(rng, 0.1, 0.3) * u / (2 * shape.a)
        if rng.random() < 0.5:  # stripes along v
            period = _uniform(rng, 4, 9)
            shade = shade * np.where(np.floor(u / period) % 2 == 0, 1.0, _uniform(rng, 0.7, 0.9))
        visible = owner == number
        canvas[visible] = (shade[..., None] * color)[visible]
    noise = rng.integers(-12, 13, canvas.shape) + rng.integers(-12, 13, canvas.shape)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def _contrasting(rng: np.random.Generator, under: FloatArray) -> FloatArray:
    """An RGB colour that can be told from the one under it."""
    while True:
        color = _uniform(rng, 30, 240, (3,))
        if np.abs(color - under).max() >= 60:
            return color


def _tint(rng: np.random.Generator, label: int) -> FloatArray:
    """An RGB colour that is mostly red, green or blue, as the label is 1, 2 or 3."""
    color = _uniform(rng, 20, 110, (3,))
    color[label - 1] = _uniform(rng, 170, 240)
    return color


def _muted(rng: np.random.Generator) -> FloatArray:
    """An RGB colour that is half gray."""
    r, g, b = _uniform(rng, 30, 225, (3,)).tolist()
    gray = (r + g + b) / 3
    return np.array([gray + 0.45 * (channel - gray) for channel in (r, g, b)])


def _background(rng: np.random.Generator, size: tuple[int, int]) -> FloatArray:
    """A gradient with blotches and a few thin lines, which are no objects: float64 [H,W,3]."""
    xs, ys = _grid(size)
    cos, sin = _direction(rng)
    along = 0.5 + ((xs / size[1] - 0.5) * cos + (ys / size[0] - 0.5) * sin) / 2
    first, second = _muted(rng), _muted(rng)
    canvas = first + along[..., None] * (second - first)

    blotches = _uniform(rng, -25, 25, (7, 7, 3))
    row, column = np.broadcast_arrays(ys / size[0] * 5.999, xs / size[1] * 5.999)
    r, c = row.astype(np.int64), column.astype(np.int64)
    fr, fc = (row - r)[..., None], (column - c)[..., None]
    top = blotches[r, c] * (1 - fc) + blotches[r, c + 1] * fc
    bottom = blotches[r + 1, c] * (1 - fc) + blotches[r + 1, c + 1] * fc
    canvas = canvas + top * (1 - fr) + bottom * fr

    for _ in range(int(rng.integers(1, 5))):
        cos, sin = _direction(rng)
        x, y = _uniform(rng, 0, size[1]), _uniform(rng, 0, size[0])
        width = _uniform(rng, 0.6, 1.6)
        canvas[np.abs((xs - x) * cos + (ys - y) * sin) <= width] = _uniform(rng, 0, 255, (3,))
    return canvas
