"""Views against torchvision's transforms, which resize and crop pixels; boxes against the same in float64."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat

from fastmrcnn.data import LargeScaleJitter, Resize, Shapes, look_through

SIDES = st.integers(1, 3000)


def boxes_in(height, width, count, generator):
    """Boxes [G, 4] inside of an image, some of a pixel or less."""
    ends = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    ends[::3, 1] = ends[::3, 0] + torch.rand(len(ends[::3]), 2, generator=generator) * 0.01
    return (ends.clamp(max=1) * torch.tensor([width, height])).reshape(-1, 4)


def target_of(height, width, seed, count=8):
    generator = torch.Generator().manual_seed(seed)
    keypoints = torch.rand(count, 5, 3, generator=generator) * torch.tensor([width, height, 3.0])
    keypoints[..., 2].floor_()
    return {
        "boxes": boxes_in(height, width, count, generator),
        "labels": torch.arange(count),
        "keypoints": keypoints,
        "area": torch.arange(count) / 2,
        "iscrowd": torch.zeros(count, dtype=torch.uint8),
        "image_id": 3,
    }


@given(SIDES, SIDES, st.integers(1, 1500), st.integers(1, 2000), st.integers(0, 2**31))
def test_resize_is_torchvisions_to_the_bit(height, width, min_size, max_size, seed):
    scale = min(min_size / min(height, width), max_size / max(height, width))
    assume(min(height, width) * scale >= 1)  # interpolate refuses to make an image of nothing
    target = target_of(height, width, seed)
    transform = GeneralizedRCNNTransform(min_size, max_size, [0.0], [1.0])
    image, expected = transform.resize(torch.empty(1, height, width, device="meta"), dict(target))
    view = Resize([min_size], max_size)(height, width)
    assert view == (height, width, *image.shape[1:], 0, 0, *image.shape[1:])
    seen = look_through(target, view, min_side=0.0)
    sides = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
    assert torch.equal(seen["boxes"], torch.minimum(expected["boxes"], sides))  # but for a rounding at the border
    visible = target["keypoints"][..., 2] > 0
    visible &= (expected["keypoints"][..., :2] <= sides[:2]).all(dim=-1)
    assert torch.equal(seen["keypoints"][visible], expected["keypoints"][visible])
    assert not seen["keypoints"][~visible].any()


def test_resize_draws_among_sizes_and_keeps_a_pixel():
    torch.manual_seed(0)
    resize = Resize([64, 32, 48], 1000)
    assert {resize(100, 200)[2] for _ in range(50)} == {32, 48, 64}
    assert Resize([1], 10)(100, 1) == (100, 1, 10, 1, 0, 0, 10, 1)
    assert Resize([1], 10)(1, 3000)[2:4] == (1, 10)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 64), st.floats(0.1, 2.0), st.integers(0, 2**31))
def test_jitter_scales_as_torchvision_and_crops_within(height, width, size, factor, seed):
    torch.manual_seed(seed)
    view = LargeScaleJitter(size, factor, factor)(height, width)
    exact = [min(size / height, size / width) * factor * side for side in (height, width)]
    if min(exact) >= 1:
        theirs = v2.ScaleJitter((size, size), (factor, factor))(torch.zeros(1, height, width)).shape[1:]
        near = [abs(x - round(x)) < 1e-4 for x in exact]  # there float32 decides which whole number is below
        assert all(abs(a - b) <= int(n) for a, b, n in zip(view[2:4], theirs, near, strict=True))
    assert view[:2] == (height, width)
    for resized, start, window in zip(view[2:4], view[4:6], view[6:8], strict=True):
        assert window == min(resized, size)
        assert 0 <= start <= resized - window


def test_jitter_draws_every_place_and_all_scales():
    torch.manual_seed(0)
    jitter = LargeScaleJitter(10, 1.5, 1.5)
    views = [jitter(20, 20) for _ in range(400)]
    assert {view[2:4] for view in views} == {(15, 15)}
    assert {view[4:6] for view in views} == {(y, x) for y in range(6) for x in range(6)}
    sides = torch.tensor([LargeScaleJitter(1000, 0.1, 2.0)(500, 250)[2] for _ in range(2000)], dtype=torch.float64)
    assert 100 <= sides.min() < 120
    assert 1980 < sides.max() <= 2000
    assert abs(sides.mean() - 1050) < 5 * 1900 / (12 * 2000) ** 0.5
    assert (Resize([3], 4).canvas, jitter.canvas, LargeScaleJitter(64).canvas) == (None, (32, 32), (64, 64))


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(16, 1100), st.integers(0, 2**31))
def test_boxes_in_a_window_are_torchvisions_in_float64(height, width, size, seed):
    torch.manual_seed(seed)
    view = LargeScaleJitter(size)(height, width)
    _, _, resized_height, resized_width, top, left, window_height, window_width = view
    target = target_of(height, width, seed)
    resized, _ = F.resize_bounding_boxes(
        target["boxes"].double(), canvas_size=(height, width), size=[resized_height, resized_width]
    )
    expected, _ = F.crop_bounding_boxes(resized, BoundingBoxFormat.XYXY, top, left, window_height, window_width)
    # A rounding each of the ratio, of the product and of the difference, of at most the resized image's size.
    budget = 3 * torch.finfo(torch.float32).eps / 2 * max(resized_height, resized_width, 1)
    sides = (expected[:, 2:] - expected[:, :2]).amin(dim=1)
    assume(((sides - 1).abs() > 2 * budget).all())

    kept = sides >= 1
    seen = look_through(target, view)
    assert ((seen["boxes"].double() - expected[kept]).abs() <= budget).all()
    assert seen["boxes"].dtype == torch.float32
    for name in ("labels", "area", "iscrowd"):
        assert torch.equal(seen[name], target[name][kept])
    assert (len(seen["keypoints"]), seen["image_id"]) == (int(kept.sum()), 3)


def test_keypoints_outside_of_the_window_are_not_visible():
    keypoints = torch.tensor([[[10.0, 10, 2], [29, 20, 1], [31, 20, 2], [9, 15, 2], [15, 15, 0], [30, 25, 2]]])
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.ones(1), "keypoints": keypoints}
    seen = look_through(target, (50, 60, 100, 120, 20, 20, 30, 40))  # twice as large, from (20, 20) on
    assert seen["keypoints"].tolist() == [[[0, 0, 2], [38, 20, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [40, 30, 2]]]
    assert seen["boxes"].tolist() == [[0, 0, 40, 30]]


def test_objects_without_a_pixel_in_the_window_are_removed():
    masks = torch.zeros(3, 20, 20, dtype=torch.uint8)
    masks[0, 2:4, 2:12] = 1  # an L, of which the window below has the empty corner only
    masks[0, 2:12, 2:4] = 1
    masks[1, 11, 11] = 1
    boxes = torch.tensor([[2.0, 2, 12, 12], [2, 2, 12, 12], [2, 2, 12, 12]])
    target = {"boxes": boxes, "labels": torch.tensor([4, 5, 6]), "masks": masks}
    seen = look_through(target, (20, 20, 40, 40, 12, 12, 11, 11))
    assert seen["labels"].tolist() == [5]
    assert torch.equal(seen["masks"], masks[1:2])
    # The last row and column of that window are half of pixel 11; without them there is nothing.
    assert len(look_through(target, (20, 20, 40, 40, 12, 12, 10, 10))["labels"]) == 0
    # Of the whole image, nothing is looked for: a detector of torchvision learns such a box, too.
    assert look_through(target, (20, 20, 40, 40, 0, 0, 40, 40))["labels"].tolist() == [4, 5, 6]


@pytest.mark.parametrize("seed", range(12))
def test_masks_in_the_window_lie_in_their_boxes(seed):
    torch.manual_seed(seed)
    _, target = Shapes(20, image_size=(96, 128), seed=1)[seed]
    before = {name: torch.as_tensor(value).clone() for name, value in target.items()}
    view = LargeScaleJitter(80)(96, 128)
    height, width, resized_height, resized_width, top, left, window_height, window_width = view
    seen = look_through(target, view)
    assert all(torch.equal(torch.as_tensor(value), before[name]) for name, value in target.items())
    rows = (top + torch.arange(window_height)) * height // resized_height
    columns = (left + torch.arange(window_width)) * width // resized_width
    enlarged = resized_height > height
    for mask, (x1, y1, x2, y2) in zip(seen["masks"], seen["boxes"].tolist(), strict=True):
        ys, xs = torch.nonzero(mask[rows][:, columns], as_tuple=True)
        if not len(ys):
            assert not enlarged
            continue
        for places, low, high in ((ys, y1, y2), (xs, x1, x2)):
            assert low - 1e-4 <= places.min()
            assert places.max() < high + 1e-4
            if enlarged and len(seen["masks"]) == len(target["masks"]) and (top, left) == (0, 0):
                assert places.min() < low + 1 + 1e-4


@pytest.mark.parametrize("arguments", [([], 10), ([0], 10), ([5], 0)])
def test_sizes_that_are_refused(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        Resize(*arguments)


@pytest.mark.parametrize("arguments", [(0,), (8, 0.0, 1.0), (8, 2.0, 1.0), (8, 1.0, float("inf"))])
def test_jitter_that_is_refused(arguments):
    with pytest.raises(ValueError, match="0 < low <= high"):
        LargeScaleJitter(*arguments)
