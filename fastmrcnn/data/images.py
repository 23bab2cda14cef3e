"""Image files to tensors: every mode Pillow reads, 16-bit grayscale and EXIF orientation included."""

import io
import os
import warnings
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from fastmrcnn.data.types import DataError, MissingFile, MissingImage

ImageSource: TypeAlias = str | os.PathLike[str] | IO[bytes]

# The most pixels Pillow opens (twice its warning level); no record may declare more either.
MAX_PIXELS = 178_956_970

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif")
)

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_NPY = b"\x93NUMPY"

_T = Image.Transpose
# EXIF orientation -> the transposition that puts the stored pixels upright.
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}
_INVERSE = {_T.ROTATE_90: _T.ROTATE_270, _T.ROTATE_270: _T.ROTATE_90}


def load_image(source: ImageSource, *, size: tuple[int, int] | None = None, channels: int = 3) -> Tensor:
    """Read an image as float32 [channels, H, W] in 0..1, RGB if there are 3.

    Gray images repeat their channel. An alpha channel is dropped, not composited: the colour stored under a
    transparent pixel is what comes back. 16-bit grayscale is divided by 65535, all else ends up 8-bit and is divided
    by 255. Of an animation or a multi-page file the first frame is read.

    The EXIF orientation is applied. With `size` = (height, width), the size the annotations were made for, it is
    applied if that gives `size`, and left alone if only the stored pixels have that size.

    Args:
        source: path or stream of a file that Pillow reads, or of a NumPy array (`.npy`), uint8 [H, W, channels].
        size: see above.
        channels: 1 for gray, 3 for RGB, 4 for RGB and alpha (1 where a file has none); arrays may have any number.

    Raises:
        MissingImage: there is no such file.
        DataError: it is not an image, is truncated, has too many pixels, or does not have `size` or `channels`.
    """
    return torch.from_numpy(_planes(_read(source, size, channels)))


def read_image(source: ImageSource, *, size: tuple[int, int] | None = None, channels: int = 3) -> Tensor:
    """Read an image as uint8 [channels, H, W]: `load_image` times 255, rounded, in a fraction of its time.

    The channels of a pixel lie side by side in memory, as files hold them.

    Raises:
        MissingImage, DataError: see `load_image`.
    """
    values = _read(source, size, channels)
    if values.dtype != np.uint8:
        values = (values * np.float32(255)).round().astype(np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1)


def _read(source: ImageSource, size: tuple[int, int] | None, channels: int) -> NDArray[Any]:
    """An image upright as `to_values` has it."""
    name = _name_of(source)
    try:
        # From memory: given a path, Pillow maps uncompressed TIFFs and then garbles those that are to be turned.
        content = Path(source).read_bytes() if isinstance(source, str | os.PathLike) else source.read()
        if content.startswith(_NPY):
            return _array(content, size, channels, name)
        with Image.open(io.BytesIO(content)) as image:
            tag = _orientation(image)
            image.load()
            return to_values(_orient(image, tag, size, name), name, channels)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise MissingImage(f"{name}: no such image file") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}; images of up to {MAX_PIXELS:,} pixels are accepted") from error
    # Pillow's decoders meet corrupt bytes with OSError, SyntaxError, ValueError, struct.error, IndexError and more.
    except Exception as error:
        detail = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{name}: not a readable image ({detail}); accepted is any complete file Pillow opens, or a .npy array"
        ) from error


def _array(content: bytes, size: tuple[int, int] | None, channels: int, name: str) -> NDArray[np.uint8]:
    """The array of a `.npy` file, [H, W, channels]."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        raise DataError(
            f"{name}: the array is {array.dtype} {list(array.shape)}; accepted is uint8 [height, width, {channels}]"
        )
    if size is not None and pixels.shape[:2] != tuple(size):
        raise DataError(
            f"{name}: the image is {pixels.shape[1]}x{pixels.shape[0]} (width x height), "
            f"but its record declares {size[1]}x{size[0]}; they must be equal"
        )
    return pixels


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """`path` itself if it is a file, else all image files below that folder, sorted. Hidden files are left out.

    Raises:
        MissingFile: there is no such path.
        DataError: the folder holds no image.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingFile(f"{path}: no such file or folder; accepted is an image or a folder of images")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise DataError(
            f"{path}: no images below this folder; accepted suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files


def _name_of(source: ImageSource) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    return str(getattr(source, "name", "<image stream>"))


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    # A camera's broken EXIF block says nothing about its pixels: read as no tag, as other readers do.
    except Exception:
        return 1
    return tag if tag in _UPRIGHT else 1


def _orient(image: Image.Image, tag: int, size: tuple[int, int] | None, name: str) -> Image.Image:
    """Loaded image and the tag it had before loading -> the image upright, or as stored if only that has `size`."""
    if tag == 1:
        upright = stored = image
    elif _orientation(image) == 1:  # Pillow itself turns TIFF upright on loading, and then forgets the tag.
        upright, stored = image, image.transpose(_INVERSE.get(_UPRIGHT[tag], _UPRIGHT[tag]))
    else:
        upright, stored = image.transpose(_UPRIGHT[tag]), image
    if size is None or upright.size == (size[1], size[0]):
        return upright
    if stored.size == (size[1], size[0]):
        return stored
    turned = f", or {stored.width}x{stored.height} without its EXIF orientation" if stored.size != upright.size else ""
    raise DataError(
        f"{name}: the image is {upright.width}x{upright.height} (width x height){turned}, "
        f"but its record declares {size[1]}x{size[0]}; they must be equal"
    )


def to_array(image: Image.Image, name: str, channels: int = 3) -> NDArray[np.float32]:
    """Float32 [channels,H,W] in 0..1, C-contiguous, of a Pillow image as it is stored; `name` is for messages."""
    return _planes(to_values(image, name, channels))


def to_values(image: Image.Image, name: str, channels: int) -> NDArray[Any]:
    """A Pillow image as it is stored, [H, W, channels]: uint8, or float32 in 0..1 if it has more than 8 bits."""
    if channels not in _MODES:
        raise DataError(f"{name}: image files are read with 1, 3 or 4 channels; {channels} need a .npy array")
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.asarray(image)
        top = 1.0 if image.mode == "F" else 65535.0
        # `not (...)` so that NaN is refused as well.
        if not (gray.min() >= 0 and gray.max() <= top):
            raise DataError(
                f"{name}: values {gray.min()} to {gray.max()} in Pillow mode {image.mode}; "
                f"accepted are 0 to {top:g} in this mode"
            )
        values = np.repeat((gray.astype(np.float32) / np.float32(top))[..., None], channels, axis=2)
        values[..., 3:] = 1  # opaque
        return values
    if image.mode in ("P", "PA"):  # through RGBA: palettes with transparency otherwise warn on every read
        image = image.convert("RGBA")
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    values = np.array(image)
    return values[..., None] if channels == 1 else values


def _planes(values: NDArray[Any]) -> NDArray[np.float32]:
    """What `to_values` returns as float32 [channels, H, W] in 0..1, C-contiguous."""
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    return planes if planes.dtype == np.float32 else planes.astype(np.float32) / np.float32(255)
