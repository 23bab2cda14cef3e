"""Images as users have them to tensors, read ahead by threads, and batched by size."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmrcnn.data.images import load_image, to_array

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
"""A file, a Pillow image, an array [H, W, 3] or [H, W], or a tensor [3, H, W] or [1, H, W]; colours are RGB."""

WINDOW = 4
"""Batches among whose images a batch is chosen."""

WASTE = 0.2
"""Share of a batch that may be padding, if it could also be smaller."""

_ACCEPTED = "a path, a PIL image, a NumPy array [H, W, 3] or [H, W], or a tensor [3, H, W]"


def each(inputs: ImageInput | Iterable[ImageInput]) -> tuple[Iterable[ImageInput], bool]:
    """The images of some inputs, and whether it is one that was given alone; a 4-d array or tensor is a batch of them.

    Raises:
        TypeError: they are neither an image nor any number of them.
    """
    if isinstance(inputs, np.ndarray | Tensor):
        return (inputs, False) if inputs.ndim == 4 else ([inputs], True)
    if isinstance(inputs, str | os.PathLike | Image.Image):
        return [inputs], True
    if not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected {_ACCEPTED}, or any number of these, got {type(inputs).__name__}")
    return inputs, False


def is_file(source: Any) -> bool:
    """Whether an input is the path of a file."""
    return isinstance(source, str | os.PathLike)


def as_tensor(image: Any, name: str, channels: int = 3) -> Tensor:
    """An image in memory as float32 [3, H, W] in 0 .. 1, RGB; a floating-point tensor is returned as it is.

    Args:
        image: a Pillow image, taken as it is stored, whatever its EXIF orientation; an array [H, W, 3], [H, W, 4] (the
            fourth channel is dropped), [H, W, 1] or [H, W], or a tensor [3, H, W] or [1, H, W]: uint8, uint16, or
            floating point in 0 .. 1.
        name: what messages call it.
        channels: that the model takes; where they are not 3, these stand for the 3 above.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(image, Image.Image):
        return torch.from_numpy(to_array(image, name, channels))
    if isinstance(image, Tensor):
        if image.dim() != 3 or 0 in image.shape or image.shape[0] not in (1, channels):
            raise ValueError(f"{name}: expected a tensor [{channels}, H, W] or [1, H, W], got {list(image.shape)}")
        pixels = _scaled(image.detach(), name)
        return pixels if len(pixels) == channels else pixels.repeat(channels, 1, 1)
    if isinstance(image, np.ndarray):
        planes = image[..., None] if image.ndim == 2 else image
        accepted = (1, channels, 4) if channels == 3 else (1, channels)
        if planes.ndim != 3 or 0 in planes.shape or planes.shape[2] not in accepted:
            raise ValueError(f"{name}: expected an array [H, W, {channels}] or [H, W], got {list(image.shape)}")
        if planes.dtype.kind not in "uf":
            raise TypeError(f"{name}: expected uint8, uint16 or floating point in 0 .. 1, got {planes.dtype}")
        # A copy: whoever hands out one buffer again and again, as video readers do, may write to it meanwhile.
        planes = np.array(planes[..., :channels].transpose(2, 0, 1), planes.dtype.newbyteorder("="), order="C")
        pixels = _scaled(torch.from_numpy(planes), name).float()
        return pixels if len(pixels) == channels else pixels.repeat(channels, 1, 1)
    raise TypeError(f"{name}: expected {_ACCEPTED}, got {type(image).__name__}")


def _scaled(pixels: Tensor, name: str) -> Tensor:
    if pixels.dtype in (torch.uint8, torch.uint16):
        return pixels.float() / (255 if pixels.dtype == torch.uint8 else 65535)
    if not pixels.is_floating_point():
        raise TypeError(f"{name}: expected uint8, uint16 or floating point in 0 .. 1, got {pixels.dtype}")
    if pixels.device.type == "cpu":  # elsewhere a look would wait for the device
        low, high = (float(x) for x in pixels.aminmax())
        # Not to the last bit, since filters overshoot; but bytes, normalised images and NaN are told apart.
        if not (low > -1 and high < 2):
            raise ValueError(f"{name}: expected floating-point values in 0 .. 1, got {low:g} to {high:g}")
    return pixels


