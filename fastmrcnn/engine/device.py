"""An engine on a GPU: a CUDA graph for each size and number of images, replayed on what is copied into its buffer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch
from fastmrcnn.engine.buckets import Bucket, Size
from fastmrcnn.engine.layers import Canvases
from fastmrcnn.engine.padding import keep_apart
from fastmrcnn.engine.step import Found, Step
from fastmrcnn.inference import Encoding, Inference, MaskFormat, Result
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import resized_bytes
from fastmrcnn.ops.images import copy_pixels

WARM_UP = 3
"""Runs before a capture: kernels are compiled, and cuDNN tries its algorithms."""


class DeviceRunner:
    """Runs a prepared detector in fixed shapes.  Calls from several threads take turns.

    Args:
        model: a prepared detector.
        buckets: sizes of images.
        batch_sizes: numbers of images, ascending.
        dtype: of maps.
        masks: their format.
        mask_threshold: from 0.
        graphs: capture CUDA graphs; otherwise the same operations are launched one by one.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        buckets: Sequence[Bucket],
        batch_sizes: Sequence[int],
        dtype: torch.dtype,
        masks: MaskFormat | None,
        mask_threshold: float,
        graphs: bool = True,
    ) -> None:
        self.inference = Inference(model, masks, mask_threshold)
        self.device = next(model.parameters()).device
        self.batch_sizes = list(batch_sizes)
        self.lock = threading.Lock()
        canvases = Canvases()
        self.depends_on_padding = keep_apart(model, canvases)
        encoded = mask_threshold if masks in ("rle", "polygons") and self.device.type == "cuda" else None
        keys = [(bucket, batch) for bucket in buckets for batch in self.batch_sizes]
        steps = {key: Step(model, canvases, *key, dtype, encoded) for key in keys}
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.programs: dict[tuple[Bucket, int], tuple[Step, Callable[[], Found]]] = {
            key: (step, step) for key, step in steps.items()
        }
        if graphs and self.stream is not None:
            pool = torch.cuda.graph_pool_handle()
            # The largest first: the others find all the memory that they need in its pool.
            for key in reversed(keys):
                self.programs[key] = steps[key], captured(steps[key], self.stream, pool)

    def begin(self, images: list[Tensor], bucket: Bucket) -> Callable[[], list[Result]]:
        """See `Runner`."""
        batch = next(n for n in self.batch_sizes if n >= len(images))
        step, run = self.programs[bucket, batch]
        with self.lock, self.on_stream():
            sizes = [(image.shape[-2], image.shape[-1]) for image in images]
            self.load(step, [resized_bytes(step.model.transform, image) for image in images], sizes)
            found = run()
            # The next run overwrites what this one has found, which is small as long as masks are not pasted.
            names = [f.name for f in fields(found.detections)]
            values = {name: x.clone() for name in names if (x := getattr(found.detections, name)) is not None}
            detections = replace(found.detections, **values)
            return self.inference.collect(detections, sizes, self.encoding(detections, sizes, found.encoding))

    def encoding(self, found: DetectionBatch, sizes: list[Size], launched: Tensor | None) -> Encoding | None:
        """The encoding of masks that a step has `launched`."""
        if launched is None or found.masks is None:
            return None
        padded = [*sizes, *[(1, 1)] * (len(found.masks) - len(sizes))]
        options: Any = {"threshold": self.inference.mask_threshold, "semantics": self.inference.semantics}
        return ops.begin_encoding(found.masks, found.boxes, padded, count=found.count, launched=launched, **options)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """On a GPU the runner's stream, after what the caller has launched."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                yield

    def load(self, step: Step, images: Sequence[Tensor], sizes: Sequence[Size]) -> None:
        """Copy images into the buffer of a step; what comes from the CPU in one piece, and without waiting."""
        pinned = self.stream is not None
        staged = torch.empty(step.buffer.shape, dtype=torch.uint8, pin_memory=pinned)
        on_host = [image.device.type == "cpu" for image in images]
        for place, image, here in zip(step.fill(staged, images, sizes), images, on_host, strict=True):
            if here:
                copy_pixels(image, place)
        last = max((i + 1 for i, here in enumerate(on_host) if here), default=0)
        used = step.header + step.room * last
        step.buffer[:used].copy_(staged[:used], non_blocking=True)
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        for place, image, here in zip(step.places(step.buffer, given), images, on_host, strict=True):
            if not here:
                place.copy_(image, non_blocking=True)
                if self.stream is not None and image.is_cuda:
                    image.record_stream(self.stream)


def captured(step: Step, stream: torch.cuda.Stream, pool: Any) -> Callable[[], Found]:
    """A function that does what `step` does, as one launch; what it returns is overwritten by each call.

    RuntimeError, which names the part of the network, if it cannot be captured.
    """
    benchmark = torch.backends.cudnn.benchmark
    graph = torch.cuda.CUDAGraph()
    try:
        reproducible = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
        torch.backends.cudnn.benchmark = not reproducible
        with torch.cuda.device(stream.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step()
            stream.synchronize()
            # Errors of this thread only: others may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                found = step()
    except RuntimeError as error:
        raise RuntimeError(f"the detector cannot be captured as a CUDA graph: {culprit(step) or error}") from error
    finally:
        torch.backends.cudnn.benchmark = benchmark

    def replay() -> Found:
        graph.replay()
        return found

    return replay


def culprit(step: Step) -> str | None:
    """Which module of the step's network needs a value, or a shape, that only the device knows; and what it asks for.

    It is run on tensors that have none.
    """
    inside: list[str] = []
    handles = []
    for name, module in step.model.named_modules():
        label = f"{name or 'model'} ({type(module).__name__})"
        # What hooks return other than None would take the place of inputs and outputs.
        handles.append(module.register_forward_pre_hook(lambda *_, label=label: inside.append(label)))
        handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            step()
    except Exception as error:  # of any kind: it is put into words, beside the one that led here
        return f"{inside[-1] if inside else 'model'} asks for what only the device knows: {error}"
    finally:
        for handle in handles:
            handle.remove()
    return None
