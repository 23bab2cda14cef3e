"""Find objects in images: a picture with the detections per image, and all of them as one COCO results file."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmrcnn.coco_records import detections_to_coco, load_json
from fastmrcnn.data import DataError, image_files, load_image
from fastmrcnn.evaluate import default_device, detection_limit, device_of, eval_mode, match_categories
from fastmrcnn.files import write_atomically, write_json
from fastmrcnn.visualize import draw

__all__ = ["PredictConfig", "predict_images", "run"]


def predict_images(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> Iterator[tuple[Path, Tensor, dict[str, Tensor]]]:
    """Run a model over image files, a few at a time.

    Args:
        model: called in eval mode with a list of float32 [3, H, W] in 0..1, returns torchvision's list of dicts. Its
            mode is as before afterwards.
        paths: image files.
        device: where to run; the model is moved there. None is where the model is.
        batch_size: images per call of the model.
        on_error: "raise" stops at an image that cannot be read, once all before it have been yielded; "skip" leaves it
            out and warns at the end with the number of such images.
        progress: show a progress bar.

    Yields:
        The path, the image (float32 [3, H, W] on the CPU) and the model's output for it, in the order of ``paths``.

    Raises:
        DataError: an image cannot be read; the message names it.
        FileNotFoundError: there is no such file.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = device_of(model) if device is None else torch.device(device)
    model.to(device)
    unreadable: list[str] = []
    batch: list[tuple[Path, Tensor]] = []
    with eval_mode(model), tqdm(total=len(paths), desc="predict", unit="image", disable=not progress) as bar:
        for path in map(Path, paths):
            try:
                batch.append((path, load_image(path)))
            except (DataError, OSError) as error:
                if on_error == "raise":
                    yield from _predict_batch(model, batch, device)
                    raise
                unreadable.append(str(error))
                bar.update()
            if len(batch) == batch_size:
                yield from _predict_batch(model, batch, device)
                bar.update(len(batch))
                batch = []
        yield from _predict_batch(model, batch, device)
        bar.update(len(batch))
    if unreadable:
        warnings.warn(f"{len(unreadable)} images could not be read, such as: {unreadable[0]}", stacklevel=2)


def _predict_batch(
    model: nn.Module, batch: list[tuple[Path, Tensor]], device: torch.device
) -> Iterator[tuple[Path, Tensor, dict[str, Tensor]]]:
    if not batch:
        return
    # Not around the yield: whoever iterates would run in inference mode, too.
    with torch.inference_mode():
        outputs = model([image.to(device, non_blocking=True) for _, image in batch])
    for (path, image), output in zip(batch, outputs, strict=True):
        yield path, image, output


@dataclass
class PredictConfig:
    """Which images to run a checkpoint on, and where the pictures and the results go.

    Args:
        inputs: images, or folders of images (with their sub-folders).
        checkpoint: model to run.
        output: folder for the pictures, one PNG per image, and results.json with all detections in COCO format.
        score_threshold: detections scored below are not drawn; results.json has them all.
        max_detections: detections per image; by default the model's own limit.
        batch_size: images per call of the model.
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
    device: str | None = None
    overlay: bool = True
    annotations: Path | None = None
    on_error: Literal["raise", "skip"] = "raise"


def run(config: PredictConfig) -> Path:
    """Predict as configured, print where the results are, and return the path of results.json.

    A record of results.json is a COCO result with the image's ``file_name`` added: its path within the input folder.

    Raises:
        FileNotFoundError: an input, the checkpoint or the annotations do not exist.
        ValueError: no images, a picture would overwrite an input, or an image is not in the annotations.
    """
    # Read by a command only: whoever predicts with a model of their own needs none of the weight formats.
    from fastmrcnn.checkpoints import load_model

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

    device = torch.device(config.device) if config.device else default_device()
    model, info = load_model(config.checkpoint, device)
    categories: list[int | None] = list(info.category_ids)
    if coco is not None:
        categories = match_categories(info.class_names, info.category_ids, coco["categories"])
    results: list[dict[str, Any]] = []
    count = 0
    try:
        with detection_limit(model, config.max_detections):
            for path, image, prediction in predict_images(
                model, list(images), device=device, batch_size=config.batch_size, on_error=config.on_error
            ):
                for record in detections_to_coco(prediction, image_ids[path], categories):
                    results.append({**record, "file_name": images[path].as_posix()})
                if config.overlay:
                    picture = draw(
                        image, prediction, class_names=info.class_names, score_threshold=config.score_threshold
                    )
                    write_atomically(picture_of[path], picture.save)
                count += 1
    finally:
        # Also when an image stops the run: what was found so far is not lost.
        write_json(output / "results.json", results)
        print(f"{len(results)} detections in {count} of {len(images)} images: {output / 'results.json'}")
    return output / "results.json"


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
