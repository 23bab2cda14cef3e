"""Pickles of arrays are read, and of others nothing is executed."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmrcnn.checkpoints.pickles import NAMES, load_pickle

CONTENT: dict[str, Any] = {
    "model": OrderedDict(
        weight=np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        columns=np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        swapped=np.arange(3, dtype=">f8"),
        count=np.array(7),
        empty=np.zeros((0, 4), np.int64),
        scalar=np.float32(0.5),
        flags=np.array([True, False]),
    ),
    "__author__": "Someone",
    "matching_heuristics": True,
    "numbers": [1, 2.5, None, ("ä", b"\xff", b"")],
}


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_texts(protocol: int, tmp_path: Path) -> None:
    found = load_pickle(written(tmp_path, pickle.dumps(CONTENT, protocol=protocol)))
    assert list(found) == list(CONTENT)
    for name, value in CONTENT["model"].items():
        assert np.array_equal(found["model"][name], value), name
        assert found["model"][name].dtype == value.dtype.newbyteorder("=")
        assert found["model"][name].shape == value.shape
    assert [found[name] for name in list(CONTENT)[1:]] == [CONTENT[name] for name in list(CONTENT)[1:]]
    found["model"]["weight"] += 1  # it is its own


def test_pickles_of_python_2(tmp_path: Path) -> None:
    """Bytes are texts there."""
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    data = b"(dS'conv1_w'\n" + array + b"(I1\n(I2\nt" + dtype + b"I00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00\\xc0'\ntbs."
    assert load_pickle(written(tmp_path, data))["conv1_w"].tolist() == [1.0, -2.0]


class Calls:
    """A pickle that calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (subprocess.Popen, "Popen"), (getattr, "getattr"), (bytes, "bytes")],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_executed(function: Any, name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    arguments = (f"touch {mark}",) if name != "getattr" else (mark, "touch")
    content = pickle.dumps({"model": Calls(function, *arguments)}, protocol=protocol)
    with pytest.raises(ValueError, match=rf"model\.pkl is no file of arrays and texts \(it .*{name}"):
        load_pickle(written(tmp_path, content))
    assert not mark.exists()


def of_array(shape: tuple[int, ...], data: bytes, dtype: str = "f4") -> bytes:
    """A pickle of an array that says so of itself."""
    from numpy._core.multiarray import _reconstruct

    class Array:
        def __reduce__(self) -> Any:
            return _reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, data)

    return pickle.dumps(Array())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (of_array((1 << 40,), b"1234"), "4 bytes for an array of"),
        (of_array((1 << 40, 0, 3), b"1234"), "4 bytes for an array of"),
        (of_array((-1,), b"1234"), "none of numbers"),
        (pickle.dumps(np.array([object], dtype=object)), "array of 'O8': expected numbers"),
        (pickle.dumps(np.array(["a"])), "array of 'U1': expected numbers"),
        (pickle.dumps(np.zeros(2, dtype="f4,i4")), "expected numbers"),
        (pickle.dumps(np.ma.zeros(2)), "it names numpy"),
        (b"", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"no pickle at all", "model.pkl is"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00", "model.pkl is"),  # bytes of a length beyond all memory
        (b"\x80\x02Nr\xff\xff\xff\xff0.", "damaged"),  # number 4294967295 of the memo
        (b"(" * 100_000 + b"l" * 100_000 + b".", "damaged|model.pkl is"),
    ],
)
def test_what_is_not_read(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_pickle(written(tmp_path, content))


@pytest.mark.parametrize("name", ["cnumpy.core.multiarray\nscalar", "c_codecs\nencode", "ccollections\nOrderedDict"])
def test_what_stands_for_names_stays_as_it_is(name: str, tmp_path: Path) -> None:
    """A state can be attributes, which `BUILD` sets."""
    before = [dict(vars(known)) for known in NAMES.values()]
    for state in (b"(dS'mark'\nI1\ns", b"(N(dS'__defaults__'\n(I1\ntst"):
        with pytest.raises(ValueError, match="it sets attributes of something"):
            load_pickle(written(tmp_path, name.encode() + b"\n" + state + b"b."))
    assert [dict(vars(known)) for known in NAMES.values()] == before


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no damage."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(f"no permission: {path}")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    path = tmp_path / "model.pkl"
    path.touch()
    with pytest.raises(PermissionError, match="no permission"):
        load_pickle(path)


def test_truncated_files(tmp_path: Path) -> None:
    whole = pickle.dumps(CONTENT, protocol=2)
    for length in range(0, len(whole), 7):
        with pytest.raises(ValueError, match=r"checkpoint: .*model\.pkl"):
            load_pickle(written(tmp_path, whole[:length]))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pkl"):
        load_pickle(tmp_path / "none.pkl")
