import json
import os
import stat

import pytest

from fastmrcnn.files import write_atomically, write_json


def test_writes_the_file_and_nothing_else(tmp_path):
    path = write_atomically(tmp_path / "new" / "a.txt", lambda temporary: temporary.write_text("text"))
    assert path.read_text() == "text"
    assert os.listdir(path.parent) == ["a.txt"]


def test_the_temporary_file_lies_in_the_same_folder_with_the_same_suffix(tmp_path):
    seen = []
    write_atomically(tmp_path / "a.png", lambda temporary: (seen.append(temporary), temporary.write_bytes(b"x")))
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".png"
    assert seen[0].name != "a.png"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_write_that_fails_before_it_makes_a_file(tmp_path):
    def write(temporary):
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        write_atomically(tmp_path / "a.txt", write)
    assert os.listdir(tmp_path) == []


def test_the_old_file_is_whole_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_file_modes_are_those_of_an_ordinary_write(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "new", 1)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o640)
    write_json(tmp_path / "plain", 1)
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


def test_a_folder_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"):
        write_atomically(tmp_path, lambda temporary: pytest.fail("must not be called"))


def test_json(tmp_path):
    value = [{"a": 1.5, "b": "é"}]
    assert json.loads(write_json(tmp_path / "a.json", value).read_text(encoding="utf-8")) == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
