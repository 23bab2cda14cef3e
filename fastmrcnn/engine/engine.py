"""`fastmrcnn.compile`: from a detector to an `Engine`, which images are passed to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from fastmrcnn.accelerate import accelerate
from fastmrcnn.engine.buckets import Bucket, Size, as_batch_sizes, as_buckets, canvas_of, check_bytes, choose
from fastmrcnn.engine.device import DeviceRunner
from fastmrcnn.engine.host import HostRunner
from fastmrcnn.engine.prepare import prepare
from fastmrcnn.inference import MaskFormat, Result, device_of
from fastmrcnn.models.maskrcnn_benchmark import CornerPreprocess
from fastmrcnn.models.matterport import SquarePreprocess

ImageSizes = Size | Sequence[Size]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16, torch.float32)}
"""Of weights and maps, the default first."""


class Runner(Protocol):
    """What runs batches on a device."""

    depends_on_padding: list[str]
    """Parts of the network whose results would not be those of an image alone if it were padded further."""

    def begin(self, images: list[Tensor], bucket: Bucket) -> Callable[[], list[Result]]:
        """Launch a batch of images that `bucket` holds; what is returned waits for its results."""


class Engine:
    """A detector made by `fastmrcnn.compile`; calls are independent of each other, and of the model it was made of.

    Attributes:
        buckets: the sizes it was made for.
        batch_sizes: the numbers of images that it runs at once.
        dtype: of weights and maps.
        masks: their format.
    """

    def __init__(
        self,
        runner: Runner,
        transform: nn.Module,
        buckets: Sequence[Bucket],
        batch_sizes: Sequence[int],
        dtype: torch.dtype,
        masks: MaskFormat | None,
    ) -> None:
        self.buckets = list(buckets)
        self.batch_sizes = list(batch_sizes)
        self.dtype = dtype
        self.masks = masks
        self._runner = runner
        self._transform: Any = transform

    def __call__(self, images: Sequence[Tensor] | Tensor) -> list[Result]:
        """What is in each of `images`.

        Args:
            images: any number, uint8 [C, H, W] each, on the CPU or the engine's device; or one tensor [N, C, H, W].
                Channels are in the model's order, RGB for torchvision's weights.

        Returns:
            One dict per image on the CPU, as :class:`fastmrcnn.Predictor` has them.  Each image's detections are what
            the model finds in it alone, whatever else is in the batch, and whatever it is padded to.

        Raises:
            TypeError, ValueError: an image is not such a tensor, or exceeds all sizes that the engine was made for.
                None of them has been run then.
        """
        return self.begin(images)()

    def begin(self, images: Sequence[Tensor] | Tensor) -> Callable[[], list[Result]]:
        """Launch `images`, and return a function that waits for what `__call__` returns.

        On a GPU the next images can be launched, or the CPU do something else, in between.
        """
        checked = check_bytes(images, len(self._transform.image_mean))
        groups: dict[Bucket, list[int]] = {}
        for i, image in enumerate(checked):
            size = (image.shape[-2], image.shape[-1])
            groups.setdefault(self._choose(size, f"images[{i}]"), []).append(i)
        most = self.batch_sizes[-1]
        parts = [(bucket, n[at : at + most]) for bucket, n in groups.items() for at in range(0, len(n), most)]
        begun = [(numbers, self._runner.begin([checked[i] for i in numbers], bucket)) for bucket, numbers in parts]

        def finish() -> list[Result]:
            results: dict[int, Result] = {}
            for numbers, wait in begun:
                results.update(zip(numbers, wait(), strict=True))
            return [results[i] for i in range(len(results))]

        return finish

    def _choose(self, size: Size, name: str) -> Bucket:
        bucket = choose(self.buckets, self._transform, size, name)
        canvas = canvas_of(self._transform, size)
        if self._runner.depends_on_padding and canvas != bucket.canvas:
            culprit = self._runner.depends_on_padding[0]
            raise ValueError(
                f"{name}: an image of {size[0]} x {size[1]} pixels (height x width) is of none of the engine's sizes. "
                f"It would be padded, on which results of {culprit} depend. Add it to image_sizes"
            )
        return bucket

    def __repr__(self) -> str:
        sizes = ", ".join(f"{height} x {width}" for height, width in (bucket.image for bucket in self.buckets))
        return f"Engine(images of {sizes}; batches of {self.batch_sizes}; {self.dtype}; masks={self.masks!r})"


def compile(
    model: nn.Module,
    *,
    image_sizes: ImageSizes,
    batch_sizes: int | Sequence[int] = 1,
    dtype: torch.dtype | None = None,
    masks: MaskFormat | None = "soft",
    mask_threshold: float = 0.5,
) -> Engine:
    """Make a detector ready to be run many times, on the device where it is.

    It becomes a copy whose norms are folded into convolutions, with activations and sums, and whose masks are computed
    of the predicted class only.  Its thresholds and limits are those that `model` has now.

    Args:
        model: a detector of ours, or one of torchvision's that `fastmrcnn.accelerate` takes.
        image_sizes: (height, width) in pixels, one or several, of the images to come.  An image of another size is run
            as the smallest of these that holds it.
        batch_sizes: one or several; more images than the largest at once are run in several batches.
        dtype: of weights and maps: on a GPU float16 (the default), bfloat16, or float32, which is TF32 where PyTorch is
            allowed that; on a CPU float32 (the default) or bfloat16.  Boxes and scores are float32 anyway.
        masks: their format, see :class:`fastmrcnn.Predictor`; None leaves them out.
        mask_threshold: a pixel belongs to a mask where the soft mask is above this, 0 to below 1.

    Returns:
        A function of images, see `Engine`.

    Raises:
        ValueError, TypeError: an argument is none of these, or the model has a part that cannot be run so.
        RuntimeError: the model cannot be captured as a CUDA graph; the message names the part.
    """
    model = accelerate(model)
    if isinstance(model.transform, SquarePreprocess | CornerPreprocess):
        raise ValueError("model: a network with its conventions of boxes cannot be compiled; run it as it is")
    device = device_of(model)
    if device.type not in DTYPES:
        raise ValueError(f"model: it is on {device.type!r}; move it to 'cpu' or 'cuda'")
    accepted = DTYPES[device.type]
    dtype = accepted[0] if dtype is None else dtype
    if dtype not in accepted:
        names = ", ".join(map(str, accepted))
        raise ValueError(f"dtype={dtype}: on {device.type!r} expected one of {names}")
    if masks is not None and masks not in get_args(MaskFormat):
        raise ValueError(f"masks={masks!r}: expected one of {', '.join(get_args(MaskFormat))}, or None")
    if not 0 <= mask_threshold < 1:
        raise ValueError(f"mask_threshold={mask_threshold}: expected 0 to below 1")
    buckets, batches = as_buckets(model.transform, image_sizes), as_batch_sizes(batch_sizes)
    prepared = prepare(model, dtype, with_masks=masks is not None)
    runner: Runner
    if device.type == "cpu":
        runner = HostRunner(prepared, dtype, masks, mask_threshold)
    else:
        runner = DeviceRunner(prepared, buckets, batches, dtype, masks, mask_threshold)
    return Engine(runner, prepared.transform, buckets, batches, dtype, masks)
