"""Images resized: against torchvision's transform, and the kernel against the reference."""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, examples
from tolerances import assert_exact_arithmetic, assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastmrcnn import ops
from fastmrcnn.ops.implementations import IMPLEMENTATIONS
from fastmrcnn_kernels import library
from fastmrcnn_kernels import views as layout
from fastmrcnn_kernels.reference import images as reference
from fastmrcnn_kernels.views import whole

pytestmark = pytest.mark.usefixtures("poisoned")

ON_HOST: list[ops.Impl] = ["reference", "torchvision"]
EVERYWHERE: list[ops.Impl] = [*ON_HOST, "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MEAN, STD = [0.485, 0.456, 0.406, 0.5, 0.1], [0.229, 0.224, 0.225, 1.0, 0.01]


class Batch(NamedTuple):
    """Images, uint8 [C, H, W]; their bytes and where they begin, with others in between; views of them; the canvas."""

    images: list[Tensor]
    pixels: Tensor
    offsets: Tensor
    views: Tensor
    size: tuple[int, int]

    def resize(self, impl: ops.Impl, dtype: torch.dtype = torch.float32, views: Tensor | None = None) -> Tensor:
        device = DEVICE if impl == "triton" else "cpu"
        tensors = (x.to(device) for x in (self.pixels, self.offsets, self.views if views is None else views))
        channels = len(self.images[0])
        resized = ops.resize_images(*tensors, self.size, MEAN[:channels], STD[:channels], dtype, impl=impl).cpu()
        assert resized.dtype == dtype
        assert resized.shape == (len(self.images), channels, *self.size)
        assert resized.permute(0, 2, 3, 1).is_contiguous()
        return resized


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def as_batch(images: list[Tensor], views: list[tuple[int, ...]], size: tuple[int, int]) -> Batch:
    """With 7 other bytes before each image."""
    parts, offsets = [], []
    for image in images:
        parts += [random_bytes(7), image.permute(1, 2, 0).flatten()]
        offsets.append(sum(map(len, parts[:-1])))
    return Batch(images, torch.cat(parts), torch.tensor(offsets), torch.tensor(views), size)


@st.composite
def images(draw: st.DrawFn, least: int = 1, most: int = 23) -> list[Tensor]:
    """One to three images of the same number of channels, whose sides are `least` to `most` pixels."""
    channels, side = draw(st.sampled_from([1, 3, 4, 5])), st.integers(least, most)
    return [random_bytes(channels, draw(side), draw(side)) for _ in range(draw(st.integers(1, 3)))]


@st.composite
def batches(draw: st.DrawFn, most: int = 31) -> Batch:
    """Images made larger or smaller, along each axis by itself, and windows of them on a canvas that may be larger."""
    found, views = draw(images()), []
    for image in found:
        resized = [draw(st.integers(1, most)) for _ in range(2)]
        window = [draw(st.integers(1, side)) for side in resized]
        start = [draw(st.integers(0, side - part)) for side, part in zip(resized, window, strict=True)]
        views.append((*image.shape[1:], *resized, *start, *window))
    size = [max(view[i] for view in views) + draw(st.integers(0, 9)) for i in (6, 7)]
    return as_batch(found, views, (size[0], size[1]))


def by_torchvision(
    found: list[Tensor], dtype: torch.dtype, sides: tuple[int, int], divisible: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Its batch, and the sizes of the resized images."""
    channels = len(found[0])
    transform = GeneralizedRCNNTransform(*sides, MEAN[:channels], STD[:channels], divisible).eval()
    batch, _ = transform([image.to(dtype) / 255 for image in found])
    return batch.tensors, batch.image_sizes


def as_torchvision_sees_it(found: list[Tensor], sides: tuple[int, int], divisible: int) -> tuple[Batch, Tensor, Tensor]:
    """Whole images, and torchvision's batches of them in float32 and float64."""
    expected, sizes = by_torchvision(found, torch.float32, sides, divisible)
    oracle, _ = by_torchvision(found, torch.float64, sides, divisible)
    views = [whole(*image.shape[1:], *size) for image, size in zip(found, sizes, strict=True)]
    return as_batch(found, views, (expected.shape[2], expected.shape[3])), expected, oracle


@given(
    found=images(),
    sides=st.tuples(st.integers(1, 40), st.integers(23, 60)),  # none gets smaller than a pixel
    divisible=st.sampled_from([1, 32]),
    dtype=st.sampled_from(DTYPES),
)
def test_whole_images_equal_torchvision(
    found: list[Tensor], sides: tuple[int, int], divisible: int, dtype: torch.dtype
) -> None:
    """In float64; and the host's implementation to the bit."""
    batch, expected, oracle = as_torchvision_sees_it(found, sides, divisible)
    assert torch.equal(batch.resize("torchvision", dtype), expected.to(dtype))
    for impl in ON_HOST:
        assert_exact_arithmetic(batch.resize(impl, torch.float64), oracle, scale=1 / min(STD))


@given(
    found=images(least=17, most=30),  # enough values for an error that is typical
    sides=st.tuples(st.integers(17, 40), st.integers(30, 60)),
    dtype=st.sampled_from(DTYPES),
)
def test_errors_keep_to_the_budget(found: list[Tensor], sides: tuple[int, int], dtype: torch.dtype) -> None:
    """That of torchvision's own float32.  The kernel is compared with the reference, below."""
    batch, expected, oracle = as_torchvision_sees_it(found, sides, 32)
    assert_within_budget(batch.resize("reference", dtype), expected.to(dtype), oracle)


@pytest.mark.parametrize("impl", EVERYWHERE)
@examples(60, interpreted=8)
@given(batch=batches())
def test_a_window_is_a_part_of_the_resized_image(impl: ops.Impl, batch: Batch) -> None:
    """To the bit, and zeros about it."""
    found = batch.resize(impl)
    views = torch.cat((batch.views[:, :4], torch.zeros_like(batch.views[:, :2]), batch.views[:, 2:4]), dim=1)
    height, width = views[:, 2:4].amax(dim=0).tolist()
    resized = batch._replace(size=(height, width)).resize(impl, views=views)
    expected = torch.zeros_like(found)
    for target, image, (top, left, height, width) in zip(expected, resized, batch.views[:, 4:].tolist(), strict=True):
        target[:, :height, :width] = image[:, top : top + height, left : left + width]
    assert torch.equal(found, expected)


@examples(200, interpreted=20)
@given(batch=batches(), dtype=st.sampled_from(DTYPES))
def test_kernel_equals_reference(batch: Batch, dtype: torch.dtype) -> None:
    """To the bit, since both round alike; but for bfloat16 in the interpreter, which cuts bits off."""
    found, expected = batch.resize("triton", dtype), batch.resize("reference", dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        assert_within_budget(found, expected, batch.resize("reference", torch.float64))
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("channels", "width"), [(1, 2100), (3, 700), (17, 70)])
@pytest.mark.parametrize("seen", [0.4, 1.0])
def test_rows_of_several_programs(channels: int, width: int, seen: float) -> None:
    """Of which some have nothing to read, where the window is much narrower than the canvas."""
    image, window = random_bytes(channels, 5, 40), round(seen * width)
    pixels, offsets = ops.pack_images([image])
    arguments = offsets, torch.tensor([whole(5, 40, 10, window)]), (12, width)
    mean, std = [0.1 * c for c in range(channels)], [1.0 + c for c in range(channels)]
    expected = ops.resize_images(pixels, *arguments, mean, std, impl="reference")
    found = library.resize_images(
        *(x.to(DEVICE) for x in (pixels, *arguments[:2])), (12, width), mean, std, torch.float32
    )
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_arguments_with_strides(impl: ops.Impl) -> None:
    batch = as_batch([random_bytes(3, 4, 5), random_bytes(3, 6, 2)], [whole(4, 5, 7, 8), whole(6, 2, 6, 9)], (7, 9))
    pixels, offsets = (x.repeat_interleave(2)[::2] for x in (batch.pixels, batch.offsets))
    views = batch.views.t().contiguous().t()
    assert torch.equal(batch._replace(pixels=pixels, offsets=offsets, views=views).resize(impl), batch.resize(impl))


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_an_image_of_one_colour_keeps_it(impl: ops.Impl) -> None:
    """And none is mixed with its neighbours in memory, nor with the zeros of the canvas."""
    found = [
        torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 9, 7) for colour in ((7, 0, 255), (1, 2, 3))
    ]
    batch = as_batch(found, [(9, 7, 20, 30, 3, 4, 11, 17), whole(9, 7, 4, 5)], (16, 24))
    resized, expected = batch.resize(impl), torch.zeros(2, 3, 16, 24)
    for target, image, (height, width) in zip(expected, found, ((11, 17), (4, 5)), strict=True):
        colour = image[:, :1, :1].double() / 255
        mean, std = (torch.tensor(x[:3], dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
        target[:, :height, :width] = (colour - mean) / std
    assert ((resized == 0) == (expected == 0)).all()
    torch.testing.assert_close(resized, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * 1 / min(STD[:3]))


HOSTILE = {
    "beyond the resized image": ((4, 6, 8, 6, 5, 4, 8, 9), (8, 9)),
    "before it": ((4, 6, 4, 12, -3, -40, 4, 12), (4, 12)),
    "beyond the canvas": ((4, 6, 30, 40, 0, 0, 30, 40), (12, 17)),
    "of a negative size": ((4, 6, 8, 12, 0, 0, -3, 12), (0, 0)),
    "of an image without rows": ((0, 6, 8, 12, 0, 0, 8, 12), (0, 0)),
    "of an image without columns": ((4, 0, 8, 12, 0, 0, 8, 12), (0, 0)),
    "of an image resized to nothing": ((4, 6, 0, 12, 0, 0, 8, 12), (0, 0)),
    "of an image turned around": ((4, 6, 8, -12, 0, 0, 8, 12), (0, 0)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_views_of_nothing(name: str) -> None:
    """As they may come on a GPU, where nobody looks: only the image is read, only its canvas is written."""
    view, shown = HOSTILE[name]
    image = random_bytes(3, 4, 6)
    neighbour = whole(4, 6, 12, 17)
    batch = as_batch([image, image, image], [neighbour, view, neighbour], (12, 17))
    tensors = batch.pixels, batch.offsets, batch.views
    arguments = batch.size, MEAN[:3], STD[:3], torch.float32
    expected = reference.resize_images(*tensors, *arguments)
    found = library.resize_images(*(x.to(DEVICE) for x in tensors), *arguments).cpu()
    assert torch.equal(found, expected)
    assert torch.equal(found[0], found[2])
    inside = found[1].ne(0).any(dim=0)
    height, width = shown
    assert inside[:height, :width].all()
    assert inside.sum() == height * width
    if name == "beyond the resized image":
        pixel = (image[:, -1, -1].double() / 255 - torch.tensor(MEAN[:3])) / torch.tensor(STD[:3])
        torch.testing.assert_close(found[1, :, 7, 8].double(), pixel, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_no_images(impl: ops.Impl) -> None:
    pixels, offsets = ops.pack_images([])
    views = torch.empty(0, 8, dtype=torch.int64)
    assert ops.resize_images(pixels, offsets, views, (8, 9), [0.5], [1.0], impl=impl).shape == (0, 1, 8, 9)


def test_no_bytes() -> None:
    """Views of nothing at all, which only a GPU accepts."""
    nothing = torch.empty(0, dtype=torch.uint8), torch.tensor([5]), torch.tensor([whole(0, 0, 4, 4)])
    for resize, device in ((reference.resize_images, "cpu"), (library.resize_images, DEVICE)):
        found = resize(*(x.to(device) for x in nothing), (4, 5), [0.5], [1.0], torch.float16)
        assert torch.equal(found.cpu(), torch.zeros(1, 1, 4, 5, dtype=torch.float16))


def test_shapes_do_not_depend_on_data() -> None:
    """Nothing is read from the GPU: fake tensors have nothing to read."""
    with FakeTensorMode(), torch.device("cuda"):
        pixels, offsets = torch.empty(999, dtype=torch.uint8), torch.empty(2, dtype=torch.int64)
        views = torch.empty(2, 8, dtype=torch.int64)
        for dtype in (*DTYPES, torch.float64):
            kernel = {} if dtype in DTYPES else {"triton": None}  # of float64 there is none, and none is called
            with patch.dict(IMPLEMENTATIONS["resize_images"], kernel):
                resized = ops.resize_images(pixels, offsets, views, (64, 96), MEAN, STD, dtype)
            assert (resized.shape, resized.dtype, resized.device.type) == ((2, 5, 64, 96), dtype, "cuda")
            assert resized.is_contiguous(memory_format=torch.channels_last)


def test_what_is_refused() -> None:
    pixels, offsets = ops.pack_images([random_bytes(3, 4, 5)] * 2)
    views = torch.tensor([whole(4, 5, 8, 10)] * 2)
    valid = {"pixels": pixels, "offsets": offsets, "views": views, "size": (8, 10), "mean": MEAN[:3], "std": STD[:3]}

    def view(**changed: int) -> Tensor:
        changed_views = views.clone()
        for field, value in changed.items():
            changed_views[1, getattr(layout, field)] = value
        return changed_views

    for error, message, options in (
        (TypeError, "pixels: expected torch.uint8", {"pixels": pixels.float()}),
        (TypeError, "views: expected torch.int64", {"views": views.float()}),
        (ValueError, r"views: expected shape \[\*, 8\]", {"views": views[:, 1:]}),
        (ValueError, r"offsets: expected shape \[2\]", {"offsets": offsets[:1]}),
        (ValueError, "size=", {"size": (0, 10)}),
        (ValueError, "mean, std: expected a number of each per channel, got 2 and 3", {"mean": MEAN[:2]}),
        (ValueError, "mean, std: expected", {"mean": [], "std": []}),
        (ValueError, "std=.*: expected no zeros", {"std": [1.0, 0.0, 1.0]}),
        (TypeError, "dtype=torch.int32: expected float32", {"dtype": torch.int32}),
        (TypeError, "dtype=torch.float64: expected float32", {"dtype": torch.float64, "impl": "triton"}),
        (ValueError, r"offsets\[0\]=-1: image 0", {"offsets": offsets - 1}),
        (ValueError, r"offsets\[1\]=61: image 1 has bytes up to 121, and there are 120", {"offsets": offsets + 1}),
        (ValueError, r"views\[1\]=.*: expected sizes of 1 or more", {"views": view(HEIGHT=0)}),
        (ValueError, r"views\[1\]=.*: expected sizes of 1 or more", {"views": view(RESIZED_WIDTH=0)}),
        (ValueError, r"views\[1\]=.*: expected sizes of 1 or more", {"views": view(WINDOW_HEIGHT=0)}),
        (ValueError, r"views\[1\]=.*: expected a window within", {"views": view(TOP=1)}),
        (ValueError, r"views\[1\]=.*: expected a window within", {"views": view(LEFT=-1, WINDOW_WIDTH=9)}),
        (ValueError, r"views\[0\]=.*: expected a window within .* canvas of \[8, 9\]", {"size": (8, 9)}),
    ):
        with pytest.raises(error, match=message):
            ops.resize_images(**cast(Any, valid | options))


@given(found=images(), layouts=st.lists(st.sampled_from(["planes", "pixels", "strided"]), min_size=3, max_size=3))
def test_packed_images(found: list[Tensor], layouts: list[str]) -> None:
    """Whatever their memory."""
    laid_out = []
    for image, name in zip(found, layouts, strict=False):
        if name == "pixels":
            image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        laid_out.append(image.repeat_interleave(2, dim=2)[..., ::2] if name == "strided" else image)
    pixels, offsets = ops.pack_images(laid_out)
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [sum(image.numel() for image in found[:i]) for i in range(len(found))]
    assert torch.equal(pixels, torch.cat([image.permute(1, 2, 0).flatten() for image in found]))


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"images\[1\]: expected shape \[3, \*, \*\], got \[1, 4, 5\]"):
        ops.pack_images([random_bytes(3, 4, 5), random_bytes(1, 4, 5)])
    with pytest.raises(ValueError, match=r"images\[0\]: expected shape"):
        ops.pack_images([random_bytes(4, 5)])
    with pytest.raises(TypeError, match=r"images\[0\]: expected torch.uint8"):
        ops.pack_images([torch.rand(3, 4, 5)])
