"""Reading a COCO annotation file and checking each of its records."""

import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

from fastmrcnn.data.images import MAX_PIXELS
from fastmrcnn.data.masks import check_segmentation, shorten, total_pixels
from fastmrcnn.data.types import DataError, MissingFile

Record: TypeAlias = dict[str, Any]

# COCO's boxes are rounded, so they may poke out of the image by this many pixels; they are clipped when read.
BOX_SLACK = 2.0
# In pixels. Thinner boxes lose their area to float32 rounding.
MIN_BOX_SIDE = 1e-3


class BadRecord(Exception):
    """One record is unusable. `kind` is what it is counted under, the text what is wrong and what is accepted."""

    def __init__(self, kind: str, what: str, error: type[DataError] = DataError) -> None:
        super().__init__(what)
        self.kind = kind
        self.error = error


class Skipped:
    """Bad records: raised at once, or counted and summarised in one warning."""

    def __init__(self, file: Path, on_error: str) -> None:
        self.file = file
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, where: str, bad: BadRecord) -> None:
        """Record `bad`, found at `where` in the file.

        Raises:
            DataError: `on_error` is "raise".
        """
        message = f"{self.file}: {where}: {bad}"
        if self.on_error == "raise":
            raise bad.error(message)
        self.counts[bad.kind] += 1
        self._first.setdefault(bad.kind, message)

    def warn(self) -> None:
        """Issue the one warning with the count and the first example of each kind; none if nothing was skipped."""
        if self.counts:
            lines = [f"  {count} x {kind}, first: {self._first[kind]}" for kind, count in self.counts.items()]
            warnings.warn(
                f"{self.file}: skipped {self.counts.total()} records\n" + "\n".join(lines), UserWarning, stacklevel=3
            )


def read_coco(path: Path) -> dict[str, Any]:
    """Parse a COCO annotation file and check its structure: the three lists, their ids, the categories.

    Raises:
        MissingFile: there is no such file.
        DataError: it is not JSON or not COCO.
    """
    try:
        coco = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: no such annotation file; accepted is a COCO JSON") from error
    except OSError as error:
        raise DataError(f"{path}: the annotation file cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(coco, dict):
        raise DataError(
            f"{path}: not a COCO annotation file: the top level is a {type(coco).__name__}, accepted is an object with "
            f'"images", "annotations" and "categories"'
        )
    for key in ("images", "annotations", "categories"):
        records = coco.get(key)
        if not isinstance(records, list):
            found = "missing" if key not in coco else f"a {type(records).__name__}"
            raise DataError(f'{path}: not a COCO annotation file: "{key}" is {found}; accepted is a list of objects')
        _check_ids(path, key, records)
    _check_categories(path, coco["categories"])
    return coco


def _check_ids(path: Path, key: str, records: list[Any]) -> None:
    positions: dict[int, int] = {}
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}: {key}[{position}] is {shorten(record)}; accepted is an object")
        record_id = record.get("id")
        if type(record_id) is int and positions.setdefault(record_id, position) != position:
            raise DataError(
                f"{path}: {key}[{positions[record_id]}] and {key}[{position}] have the same id {record_id}; "
                "ids must be unique"
            )


