import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastmrcnn.data import DataError, MissingImage, image_files, load_image

GRAY = np.array([[0, 51, 255], [102, 204, 1]], np.uint8)
RGB = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def expect(path, values, scale=255):
    """`values` [H,W] or [H,W,3] before scaling."""
    values = np.asarray(values)
    if values.ndim == 2:
        values = np.stack([values] * 3, axis=-1)
    image = load_image(path)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    torch.testing.assert_close(image, torch.from_numpy(values.transpose(2, 0, 1) / scale).float(), rtol=0, atol=1e-7)


def png_16_bit(values):
    """A 16-bit grayscale PNG, byte by byte: what Pillow writes for int32 arrays differs between its versions."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_gray_and_rgb(tmp_path):
    expect(saved(tmp_path, Image.fromarray(GRAY)), GRAY)
    expect(saved(tmp_path, Image.fromarray(RGB)), RGB)
    expect(str(saved(tmp_path, Image.fromarray(RGB), "i.bmp")), RGB)


def test_one_bit(tmp_path):
    bits = GRAY > 100
    expect(saved(tmp_path, Image.fromarray(bits)), bits * 255)


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
@pytest.mark.filterwarnings("error")
def test_palette_with_and_without_transparency(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    options = {} if transparency is None else {"transparency": transparency}
    expect(saved(tmp_path, image, **options), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])


def test_alpha_is_dropped_not_composited(tmp_path):
    alpha = np.array([[0, 10, 255], [0, 0, 128]], np.uint8)
    expect(saved(tmp_path, Image.fromarray(np.dstack([RGB, alpha]))), RGB)
    expect(saved(tmp_path, Image.fromarray(np.dstack([GRAY, alpha]))), GRAY)


def test_cmyk(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    path = saved(tmp_path, Image.fromarray(inks, "CMYK"), "i.tif")
    expect(path, [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]])


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256], [40000, 65534, 65535]], np.uint16)
    png = tmp_path / "i.png"
    png.write_bytes(png_16_bit(values))
    expect(png, values, 65535)
    expect(saved(tmp_path, Image.fromarray(values), "little.tif"), values, 65535)
    expect(saved(tmp_path, Image.fromarray(values.astype(">u2")), "big.tif"), values, 65535)
    expect(saved(tmp_path, Image.fromarray(values.astype(np.int32)), "mode_i.tif"), values, 65535)


def test_values_outside_the_range_of_their_mode_are_refused(tmp_path):
    wide = saved(tmp_path, Image.fromarray(np.array([[-3, 70000]], np.int32)), "wide.tif")
    with pytest.raises(DataError, match=r"wide.tif.*-3 to 70000.*0 to 65535"):
        load_image(wide)
    expect(saved(tmp_path, Image.fromarray(np.array([[0.25, 1.0]], np.float32)), "f.tif"), [[0.25, 1.0]], 1)
    for name, bad in (("nan.tif", np.nan), ("large.tif", 7.0)):
        path = saved(tmp_path, Image.fromarray(np.array([[0.5, bad]], np.float32)), name)
        with pytest.raises(DataError, match=rf"{name}.*accepted are 0 to 1"):
            load_image(path)


# What the eight tags mean, as the upright pixels of a stored [[1, 2, 3], [4, 5, 6]].
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}
STORED = np.array(UPRIGHT[1], np.uint8) * 40


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("tag", UPRIGHT)
def test_exif_orientation(tmp_path, tag, suffix):
    exif = Image.Exif()
    exif[0x0112] = tag
    path = saved(tmp_path, Image.fromarray(STORED), f"i.{suffix}", exif=exif)
    upright = torch.tensor(UPRIGHT[tag]) * 40

    def levels(**options):
        return (load_image(path, **options)[0] * 255).round().long()

    assert torch.equal(levels(), upright)
    assert torch.equal(levels(size=tuple(upright.shape)), upright)
    assert torch.equal(levels(size=(2, 3)), upright if tag < 5 else torch.from_numpy(STORED).long())
    if tag >= 5:
        with pytest.raises(DataError, match=r"i\.\w+: .*2x3 .*, or 3x2 without.*declares 5x4"):
            load_image(path, size=(4, 5))
    else:
        with pytest.raises(DataError, match=r"i\.\w+: .*3x2 .*declares 2x3"):
            load_image(path, size=(3, 2))


def test_unknown_orientation_and_16_bit_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    expect(saved(tmp_path, Image.fromarray(STORED), exif=exif), STORED)
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(png_16_bit(STORED.astype(np.uint16) * 100)))
    expect(saved(tmp_path, image, exif=exif), np.array(UPRIGHT[6]) * 4000, 65535)


def test_streams():
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "PNG")
    stream.seek(0)
    expect(stream, RGB)
    with pytest.raises(DataError, match="image stream"):
        load_image(io.BytesIO(b"nothing"))


def test_unreadable_files_are_named(tmp_path):
    whole = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "w.jpg")
    for name, content in [("cut.jpg", whole.read_bytes()[:900]), ("text.png", b"hello"), ("empty.png", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: not a readable image"):
            load_image(tmp_path / name)
    with pytest.raises(DataError, match=str(tmp_path)):
        load_image(tmp_path)
    with pytest.raises(MissingImage, match=r"none.png: no such image"):
        load_image(tmp_path / "none.png")
    assert issubclass(MissingImage, DataError)
    assert issubclass(MissingImage, FileNotFoundError)


def test_decompression_bomb_is_refused_unread(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    start = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + start + data)
    with pytest.raises(DataError, match=r"bomb.png.*3600000000 pixels.*accepted"):
        load_image(tmp_path / "bomb.png")


def test_image_files(tmp_path):
    for name in ["b.JPG", "a/c.png", "a.png", "notes.txt", "._a.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = image_files(tmp_path)
    assert found == sorted(found)
    assert {path.relative_to(tmp_path).as_posix() for path in found} == {"b.JPG", "a/c.png", "a.png"}
    assert image_files(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no images.*\.png"):
        image_files(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="gone"):
        image_files(tmp_path / "gone")
