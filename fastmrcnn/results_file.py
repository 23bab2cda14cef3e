"""The COCO results file of an evaluation, written while it runs, by one process or several."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

from fastmrcnn.distributed import all_gather, rank
from fastmrcnn.distributed import world_size as count_processes
from fastmrcnn.files import json_list_writer

__all__ = ["results_writer"]

# Images per process that travel at once: some megabytes at a hundred masks per image.
_CHUNK = 16

Write = Callable[[Sequence[dict[str, Any]]], None]


@contextlib.contextmanager
def results_writer(path: str | os.PathLike[str] | None) -> Iterator[Write]:
    """Write COCO results to a JSON file, image by image; it appears at the end of the block, and not after an error.

    Of several processes, each is to call what is yielded once per item of its share of a dataset, in which item ``i``
    belongs to rank ``i % world_size``. Each keeps its records in a temporary file, and at the end rank 0 puts them
    together: the file is then the same as of one process, and an image that several ranks had is in it once.

    Args:
        path: the file; None writes nothing.

    Yields:
        A function that takes the records of one image, none if nothing was found or the image was seen before.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    if path is None:
        yield lambda records: None
    elif count_processes() == 1:
        with json_list_writer(path) as append:
            yield lambda records: _append_all(append, records)
    else:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as lines:
            yield lambda records: _append_line(lines, records)
            lines.seek(0)
            with json_list_writer(path) if rank() == 0 else contextlib.nullcontext(lambda record: None) as append:
                _interleave(lines, append)


def _append_all(append: Callable[[Any], None], records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        append(record)


def _append_line(file: Any, records: Sequence[dict[str, Any]]) -> None:
    file.write(json.dumps(list(records)) + "\n")


def _interleave(lines: Iterator[str], append: Callable[[Any], None]) -> None:
    """Pass on the records of all processes, in the order of the dataset, those of an image once."""
    seen: set[int] = set()
    # All processes go round together until none has a line left.
    while any(chunks := all_gather(list(islice(lines, _CHUNK)))):
        if rank() > 0:
            continue
        for line in (line for item in zip_longest(*chunks, fillvalue="[]") for line in item):
            records = json.loads(line)
            if records and records[0]["image_id"] not in seen:
                seen.add(records[0]["image_id"])
                _append_all(append, records)
