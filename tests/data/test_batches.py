"""Which images make which batch: counted over whole epochs, of data sets without images."""

import bisect
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmrcnn.data import TrainingBatches, repeat_factors
from fastmrcnn.data.sampling import Key, aspect_ratio_groups, mixed_seed


class Sizes:
    """A data set of images that are not read: sizes, and the categories in each."""

    def __init__(self, sizes, categories=None):
        self.sizes = sizes
        self.image_ids = [10 * i + 7 for i in range(len(sizes))]
        per_image = [[1]] * len(sizes) if categories is None else categories
        self.coco = {
            "annotations": [
                {"image_id": image_id, "category_id": abs(category), "iscrowd": int(category < 0)}
                for image_id, found in zip(self.image_ids, per_image, strict=True)
                for category in found
            ]
        }

    def __len__(self):
        return len(self.sizes)

    def image_size(self, i):
        return self.sizes[i]


def random_sizes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(side) for side in torch.randint(20, 100, (count, 2), generator=generator).tolist()]


def items(batches, epoch, first=0):
    batches.set_position(epoch, first)
    return [[key.item for key in batch] for batch in batches]


def drawn_in(batches, epoch):
    return list(chain.from_iterable(items(batches, epoch)))


@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99), st.integers(0, 9)
)
def test_processes_share_the_batches_of_one(count, batch_size, world_size, k, seed, epoch):
    dataset = Sizes(random_sizes(count))
    options = {"seed": seed, "aspect_groups": k, "repeats": 1 + torch.arange(count) % 5 / 2}
    alone = TrainingBatches(dataset, batch_size * world_size, **options)
    several = [
        TrainingBatches(dataset, batch_size, rank=r, world_size=world_size, **options) for r in range(world_size)
    ]
    for batches in (alone, *several):
        batches.set_position(epoch)
        assert len(list(batches)) == len(batches) == len(alone)
    together = [list(chain.from_iterable(shares)) for shares in zip(*several, strict=True)]
    assert together == list(alone)
    assert [key.position for batch in together for key in batch] == list(range(len(alone) * batch_size * world_size))
    assert {key.epoch for batch in together for key in batch} == {epoch}
    # From (seed, epoch) alone.
    again = TrainingBatches(dataset, batch_size * world_size, **options)
    assert items(again, epoch + 1) != items(again, epoch) or count < 8
    assert items(again, epoch) == items(alone, epoch)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_every_image_once_per_epoch(number, batch_size, k, epoch):
    batches = TrainingBatches(Sizes(random_sizes(number * batch_size)), batch_size, aspect_groups=k)
    assert sorted(drawn_in(batches, epoch)) == list(range(number * batch_size))


def test_orders_differ_between_epochs_and_seeds():
    dataset = Sizes(random_sizes(40))
    orders = [
        items(TrainingBatches(dataset, 4, seed=seed, aspect_groups=k), epoch)
        for seed in range(3)
        for k in (0, 3)
        for epoch in range(3)
    ]
    assert len({str(order) for order in orders}) == len(orders)
    first = Counter(items(TrainingBatches(dataset, 4, seed=seed), 0)[0][0] for seed in range(400))
    assert len(first) == 40  # each may be the first
    assert max(first.values()) < 30


@pytest.mark.parametrize("k", [0, 1, 3])
def test_those_too_many_for_full_batches_change(k):
    # A group of one, one of three, and the rest.
    dataset = Sizes([(100, 20)] + [(20, 100)] * 3 + [(50, 50)] * 18)
    batches = TrainingBatches(dataset, 4, aspect_groups=k)
    assert len(batches) == 5
    epochs = 600
    drawn = Counter(item for epoch in range(epochs) for item in drawn_in(batches, epoch))
    expected, deviation = epochs * 20 / 22, (epochs * 20 / 22 * 2 / 22) ** 0.5
    assert set(drawn) == set(range(22))
    assert all(abs(count - expected) < 5 * deviation for count in drawn.values())


