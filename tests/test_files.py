import json
import os
import stat

import pytest

from fastmrcnn.files import json_list_writer, write_atomically, write_json


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


RECORDS = [{"a": 1.5, "b": "é"}, {"a": [1, 2]}, {"a": None}]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_is_written_record_by_record(tmp_path, count):
    path = tmp_path / "new" / "a.json"
    with json_list_writer(path) as append:
        for record in RECORDS[:count]:
            append(record)
            assert not path.exists()
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == RECORDS[:count]
    assert len(text.splitlines()) == (count + 2 if count else 1)
    assert os.listdir(path.parent) == ["a.json"]


def test_a_list_goes_to_disk_while_it_is_written(tmp_path):
    with json_list_writer(tmp_path / "a.json") as append:
        for _ in range(1000):
            append("x" * 1000)
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_size > 900_000


def write_list(path, records, error=None, **options):
    with json_list_writer(path, **options) as append:
        for record in records:
            append(record)
        if error:
            raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_list_leaves_the_old_file_or_what_was_done(tmp_path, error):
    path = write_json(tmp_path / "a.json", "old")
    with pytest.raises(error):
        write_list(path, RECORDS, error)
    assert json.loads(path.read_text(encoding="utf-8")) == "old"
    with pytest.raises(error):
        write_list(path, RECORDS, error, keep_on_error=True)
    assert json.loads(path.read_text(encoding="utf-8")) == RECORDS
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_record_that_is_no_json_is_not_half_in_the_list(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(TypeError):
        write_list(path, [RECORDS[0], {"a": 1, "b": object()}], keep_on_error=True)
    assert json.loads(path.read_text(encoding="utf-8")) == RECORDS[:1]
    with json_list_writer(path) as append:
        with pytest.raises(TypeError):
            append(object())
        append(1)
    assert json.loads(path.read_text(encoding="utf-8")) == [1]


def test_a_list_in_place_of_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"), json_list_writer(tmp_path):
        pytest.fail("must not be entered")
