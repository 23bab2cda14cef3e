"""Pickles of other libraries, of which nothing is executed: arrays, numbers, texts, lists and dicts.

A pickle is a program that names functions and calls them.  Here a name is looked up in a table, whose entries build
arrays from bytes that are there, and nothing else; any other name is an error.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

KINDS = "biuf"
"""Of numbers that arrays may hold: bool, integers, floats."""


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """What a pickle of any protocol holds, arrays as NumPy's; texts of Python 2 are read as latin1.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: the file is damaged, or names something that is no array; nothing of it has been executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    data = io.BytesIO(path.read_bytes())  # of which no more can be read than there is, whatever length it claims
    try:
        return _content(_Unpickler(data, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint: {path} is no file of arrays and texts ({error})") from error
    except Exception as error:  # of any kind: damage shows in many ways
        raise ValueError(f"checkpoint: {path} is damaged ({type(error).__name__}: {error})") from error


class _Type:
    """What `numpy.dtype` is while a pickle is read: of numbers only."""

    def __init__(self, name: object = None, align: object = False, copy: object = True) -> None:
        if not isinstance(name, str) or np.dtype(name).kind not in KINDS:
            raise pickle.UnpicklingError(f"it has an array of {name!r}: expected numbers")
        self.value = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """What `numpy.ndarray` is while a pickle is read: it has its memory once its bytes are there."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    """An array of its own of the numbers in `data`, which has to have as many bytes as the shape says."""
    if not isinstance(dtype, _Type) or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise pickle.UnpicklingError("it has an array that is none of numbers")
    if isinstance(data, str):
        data = data.encode("latin1")  # as Python 2 wrote it
    if math.prod(shape) * dtype.value.itemsize != len(data):
        raise pickle.UnpicklingError(f"it has {len(data)} bytes for an array of {list(shape)} {dtype.value}")
    native = dtype.value.newbyteorder("=")
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C").astype(native)


def _reconstruct(kind: object, shape: object, dtype: object) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("it has an array of a class of its own")
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, which Python 3 writes as text in the protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes encoded as {encoding}")
    return text.encode("latin1")


def _empty(*none: object) -> bytes:
    """No bytes, likewise."""
    if none:
        raise pickle.UnpicklingError("it makes bytes of something")
    return b""


NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty,
    ("__builtin__", "bytes"): _empty,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
}
"""What a pickle may name, by module and name, and what stands for it."""


def _build(reader: Any) -> None:
    """Give an object its state: one of ours alone, or it would be set in a function or class of the table."""
    if not isinstance(reader.stack[-2], _Type | _Array):
        raise pickle.UnpicklingError("it sets attributes of something")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](reader)


class _Unpickler(pickle._Unpickler):
    """Python's own in Python: that in C takes the memory that a hostile index of its memo asks for."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not called")
        return NAMES[module, name]

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {pickle.BUILD[0]: _build}


def _content(value: Any) -> Any:
    """`value` with arrays in the place of what stood for them."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {_content(key): _content(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_content(x) for x in value])
    return value
