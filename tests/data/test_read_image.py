"""Images as bytes, and with other than three channels: bytes are those of `load_image`, to the bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastmrcnn.data import DataError, MissingImage, load_image, read_image

RGB = np.random.default_rng(0).integers(0, 256, (19, 31, 3)).astype(np.uint8)
RGB[4:12, 6:20] = [200, 30, 90]
GRAY, ALPHA, DEEP = RGB[..., 0], RGB[..., 1], RGB[..., 2].astype(np.uint16) * 257 - 100

PALETTE = Image.fromarray(RGB).quantize(9)
FILES = {
    "rgb.jpg": (Image.fromarray(RGB), {}),
    "thin.jpg": (Image.fromarray(RGB), {"subsampling": 0, "progressive": True}),
    "gray.jpg": (Image.fromarray(GRAY), {}),
    "inks.jpg": (Image.fromarray(np.dstack([RGB, GRAY]), "CMYK"), {}),
    "rgb.png": (Image.fromarray(RGB), {}),
    "gray.png": (Image.fromarray(GRAY), {}),
    "bits.png": (Image.fromarray(GRAY > 99), {}),
    "palette.png": (PALETTE, {}),
    "clear.png": (PALETTE, {"transparency": 3}),
    "rgba.png": (Image.fromarray(np.dstack([RGB, ALPHA])), {}),
    "la.png": (Image.fromarray(np.dstack([GRAY, ALPHA])), {}),
    "deep.png": (Image.fromarray(DEEP), {}),
    "real.tif": (Image.fromarray((GRAY / 255).astype(np.float32)), {}),
    "rgb.webp": (Image.fromarray(RGB), {}),
}


@pytest.fixture(params=FILES)
def path(tmp_path, request):
    image, options = FILES[request.param]
    image.save(tmp_path / request.param, **options)
    return tmp_path / request.param


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_are_load_images_rounded(path, channels):
    loaded, read = load_image(path, channels=channels), read_image(path, channels=channels)
    assert (loaded.dtype, read.dtype) == (torch.float32, torch.uint8)
    assert loaded.shape == read.shape == (channels, 19, 31)
    assert torch.equal(read, (loaded * 255).round().byte())
    assert read.permute(1, 2, 0).is_contiguous()
    read.zero_()  # it is the caller's own
    assert torch.equal(read_image(io.BytesIO(path.read_bytes()), channels=channels), (loaded * 255).round().byte())


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_bytes_are_turned_as_load_image_turns_them(tmp_path, tag, suffix):
    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path / f"i.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif)
    for size in (None, (19, 31), (31, 19) if tag > 4 else (19, 31)):
        assert torch.equal(read_image(path, size=size), (load_image(path, size=size) * 255).round().byte())
    for read in (load_image, read_image):
        with pytest.raises(DataError, match=r"declares 5x4"):
            read(path, size=(4, 5))


def test_what_channels_hold(tmp_path):
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    both = read_image(tmp_path / "rgba.png", channels=4)
    assert torch.equal(both.permute(1, 2, 0), torch.from_numpy(np.dstack([RGB, ALPHA])))
    luma = torch.from_numpy(RGB @ np.array([0.299, 0.587, 0.114]))
    assert (read_image(tmp_path / "rgba.png", channels=1)[0] - luma).abs().max() <= 0.501
    assert torch.equal(read_image(tmp_path / "gray.png", channels=1)[0], torch.from_numpy(GRAY))
    assert (read_image(tmp_path / "gray.png", channels=4)[3] == 255).all()
    deep = load_image(tmp_path / "deep.png", channels=4)
    torch.testing.assert_close(deep[:3], torch.from_numpy(DEEP / 65535).float().expand(3, -1, -1))
    assert (deep[3] == 1).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_arrays_have_any_number_of_channels(tmp_path, channels):
    array = np.random.default_rng(1).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    for order in "CF":
        np.save(tmp_path / "a.npy", np.asarray(array, order=order))
        read = read_image(tmp_path / "a.npy", size=(5, 7), channels=channels)
        assert torch.equal(read, torch.from_numpy(array).permute(2, 0, 1))
        loaded = load_image(tmp_path / "a.npy", channels=channels)
        assert torch.equal(loaded, read.float() / 255)
        assert loaded.is_contiguous()
    np.save(tmp_path / "flat.npy", array[..., 0])
    assert read_image(tmp_path / "flat.npy", channels=1).shape == (1, 5, 7)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"the array is uint8 \[4, 5, 2\]; accepted is uint8 \[height, width, 5\]"),
        (np.zeros((4, 5), np.uint8), r"the array is uint8 \[4, 5\]"),
        (np.zeros((4, 5, 5), np.float32), r"the array is float32 \[4, 5, 5\]"),
        (np.zeros((0, 5, 5), np.uint8), r"the array is uint8 \[0, 5, 5\]"),
        (np.zeros((5, 4, 5), np.uint8), r"the image is 4x5 \(width x height\), but its record declares 5x4"),
        (np.array([[[print]]]), r"not a readable image .*allow_pickle=False"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, says):
    np.save(tmp_path / "a.npy", array)
    for read in (load_image, read_image):
        with pytest.raises(DataError, match=rf"a\.npy: {says}"):
            read(tmp_path / "a.npy", size=(4, 5), channels=5)


def test_errors_name_the_file(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "i.png")
    np.save(tmp_path / "cut.npy", RGB)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-9])
    for read in (load_image, read_image):
        with pytest.raises(DataError, match=r"i\.png: image files are read with 1, 3 or 4 channels; 5 need a \.npy"):
            read(tmp_path / "i.png", channels=5)
        with pytest.raises(DataError, match=r"cut\.npy: not a readable image"):
            read(tmp_path / "cut.npy")
        with pytest.raises(MissingImage, match=r"none\.png: no such image"):
            read(tmp_path / "none.png")
