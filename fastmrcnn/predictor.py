"""A detector for any number of images: read ahead, batched by size, one batch in flight, masks as they are wanted."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmrcnn.data.types import DataError
from fastmrcnn.inference import Inference, MaskFormat, Result, channels, default_device, device_of, resized
from fastmrcnn.inputs import ImageInput, Item, batches, each, is_file

__all__ = ["Prediction", "Predictor"]


class Prediction(NamedTuple):
    """What :meth:`Predictor.stream` gives for one of its inputs.

    Attributes:
        source: the input, as it was given.
        image: what it holds, [3, H, W] in 0..1; None if it could not be read.
        result: what was found, None if it could not be read.
        error: why it could not be read.
    """

    source: Any
    image: Tensor | None
    result: Result | None
    error: Exception | None = None


class Predictor:
    """Finds objects in images, one or any number.

    An image is a file, a Pillow image, a NumPy array [H, W, 3] or [H, W], or a tensor [3, H, W]; arrays and tensors are
    RGB, uint8, uint16, or floating point in 0..1. Files are turned as their EXIF orientation says, Pillow images are
    taken as they are.

    A result is a dict of the detections, best first, on the CPU: ``boxes`` float32 [D, 4] (x1, y1, x2, y2 in pixels of
    the image), ``labels`` int64 [D], ``scores`` float32 [D], of a keypoint detector ``keypoints`` float32 [D, K, 3] and
    ``keypoints_scores`` [D, K], of one that learns them ``mask_scores`` float32 [D], and of one with masks ``masks`` in
    the format asked for:

    - ``"soft"``: float32 [D, 1, H, W] in 0..1, as torchvision has them. Most of the time goes into moving them.
    - ``"bool"``: bool [D, 1, H, W].
    - ``"bits"``: the same as one bit per pixel, int32 [D, H, ceil(W / 32)], see :func:`fastmrcnn.ops.unpack_bits`.
    - ``"rle"``: a list of D dicts, COCO's ``size`` and ``counts`` (text). They are made on the GPU, which sends nothing
      else: the fastest.
    - ``"polygons"``: a list of D lists of polygons, each a list of x0, y0, x1, y1, ... in whole pixels, that fill to
      exactly the mask, see :func:`fastmrcnn.polygons.rle_to_polygons`.
    - None: no masks.

    Args:
        model: a detector, or the path of a checkpoint that :func:`fastmrcnn.load` takes. Detectors other than ours are
            called in eval mode with a list of float32 [3, H, W] in 0..1 and return torchvision's list of dicts. The
            model's mode is as before after every batch.
        device: where to run; the model is moved there. None is where the model is, and for a checkpoint the GPU if
            there is one.
        masks: the format of masks.
        batch_size: images per call of the model. Those of one batch are chosen by size among the next few, so that
            little of it is padding.
        mask_threshold: a pixel belongs to a mask where the soft mask is above this, 0 to below 1.
        score_threshold: detections scored below are left out.
        max_detections: detections per image; by default the model's own limit.
        workers: threads that read files ahead; 0 reads each when it is needed.
        on_error: "raise" stops at a file that cannot be read, once all before it have been yielded; "skip" has None
            for its result and goes on, and a warning at the end tells the number of such files.
        class_names: label ``l`` is ``class_names[l - 1]``; by default those of the checkpoint.
        category_ids: likewise, the category id of each label.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError, TypeError: an option, or the file that is to be a checkpoint, is none.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        masks: MaskFormat | None = "soft",
        batch_size: int = 1,
        mask_threshold: float = 0.5,
        score_threshold: float = 0.0,
        max_detections: int | None = None,
        workers: int = 2,
        on_error: Literal["raise", "skip"] = "raise",
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        if masks is not None and masks not in get_args(MaskFormat):
            raise ValueError(f"masks must be one of {', '.join(get_args(MaskFormat))}, or None, got {masks!r}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if max_detections is not None and max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        if not 0 <= mask_threshold < 1:
            raise ValueError(f"mask_threshold must be from 0 to below 1, got {mask_threshold}")
        if isinstance(model, str | os.PathLike):
            # Read here only: whoever predicts with a model of their own needs none of the weight formats.
            from fastmrcnn.checkpoints import load_model

            device = default_device() if device is None else torch.device(device)
            model, info = load_model(model, device)
            class_names = info.class_names if class_names is None else class_names
            category_ids = info.category_ids if category_ids is None else category_ids
        elif not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or the path of a checkpoint, got {type(model).__name__}")
        elif (known := getattr(model, "info", None)) is not None:
            class_names = known.class_names if class_names is None else class_names
            category_ids = known.category_ids if category_ids is None else category_ids
        self.model = model if device is None else model.to(device)
        self.batch_size = batch_size
        self.workers = workers
        self.on_error = on_error
        self.class_names = None if class_names is None else list(class_names)
        self.category_ids = None if category_ids is None else list(category_ids)
        self._inference = Inference(self.model, masks, mask_threshold, score_threshold, max_detections)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], **options: Any) -> Predictor:
        """A predictor of a checkpoint of this library; ``options`` are those of the class."""
        return cls(path, **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    def __call__(self, inputs: ImageInput | Iterable[ImageInput], *, progress: bool | str = False) -> Any:
        """Find objects in one image, or in each of several: all results in memory, unlike :meth:`stream`.

        Args:
            inputs: an image, or any iterable of images; an array [N, H, W, 3] or a tensor [N, 3, H, W] is N images.
            progress: as for :meth:`stream`.

        Returns:
            The result of one image, or the list of those of several, None for what was skipped.

        Raises:
            DataError: a file is no image; the message names it.
            FileNotFoundError: there is no such file.
            TypeError, ValueError: an input is no image; the message has its position.
        """
        images, alone = each(inputs)
        results = [prediction.result for prediction in self.stream(images, progress=progress)]
        return results[0] if alone else results

    def stream(
        self, inputs: Iterable[ImageInput], *, progress: bool | str = False, total: int | None = None
    ) -> Generator[Prediction, None, None]:
        """Find objects in any number of images, of which only a few batches are in memory at a time.

        Inputs are taken from an iterator before the results of earlier ones are yielded: files as far ahead as needed
        to read them in time, all others to choose batches among them, and on a GPU one batch more, which it works on
        while the results of the one before are made. So an array or Pillow image may be changed once it was handed
        over, but a float tensor may not.

        Args:
            inputs: images.
            progress: show a progress bar with images per second; a text is its title.
            total: number of inputs, where they have no length.

        Yields:
            One prediction for each input, also for one that was skipped, in their order.

        Raises:
            DataError, FileNotFoundError, TypeError, ValueError: as for a call, once all before the input at fault
                have been yielded.
        """
        images, _ = each(inputs)
        if total is None and isinstance(images, Sized):
            total = len(images)
        device = self.device
        queue = batches(
            images,
            self.batch_size,
            workers=self.workers,
            stage=device.type == "cuda",
            channels=channels(self.model),
            size=lambda image: resized(self.model, image),
            stop=self._stops_at,
        )
        title = progress if isinstance(progress, str) else "predict"
        in_flight: deque[tuple[list[Item], Callable[[], list[Result]]]] = deque()
        done: dict[int, Prediction] = {}
        unreadable: list[str] = []
        following = 0
        with contextlib.closing(queue), tqdm(total=total, desc=title, unit="image", disable=not progress) as bar:
            more = True
            while more or in_flight:
                items = next(queue, [])
                more = bool(items)
                if more and items[0].error is None:
                    in_flight.append((items, self._begin(items, device)))
                for item in items:
                    if item.error is not None:
                        done[item.number] = Prediction(item.source, None, None, item.error)
                # On a GPU one is left to work on; a CPU has worked already.
                while len(in_flight) > (1 if more and device.type == "cuda" else 0):
                    items, finish = in_flight.popleft()
                    for item, result in zip(items, finish(), strict=True):
                        done[item.number] = Prediction(item.source, item.image, result)
                while (prediction := done.pop(following, None)) is not None:
                    if prediction.error is not None:
                        if self._stops_at(prediction.source, prediction.error):
                            raise prediction.error
                        unreadable.append(str(prediction.error))
                    following += 1
                    bar.update()
                    yield prediction
        if unreadable:
            warnings.warn(f"{len(unreadable)} images could not be read, such as: {unreadable[0]}", stacklevel=2)

    def _begin(self, items: list[Item], device: torch.device) -> Callable[[], list[Result]]:
        """Launch a batch."""
        images = [item.staged.to(device, non_blocking=True) for item in items if item.staged is not None]
        for item in items:
            item.staged = None
        return self._inference.begin(images)

    def _stops_at(self, source: Any, error: Exception) -> bool:
        """Only files are skipped: what else is wrong is wrong in the program."""
        return not (self.on_error == "skip" and is_file(source) and isinstance(error, DataError | OSError))