def _check_categories(path: Path, categories: list[Record]) -> None:
    if not categories:
        raise DataError(f'{path}: "categories" is empty; at least one is needed')
    for position, category in enumerate(categories):
        where = f"{path}: categories[{position}] (id {category.get('id')!r})"
        if type(category.get("id")) is not int:
            raise DataError(f"{where}: the id must be an integer")
        if not isinstance(category.get("name"), str):
            raise DataError(f"{where}: the name must be a string, got {shorten(category.get('name'))}")
        names = category.get("keypoints", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: keypoints must be a list of names, got {shorten(names)}")


def check_image(image: Record) -> None:
    """Check id and size of an image record.

    Raises:
        BadRecord: they are not integers, or no image can have that size.
    """
    if type(image.get("id")) is not int:
        raise BadRecord("image record", f"the id must be an integer, got {shorten(image.get('id'))}")
    height, width = image.get("height"), image.get("width")
    if type(height) is not int or type(width) is not int or height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise BadRecord(
            "image record",
            f"height {shorten(height)} and width {shorten(width)} must be positive integers, "
            f"{MAX_PIXELS:,} pixels at most",
        )


class AnnotationChecker:
    """Checks annotations against the images and categories they refer to."""

    def __init__(
        self, annotations: list[Record], sizes: dict[int, tuple[int, int]], category_ids: list[int], *, masks: bool
    ) -> None:
        self.sizes = sizes
        self.category_ids = frozenset(category_ids)
        self.masks = masks
        self._totals = _compressed_totals(annotations) if masks else {}

    def check(self, position: int, annotation: Record) -> None:
        """Check all of `annotation`, the record at `position`, but its keypoints.

        Raises:
            BadRecord: something in it is unusable.
        """
        if type(annotation.get("id")) is not int:
            raise BadRecord("annotation record", f"the id must be an integer, got {shorten(annotation.get('id'))}")
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if type(image_id) is not int or image_id not in self.sizes:
            raise BadRecord("unknown image", f'image_id {shorten(image_id)} is not the id of any of "images"')
        if type(category_id) is not int or category_id not in self.category_ids:
            accepted = shorten(sorted(self.category_ids))
            raise BadRecord(
                "unknown category", f"category_id {shorten(category_id)} is not a category; there are {accepted}"
            )
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise BadRecord("annotation record", f"iscrowd must be 0 or 1, got {shorten(annotation['iscrowd'])}")
        if "area" in annotation and not (_all_finite([annotation["area"]]) and annotation["area"] >= 0):
            raise BadRecord("annotation record", f"area must be a number from 0, got {shorten(annotation['area'])}")
        height, width = self.sizes[image_id]
        check_box(annotation.get("bbox"), height, width)
        if self.masks:
            problem = check_segmentation(annotation.get("segmentation"), height, width, self._totals.get(position))
            if problem == "has no segmentation":
                problem += "; a data set of boxes only is read with masks=False"
            if problem:
                raise BadRecord("segmentation", problem)


def _compressed_totals(annotations: list[Record]) -> dict[int, int]:
    compressed = {}
    for position, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
            compressed[position] = segmentation["counts"]
    return dict(zip(compressed, total_pixels(list(compressed.values())), strict=True))


def check_box(box: Any, height: int, width: int) -> None:
    """Check a COCO box, x, y, width, height in pixels, against an image of height x width.

    Raises:
        BadRecord: it is not four finite numbers, has no area, or leaves the image by more than `BOX_SLACK`.
    """
    if not isinstance(box, list) or len(box) != 4 or not _all_finite(box):
        raise BadRecord("box", f"bbox must be [x, y, width, height], four finite numbers, got {shorten(box)}")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise BadRecord("box", f"bbox {box} must have a positive width and height")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if max(left - x, top - y, x + w - right, y + h - bottom) > BOX_SLACK:
        raise BadRecord(
            "box", f"bbox {box} leaves the image ({width}x{height}, width x height) by more than {BOX_SLACK:g} pixels"
        )
    if min(right - left, bottom - top) < MIN_BOX_SIDE:
        raise BadRecord(
            "box", f"bbox {box} is thinner than {MIN_BOX_SIDE:g} pixels inside the image ({width}x{height})"
        )


def check_keypoints(keypoints: Any, num_keypoints: int) -> None:
    """Check x, y, visibility of K keypoints.

    Raises:
        BadRecord: they are not 3K finite numbers with visibilities 0, 1 or 2.
    """
    if not isinstance(keypoints, list) or len(keypoints) != 3 * num_keypoints or not _all_finite(keypoints):
        given = f"{len(keypoints)} values" if isinstance(keypoints, list) else "no list"
        raise BadRecord(
            "keypoints",
            f"keypoints must be {num_keypoints} x (x, y, visibility), {3 * num_keypoints} finite numbers, "
            f"got {given}: {shorten(keypoints)}",
        )
    if not {0, 1, 2}.issuperset(keypoints[2::3]):
        raise BadRecord("keypoints", f"keypoint visibilities must be 0, 1 or 2, got {shorten(keypoints[2::3])}")


def _all_finite(values: list[Any]) -> bool:
    try:
        # The sum is not finite if a value is not, and takes one call instead of one for each.
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):  # not numbers, or an integer that no float holds
        return False