@dataclass
class Item:
    """One of the inputs: its place among them, itself, and what became of it."""

    number: int
    source: Any
    image: Tensor | None = None
    staged: Tensor | None = None  # the same in memory that a GPU reads by itself
    error: Exception | None = None
    loading: Future[Any] | None = field(default=None, repr=False)

    def load(self, stage: bool, channels: int) -> None:
        """Read the image, if it is a file."""
        try:
            if self.image is None:
                self.image = load_image(self.source, channels=channels)
            self.staged = self.image.pin_memory() if stage and self.image.device.type == "cpu" else self.image
        except Exception as error:  # any: it is raised where results are taken, once all before it have been
            self.error = error


def batches(
    inputs: Iterable[ImageInput],
    batch_size: int,
    *,
    workers: int,
    stage: bool = False,
    channels: int = 3,
    size: Callable[[Tensor], tuple[int, int]] = lambda image: (image.shape[-2], image.shape[-1]),
    stop: Callable[[Any, Exception], bool] = lambda source, error: True,
) -> Generator[list[Item], None, None]:
    """Batches of images of alike size, each with the first input that none has had; an error is a batch of its own.

    Args:
        inputs: asked for few images more than a batch is chosen from.
        batch_size: images of a full batch.
        workers: threads that read files; 0 reads them here, and nothing ahead.
        stage: put images into pinned memory, too.
        channels: of images.
        size: what an image is compared by, (height, width).
        stop: whether to end with an input that has an error.
    """
    window = WINDOW * batch_size if batch_size > 1 else 1
    ahead = window + max(batch_size, 2 * workers) if workers else window
    incoming = _items(inputs, channels)
    waiting: deque[Item] = deque()
    pool = ThreadPoolExecutor(workers, "fastmrcnn-read") if workers else None
    try:
        while True:
            while len(waiting) < ahead and (item := next(incoming, None)) is not None:
                if item.error is None and (item.image is None or stage):
                    if pool is None:
                        item.load(stage, channels)
                    else:
                        item.loading = pool.submit(item.load, stage, channels)
                elif item.error is None:
                    item.staged = item.image
                waiting.append(item)
            if not waiting:
                return
            chosen = _choose(list(waiting)[:window], batch_size, size, stop)
            numbers = {item.number for item in chosen}
            waiting = deque(item for item in waiting if item.number not in numbers)
            yield chosen
            if chosen[0].error is not None and stop(chosen[0].source, chosen[0].error):
                return
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _choose(
    items: list[Item],
    batch_size: int,
    size: Callable[[Tensor], tuple[int, int]],
    stop: Callable[[Any, Exception], bool],
) -> list[Item]:
    """The next batch: the first item and those most like it, once all are read."""
    loaded: list[Item] = []
    sizes: list[tuple[int, int]] = []
    for item in items:
        if item.loading is not None:
            item.loading.result()
        if item.error is None and item.image is not None:
            loaded.append(item)
            sizes.append(size(item.image))
        elif item is items[0]:
            return [item]
        elif item.error is not None and stop(item.source, item.error):  # what comes after it is in vain
            break
    return [loaded[i] for i in alike(sizes, batch_size)]


def _items(inputs: Iterable[ImageInput], channels: int) -> Iterator[Item]:
    """The inputs with what is in memory converted; where they themselves fail, the error is the last of them."""
    number = -1
    try:
        for number, source in enumerate(inputs):
            if is_file(source):
                yield Item(number, source)
                continue
            try:
                yield Item(number, source, as_tensor(source, f"inputs[{number}]", channels))
            except (TypeError, ValueError) as error:
                yield Item(number, source, error=error)
    except Exception as error:  # any, of whoever makes the inputs: likewise
        yield Item(number + 1, None, error=error)


def alike(sizes: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Which images, up to `count` and with the first, make a batch that has little padding: their places, in order."""
    chosen, rest = [0], list(range(1, len(sizes)))
    while rest and len(chosen) < count:
        shares = [padding([sizes[k] for k in (*chosen, i)]) for i in rest]
        best = min(range(len(rest)), key=shares.__getitem__)  # of equals the earliest
        if shares[best] > WASTE:
            break
        chosen.append(rest.pop(best))
    return sorted(chosen)


def padding(sizes: Sequence[tuple[int, int]]) -> float:
    """The share of padding in a batch of images of these sizes."""
    heights, widths = zip(*sizes, strict=True)
    canvas = max(heights) * max(widths)
    return 1 - sum(height * width for height, width in sizes) / (canvas * len(sizes))
