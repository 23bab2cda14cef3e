"""From samples to batches on the device, while it computes."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastmrcnn import ops
from fastmrcnn.batches import LoadedBatch
from fastmrcnn.data.items import LoadedSample, TrainingItems
from fastmrcnn.data.sampling import TrainingBatches
from fastmrcnn.data.views import round_up
from fastmrcnn_kernels.views import WINDOW_HEIGHT, WINDOW_WIDTH


def collate_loaded(samples: Sequence[LoadedSample], canvas: tuple[int, int] | None = None) -> LoadedBatch:
    """Samples as one batch.

    Args:
        samples: of a batch, at least one; either all have masks, and keypoints, or none.
        canvas: (height, width) in pixels, multiples of 32; by default the least that holds all windows.

    Raises:
        ValueError: only some have masks or keypoints, or images differ in their number of channels.
    """
    views = torch.tensor([sample.view for sample in samples])
    counts = [len(sample.labels) for sample in samples]
    pixels, pixel_offsets = ops.pack_images([sample.image for sample in samples])
    height, width = canvas or (round_up(int(views[:, axis].max())) for axis in (WINDOW_HEIGHT, WINDOW_WIDTH))
    boxes, labels = ([getattr(sample, name) for sample in samples] for name in ("boxes", "labels"))
    keypoints = _all_or_none("keypoints", samples)
    masks = _all_or_none("words", samples)
    batch = LoadedBatch(
        image_ids=[sample.image_id for sample in samples],
        size=(height, width),
        pixels=pixels,
        pixel_offsets=pixel_offsets,
        views=views,
        boxes=_padded(boxes, counts),
        labels=_padded(labels, counts),
        count=torch.tensor(counts),
        keypoints=None if keypoints is None else _padded(keypoints, counts),
    )
    if masks is not None:
        batch.words = torch.cat([words.flatten() for words in masks])
        batch.word_offsets = torch.tensor([0, *accumulate(words.numel() for words in masks)][:-1])
    return batch


def _all_or_none(name: str, samples: Sequence[LoadedSample]) -> list[Tensor] | None:
    found = [value for sample in samples if (value := getattr(sample, name)) is not None]
    if found and len(found) < len(samples):
        raise ValueError(f"{name}: {len(found)} of the {len(samples)} images of a batch have them, all or none must")
    return found or None


def _padded(rows: list[Tensor], counts: list[int]) -> Tensor:
    """Tensors [count, ...] as one [N, G, ...] with zeros at the end, G the greatest count or 1."""
    padded = rows[0].new_zeros(len(rows), max(1, *counts), *rows[0].shape[1:])
    for target, row, count in zip(padded, rows, counts, strict=True):
        target[:count] = row
    return padded


def training_loader(
    items: TrainingItems,
    batches: TrainingBatches,
    *,
    workers: int,
    device: torch.device,
    prefetch: int = 2,
) -> DataLoader[Any]:
    """A DataLoader of `LoadedBatch`es: each `iter` gives those of an epoch from where `batches.set_position` put it.

    Masks are packed and batches made in the workers, of one thread each, which live as long as the loader does. What
    comes of a batch depends neither on their number nor on what they made before, and torch's global generator, which
    a DataLoader otherwise draws from, is left alone.

    Args:
        items: samples by key.
        batches: keys by batch.
        workers: processes that load images; with 0 they are loaded where they are asked for.
        device: where batches will go: on the way to a GPU they are put into page-locked memory.
        prefetch: batches that each worker makes ahead.
    """
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate_loaded, canvas=getattr(items.view, "canvas", None)),
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_outlive_termination,
        generator=torch.Generator(),
    )


def _outlive_termination(worker: int) -> None:
    """Let SIGTERM end a worker only if the process that it works for sends it.

    Schedulers send it to all processes of a run, which has still to make a checkpoint, and needs batches until then.
    But a worker that ignored it would never end: it is how PyTorch ends those that are left when a program does.
    """
    if hasattr(signal, "sigwaitinfo"):  # which says who sent it; macOS and Windows do not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Prefetcher:
    """Batches of a loader on a device, copied there while it works on what was launched before.

    On a GPU the copies have a stream of their own, which the current one waits for; so they are hidden as far as the
    program is ahead of the device. On a CPU batches are passed through.

    Args:
        batches: such as a loader; in page-locked memory on the way to a GPU.
        device: where they go.

    Attributes:
        waited: seconds spent waiting for the loader.
    """

    def __init__(self, batches: Iterable[LoadedBatch], device: torch.device) -> None:
        self.waited = 0.0
        self._batches = iter(batches)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.waited += time.perf_counter() - started
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for value in vars(moved).values():
            if isinstance(value, Tensor):
                value.record_stream(current)  # or its memory would be used again while the current stream reads it
        return moved
