"""Writing files so that an interrupted write never leaves a broken one behind."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["json_list_writer", "write_atomically", "write_json"]


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Write a file beside its final place, then move it there in one step.

    Whoever reads ``path`` sees the old file or the whole new one, never a part, even after a crash or a power cut.
    If ``write`` fails or is interrupted, the old file stays as it was and nothing else is left in the folder.

    Args:
        path: the file to write. Missing parent folders are made.
        write: called with the path of a temporary file in the same folder (same suffix, so that writers which choose
            the format by suffix work); it must create and close that file.

    Returns:
        ``path``.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: the folder cannot be written to.
    """
    with _replacing(path) as temporary:
        write(temporary)
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as JSON with :func:`write_atomically`; returns ``path``."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file)

    return write_atomically(path, write)


@contextlib.contextmanager
def json_list_writer(path: str | os.PathLike[str], *, keep_on_error: bool = False) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list one record at a time, none of which is held in memory.

    Inside the ``with`` block the file grows beside its final place; it is moved there, whole, at the end of the block,
    as by :func:`write_atomically`.

    Args:
        path: the file to write: a JSON list with one record per line. Missing parent folders are made.
        keep_on_error: if the block fails or is interrupted, move the list of the records so far into place, too. By
            default the old file then stays as it was and nothing else is left in the folder.

    Yields:
        A function that appends a record. A record that JSON cannot express raises TypeError and is not written.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: the folder cannot be written to.
    """
    failure: BaseException | None = None
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        separator = "[\n"

        def append(record: Any) -> None:
            nonlocal separator
            # As text first: half a record would make the whole list unreadable.
            file.write(separator + json.dumps(record))
            separator = ",\n"

        try:
            yield append
        except BaseException as error:
            if not keep_on_error:
                raise
            failure = error
        file.write("[]\n" if separator == "[\n" else "\n]\n")
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields where to write; moved to `path` at the end of the block, removed if that fails."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must name a file, but {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder is the same file system, the only place from which os.replace is one step.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp{path.suffix}"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, and the file is whole either way."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
