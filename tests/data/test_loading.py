"""From data sets to batches: what is in them, and that it depends on (seed, epoch, position) alone."""

import signal
import subprocess
import time
from itertools import islice

import pytest
import torch
from mixed_data import Mixed, assert_same, training_items

from fastmrcnn.data import (
    DataError,
    LargeScaleJitter,
    Prefetcher,
    Resize,
    Shapes,
    TrainingBatches,
    TrainingItems,
    collate_loaded,
    training_loader,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("jitter", [False, True])
def test_a_batch_holds_its_samples(jitter):
    dataset = Mixed(num_keypoints=3)
    items = training_items(dataset, LargeScaleJitter(50, 0.3, 0.6) if jitter else Resize([60], 90))
    samples = [items[0, i, i] for i in (0, 2, 3, 5, 8)]  # none of them upright
    batch = collate_loaded(samples, items.view.canvas)
    most = max(len(sample.labels) for sample in samples)
    tallest, widest = (max(sample.view[axis] for sample in samples) for axis in (6, 7))
    if jitter:
        assert max(tallest, widest) <= 32  # and yet
        assert batch.size == (64, 64)
    else:
        assert (tallest, widest, batch.size) == (60, 80, (64, 96))
    assert batch.boxes.shape == (5, most, 4)
    assert batch.keypoints.shape == (5, most, 3, 3)
    assert (batch.labels.dtype, batch.count.dtype, batch.views.dtype) == (torch.int64,) * 3
    for i, sample in enumerate(samples):
        count, (height, width) = len(sample.labels), sample.view[:2]
        assert (batch.image_ids[i], batch.count[i]) == (sample.image_id, count)
        assert tuple(batch.views[i].tolist()) == sample.view
        for padded, rows in (
            (batch.boxes, sample.boxes),
            (batch.labels, sample.labels),
            (batch.keypoints, sample.keypoints),
        ):
            assert torch.equal(padded[i, :count], rows)
            assert not padded[i, count:].any()
        start = int(batch.pixel_offsets[i])
        pixels = batch.pixels[start : start + height * width * 3].view(height, width, 3)
        assert torch.equal(pixels.permute(2, 0, 1), sample.image)
        start, words = int(batch.word_offsets[i]), -(-width // 32)
        found = batch.words[start : start + count * height * words].view(count, height, words)
        assert torch.equal(found, sample.words)
    assert batch.pixels.numel() == sum(sample.image.numel() for sample in samples)
    assert batch.words.numel() == sum(sample.words.numel() for sample in samples)


def test_a_batch_without_objects_has_a_slot():
    items = TrainingItems(Shapes(2, max_objects=0, min_objects=0), 0, None, Resize([128], 128))
    batch = collate_loaded([items[0, 0, 0], items[0, 1, 1]])
    assert (batch.boxes.shape, batch.labels.shape, batch.count.tolist()) == ((2, 1, 4), (2, 1), [0, 0])
    assert (batch.words.shape, batch.word_offsets.tolist(), batch.keypoints) == ((0,), [0, 0], None)


def test_a_batch_without_masks_has_none_and_some_are_refused():
    dataset = Mixed()
    items = TrainingItems(
        dataset, 0, lambda image, target: (image, {k: target[k] for k in target if k != "masks"}), Resize([40], 99)
    )
    batch = collate_loaded([items[0, 0, 0], items[0, 1, 1]])
    assert (batch.words, batch.word_offsets) == (None, None)
    with pytest.raises(ValueError, match="words: 1 of the 2 images"):
        collate_loaded([items[0, 0, 0], training_items(dataset)[0, 1, 1]])


def loaded(workers, dataset=None, epochs=((0, 0), (1, 0)), take=None):
    dataset = dataset or Mixed()
    batches = TrainingBatches(dataset, 2, aspect_groups=2, seed=1)
    loader = training_loader(training_items(dataset), batches, workers=workers, device=CPU)
    found = []
    for epoch, first in epochs:
        batches.set_position(epoch, first)
        found.append(list(islice(loader, take)))
    return found


def test_batches_do_not_depend_on_the_number_of_workers():
    state = torch.get_rng_state()
    alone = loaded(0)
    assert [len(batches) for batches in alone] == [6, 6]
    assert {batch.size for batches in alone for batch in batches} == {(128, 128)}  # of the jitter
    for epoch, expected in zip(loaded(2), alone, strict=True):
        for batch, other in zip(epoch, expected, strict=True):
            assert_same(batch, other)
    assert torch.equal(torch.get_rng_state(), state)  # not even to seed workers


def test_going_on_within_an_epoch_is_as_if_nothing_had_happened():
    alone = loaded(0)
    # Left in the middle, as a run is that ends, and then put elsewhere: twice with the same workers.
    found = loaded(2, epochs=((0, 0), (0, 2), (1, 4)), take=3)
    for batches, expected in zip(found, (alone[0][:3], alone[0][2:5], alone[1][4:]), strict=True):
        for batch, other in zip(batches, expected, strict=True):
            assert_same(batch, other)
    dataset = Mixed()
    batches = TrainingBatches(dataset, 2, seed=1)
    batches.set_position(0, 5)
    items = TrainingItems(dataset, 0, None, Resize([40], 99))
    assert len(list(training_loader(items, batches, workers=0, device=CPU))) == 1
    assert len(dataset.reads) == 2  # what is skipped is not loaded


class Slow:
    """A loader that takes its time."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            time.sleep(0.03)
            yield batch


def test_prefetcher_passes_batches_on_and_measures_how_long_it_waits():
    batches = loaded(0, epochs=((0, 0),))[0]
    started = time.perf_counter()
    prefetcher = Prefetcher(Slow(batches), CPU)
    for batch, expected in zip(prefetcher, batches, strict=True):
        assert_same(batch, expected)
        time.sleep(0.05)  # the work, which is not waited for
    assert 6 * 0.03 <= prefetcher.waited <= time.perf_counter() - started - 6 * 0.05
    assert list(Prefetcher([], CPU)) == []

    def failing():
        yield batches[0]
        raise DataError("image 3: unreadable")

    prefetcher = Prefetcher(failing(), CPU)
    assert next(prefetcher).image_ids == batches[0].image_ids
    with pytest.raises(DataError, match="image 3"):
        next(prefetcher)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo, which macOS and Windows do not have")
def test_workers_end_when_their_process_says_so_and_nobody_else():
    dataset = Mixed()
    loader = training_loader(training_items(dataset), TrainingBatches(dataset, 2), workers=2, device=CPU)
    batches = iter(loader)
    assert len(list(islice(batches, 2))) == 2  # one of each: both have started
    for worker in batches._workers:
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a scheduler does
    assert len(list(batches)) == 4
    assert len(list(loader)) == 6
    for worker in batches._workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefetched_batches_are_on_the_gpu_and_unharmed():
    dataset, device = Mixed(), torch.device("cuda")
    batches = TrainingBatches(dataset, 2, seed=1, aspect_groups=2)
    loader = training_loader(training_items(dataset), batches, workers=2, device=device)
    for batch, expected in zip(Prefetcher(loader, device), loaded(0)[0], strict=True):
        torch.cuda._sleep(10_000_000)  # the work, during which the next batch is copied
        assert batch.pixels.is_cuda
        moved = batch.to(CPU)
        assert_same(moved, expected)
