"""Find objects in images: a picture with the detections per image, and all of them as one COCO results file."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmrcnn.coco_records import detections_to_coco, load_json, match_categories
from fastmrcnn.data import image_files
from fastmrcnn.files import json_list_writer, write_atomically
from fastmrcnn.predictor import Predictor
from fastmrcnn.visualize import draw

__all__ = ["PredictConfig", "run"]


@dataclass
class PredictConfig:
    """Which images to run a checkpoint on, and where the pictures and the results go.

    Args:
        inputs: images, or folders of images (with their sub-folders).
        checkpoint: model to run.
        output: folder for the pictures, one PNG per image, and results.json with all detections in COCO format.
        score_threshold: detections scored below are not drawn; results.json has them all.
        max_detections: detections per image; by default the model's own limit.
        batch_size: images per call of the model, chosen by size among the next few.
        workers: threads that read images ahead.
        device: where to run, such as cuda, cuda:1 or cpu; by default cuda if there is one.
        overlay: false writes results.json only.
        annotations: COCO annotation file to take image ids and category ids from, so that results.json can be
            evaluated against it; by default images are numbered from 1 in the order of their paths.
        on_error: raise stops at an image that cannot be read, what was done before is kept; skip goes on and warns.
    """

    inputs: list[str]
    checkpoint: Path
    output: Path = Path("predictions")
    score_threshold: float = 0.5
    max_detections: int | None = None
    batch_size: int = 1
    workers: int = 2
    device: str | None = None
    overlay: bool = True
    annotations: Path | None = None
    on_error: Literal["raise", "skip"] = "raise"


def run(config: PredictConfig) -> Path:
    """Predict as configured, print where the results are and how fast they came, and return the path of results.json.

    A record of results.json is a COCO result with the image's ``file_name`` added: its path within the input folder.

    Raises:
        FileNotFoundError: an input, the checkpoint or the annotations do not exist.
        ValueError: no images, a picture would overwrite an input, or an image is not in the annotations.
    """
    output = Path(config.output)
    images = find_images(config.inputs, output)
    pictures = picture_paths(images.values(), output)
    clash = {path.resolve() for path in images}.intersection(path.resolve() for path in pictures)
    if config.overlay and clash:
        raise ValueError(f"output must be another folder: {min(clash)} is an input that would be overwritten")
    coco = load_json(config.annotations) if config.annotations is not None else None
    ids = _ids_in_annotations(images.values(), coco["images"]) if coco is not None else range(1, len(images) + 1)
    image_ids = dict(zip(images, ids, strict=True))
    picture_of = dict(zip(images, pictures, strict=True))

    predictor = Predictor(
        config.checkpoint,
        device=config.device,
        # Pictures of small images are enlarged, for which soft masks have the smoother contours.
        masks="soft" if config.overlay else "rle",
        batch_size=config.batch_size,
        max_detections=config.max_detections,
        workers=config.workers,
        on_error=config.on_error,
    )
    class_names, category_ids = predictor.class_names or [], predictor.category_ids or []
    categories: list[int | None] = list(category_ids)
    if coco is not None:
        categories = match_categories(class_names, category_ids, coco["categories"])
    count = detections = 0
    path = output / "results.json"
    started = time.perf_counter()
    try:
        # Also when an image stops the run: what was found so far is not lost.
        with json_list_writer(path, keep_on_error=True) as write:
            for source, image, result, _ in predictor.stream(images, progress=True):
                if image is None or result is None:
                    continue
                for record in detections_to_coco(result, image_ids[source], categories):
                    write({**record, "file_name": images[source].as_posix()})
                    detections += 1
                if config.overlay:
                    picture = draw(image, result, class_names=class_names, score_threshold=config.score_threshold)
                    write_atomically(picture_of[source], picture.save)
                count += 1
    finally:
        speed = count / max(time.perf_counter() - started, 1e-9)
        print(f"{detections} detections in {count} of {len(images)} images, {speed:.1f} images per second: {path}")
    return path


def find_images(inputs: Sequence[str], output: Path) -> dict[Path, Path]:
    """The images of files and folders, each once, sorted by path.

    Pictures of an earlier run, in an output folder inside an input folder, are no input.

    Returns:
        For every image its path within the input folder it came from (just its name for a file).
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for name in inputs:
        root = Path(name)
        for path in image_files(root):
            inside = output.resolve() in path.resolve().parents and output.resolve() != root.resolve()
            if path.resolve() in seen or (root.is_dir() and inside):
                continue
            seen.add(path.resolve())
            found[path] = path.relative_to(root) if root.is_dir() else Path(path.name)
    if not found:
        raise ValueError(f"inputs: no images in {', '.join(inputs) or 'an empty list'}")
    return dict(sorted(found.items()))


def picture_paths(names: Iterable[Path], output: Path) -> list[Path]:
    """One PNG path per name below the output folder, sub-folders kept; a name already taken gets _2, _3, ..."""
    taken: set[str] = set()
    paths = []
    for name in names:
        candidate, number = name.with_suffix(".png"), 1
        # Compared in lower case: some file systems take A.png and a.png for one file.
        while candidate.as_posix().lower() in taken:
            number += 1
            candidate = name.with_name(f"{name.stem}_{number}.png")
        taken.add(candidate.as_posix().lower())
        paths.append(output / candidate)
    return paths


def _ids_in_annotations(names: Iterable[Path], images: Sequence[dict[str, Any]]) -> list[int]:
    """The id of each file name in a COCO file: by path within the folder, else by bare name where that is unique."""
    by_path = {Path(image["file_name"]): image["id"] for image in images if "file_name" in image}
    bare = Counter(path.name for path in by_path)
    by_name = {path.name: image_id for path, image_id in by_path.items() if bare[path.name] == 1}
    ids = []
    for name in names:
        image_id = by_path.get(name, by_name.get(name.name))
        if image_id is None:
            raise ValueError(f"annotations: no image with the file_name {name.as_posix()}")
        ids.append(image_id)
    return ids