@given(st.integers(1, 120), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_batches_are_of_one_group_where_it_fills_them(count, batch_size, k, seed):
    dataset = Sizes(random_sizes(count, seed))
    group = aspect_ratio_groups(dataset, k)
    bounds = [2 ** (-1 + i / k) for i in range(2 * k + 1)]
    assert group.tolist() == [bisect.bisect_right(bounds, width / height) for height, width in dataset.sizes]
    found = items(TrainingBatches(dataset, batch_size, seed=seed, aspect_groups=k), 0)
    mixed = [batch for batch in found if len({int(group[item]) for item in batch}) > 1]
    members = Counter(group[[item for batch in found for item in batch]].tolist())
    left = sum(number % batch_size for number in members.values())
    assert len(mixed) <= left // batch_size
    assert all(max(Counter(group[batch].tolist()).values()) < batch_size for batch in mixed)


def test_batches_of_groups_come_in_any_order():
    dataset = Sizes([(20, 100)] * 8 + [(50, 50)] * 8)
    batches = TrainingBatches(dataset, 4, aspect_groups=2)
    orders = {tuple(batch[0] < 8 for batch in items(batches, epoch)) for epoch in range(200)}
    assert len(orders) == 6  # of two each


def test_repeats_are_what_is_drawn_on_average():
    kinds = torch.tensor([1.0, 1.25, 2.5, 3.0, 1.9], dtype=torch.float64)
    repeats, epochs = kinds.repeat_interleave(40), 100
    batches = TrainingBatches(Sizes(random_sizes(200)), 2, repeats=repeats)
    draws = round(repeats.sum().item())
    assert (len(batches), draws) == (193, 386)
    counts = torch.stack([torch.bincount(torch.tensor(drawn_in(batches, e)), minlength=200) for e in range(epochs)])
    assert (counts.sum(dim=1) == draws).all()
    variance = (repeats % 1) * (1 - repeats % 1)
    # Chance draws more or fewer than an epoch has: some of them are left out, or taken once more.
    adjusted = variance.sum().sqrt().item()
    off = (counts < repeats.floor()) | (counts > repeats.ceil())
    assert off.sum(dim=1).double().mean() < 2 * adjusted
    found = counts.double().mean(dim=0).view(5, 40).mean(dim=1)
    error = 5 * (variance.view(5, 40).mean(dim=1) / (40 * epochs)).sqrt() + kinds * adjusted / draws
    assert ((found - kinds).abs() < error).all()
    whole = TrainingBatches(Sizes(random_sizes(6)), 2, repeats=torch.tensor([1, 2, 3, 1, 2, 1]))
    assert all(sorted(drawn_in(whole, epoch)) == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5] for epoch in range(5))


def test_repeat_factors():
    categories = [[1], [1, 1], [1, 2], [1], [-3, 1], [], [1, 3], [1]]
    found = repeat_factors(Sizes(random_sizes(8), categories), 0.5)
    # Of 8 images 7 have class 1, one has 2, one has 3 (the crowd does not count).
    assert found.dtype == torch.float64
    assert found.tolist() == [1, 1, 2, 1, 1, 1, 2, 1]
    assert repeat_factors(Sizes(random_sizes(8), categories), 0.0).tolist() == [1] * 8
    everything = repeat_factors(Sizes(random_sizes(8), categories), 1.0)
    torch.testing.assert_close(everything[0], torch.tensor((8 / 7) ** 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="share of the images"):
        repeat_factors(Sizes(random_sizes(8), categories), 1.5)


@pytest.mark.parametrize("k", [0, 2])
def test_a_position_is_where_skipping_leads(k):
    dataset = Sizes(random_sizes(33))
    batches = TrainingBatches(dataset, 4, aspect_groups=k, seed=5)
    whole = list(batches)
    assert len(whole) == 8
    for first in range(9):
        batches.set_position(0, first)
        assert list(batches) == list(batches) == whole[first:]
        assert len(batches) == 8
    batches.set_position(3, 2)
    assert next(iter(batches))[0] == Key(3, 8, items(batches, 3)[2][0])
    for wrong in ((-1, 0), (0, -1), (0, 9)):
        with pytest.raises(ValueError, match=r"batch in 0\.\.8"):
            batches.set_position(*wrong)


def test_small_data_sets_are_gone_through_more_than_once():
    batches = TrainingBatches(Sizes(random_sizes(3)), 4, rank=1, world_size=2, aspect_groups=1)
    other = TrainingBatches(Sizes(random_sizes(3)), 4, rank=0, world_size=2, aspect_groups=1)
    assert len(batches) == 1
    assert sorted(Counter(items(batches, 0)[0] + items(other, 0)[0]).values()) == [2, 3, 3]


def test_images_without_objects_can_be_left_out():
    dataset = Sizes(random_sizes(6), [[1], [], [-1], [1, -1], [2], []])
    assert sorted(drawn_in(TrainingBatches(dataset, 1), 0)) == [0, 1, 2, 3, 4, 5]
    assert sorted(drawn_in(TrainingBatches(dataset, 1, skip_empty=True), 0)) == [0, 3, 4]
    with pytest.raises(ValueError, match="no images to draw among 2 with objects"):
        TrainingBatches(Sizes(random_sizes(2), [[], [-1]]), 1, skip_empty=True)
    with pytest.raises(ValueError, match="no images to draw among 0"):
        TrainingBatches(Sizes([]), 1)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"seed": -1}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"aspect_groups": -1}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="batch_size >= 1, seed >= 0, 0 <= rank < world_size"):
        TrainingBatches(Sizes(random_sizes(4)), **{"batch_size": 1, **options})


@pytest.mark.parametrize("repeats", [torch.ones(3), torch.full((4,), 0.5), torch.tensor([1, 1, 1, float("nan")])])
def test_repeats_that_are_none(repeats):
    with pytest.raises(ValueError, match="repeats must be 4 numbers from 1"):
        TrainingBatches(Sizes(random_sizes(4)), 1, repeats=repeats)


def test_seeds_depend_on_each_number_and_on_how_many_there_are():
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 1, 2)]
    assert len({mixed_seed(*given) for given in numbers}) == len(numbers)
    assert mixed_seed(1, 2, 3) == 13060417733913336131  # on every machine
