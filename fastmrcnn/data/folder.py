"""Where the images of a dataset are, and that they are inside its folder."""

import os
from pathlib import Path, PureWindowsPath
from typing import Any

from fastmrcnn.data.masks import shorten
from fastmrcnn.data.records import BadRecord
from fastmrcnn.data.types import MissingImage


class ImageFolder:
    """Finds files below a folder: one listing per directory instead of one system call per file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._resolved = root.resolve()
        self._listings: dict[str, dict[str, bool]] = {}

    def find(self, file_name: Any) -> str:
        """Path of `file_name` relative to the folder; separators may be / or \\.

        Raises:
            BadRecord: it is no file name, leads out of the folder (also through a link), or is not there.
        """
        if not isinstance(file_name, str) or not file_name:
            raise BadRecord("image record", f"file_name must be a non-empty string, got {shorten(file_name)}")
        parent, name = "", file_name
        if "/" in file_name or "\\" in file_name or ":" in file_name or file_name == "..":
            # Windows rules know both separators, drives and shares: what they call relative is so everywhere.
            path = PureWindowsPath(file_name)
            if path.anchor or ".." in path.parts:
                raise self._escapes(file_name)
            parent, name = os.path.join(*path.parts[:-1]) if path.parts[1:] else "", path.name
        if parent not in self._listings:
            self._listings[parent] = self._list(parent, file_name)
        is_link = self._listings[parent].get(name)
        relative = os.path.join(parent, name)
        # A name not listed may still be there: some file systems ignore case or Unicode form.
        if is_link is None and (not name or "\0" in name or not (self.root / relative).is_file()):
            raise BadRecord("missing image", f"file_name {file_name!r}: no such file in {self.root}", MissingImage)
        if is_link and not self._contains(self.root / relative):
            raise self._escapes(file_name)
        return relative

    def _list(self, parent: str, file_name: str) -> dict[str, bool]:
        try:
            if not self._contains(self.root / parent):
                raise self._escapes(file_name)
            with os.scandir(self.root / parent) as entries:
                return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except (OSError, ValueError):  # no such folder, or a name no file can have
            return {}

    def _contains(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._resolved)

    def _escapes(self, file_name: str) -> BadRecord:
        what = (
            f"file_name {file_name!r} leads out of {self.root}; accepted are paths relative to it, to files inside it"
        )
        return BadRecord("image outside the folder", what)
