"""Writing files so that an interrupted write never leaves a broken one behind."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_atomically", "write_json"]


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
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must name a file, but {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder is the same file system, the only place from which os.replace is one step.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp{path.suffix}"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as JSON with :func:`write_atomically`; returns ``path``."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file)

    return write_atomically(path, write)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, and the file is whole either way."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
