"""A batch of images through a detector: launched now, its results collected later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastmrcnn import ops
from fastmrcnn.batches import DetectionBatch
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.preprocess import resized_size
from fastmrcnn.polygons import masks_to_polygons, rle_to_polygons
from fastmrcnn_kernels.host import begin_copy

MaskFormat = Literal["soft", "bool", "bits", "rle", "polygons"]

Size = tuple[int, int]
Result = dict[str, Any]
Encoding = Callable[[], list[ops.Encoded]]


@dataclass
class Inference:
    """How images become results on the CPU.

    Args:
        model: a detector; ours are run without waiting for the device, others are called.
        masks: what masks become, None leaves them out.
        mask_threshold: a pixel belongs to a mask where the soft mask is above this.
        score_threshold: detections scored below are dropped, before their masks are pasted.
        max_detections: per image; None is the model's own limit.
    """

    model: nn.Module
    masks: MaskFormat | None = "soft"
    mask_threshold: float = 0.5
    score_threshold: float = 0.0
    max_detections: int | None = None
    stream: torch.cuda.Stream | None = field(default=None, init=False, repr=False)

    @property
    def semantics(self) -> ops.Semantics:
        """How the model's masks are pasted."""
        return getattr(getattr(self.model, "transform", None), "semantics", "torchvision")

    def begin(self, images: list[Tensor]) -> Callable[[], list[Result]]:
        """Launch a batch of images, [3, H, W] on the model's device.

        Returns:
            A function that waits for the results and returns those of each image, as :class:`fastmrcnn.Predictor` has
            them.
        """
        # Not in the function that is returned: what it makes are tensors that may be written to.
        with torch.inference_mode(), eval_mode(self.model), detection_limit(self.model, self.max_detections):
            if isinstance(self.model, GeneralizedRCNN) and is_plain(self.model):
                return self._begin_ours(self.model, images)
            outputs = self.model(images)
        return lambda: [self._converted(output) for output in outputs]

    def _begin_ours(self, model: GeneralizedRCNN, images: list[Tensor]) -> Callable[[], list[Result]]:
        original = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _, sizes = model.transform.batch(images, None)
        return self.collect(model.transform.in_original_pixels(model.detect(batch), sizes, original), original)

    def collect(
        self, found: DetectionBatch, original: Sequence[Size], encoding: Encoding | None = None
    ) -> Callable[[], list[Result]]:
        """Begin to bring detections to the CPU; as :meth:`begin` does, which ends in this.

        Args:
            found: in the pixels of the images; what it holds must not change before the results are made.
            original: sizes of the images, fewer than `found` has if the last of those are padding.
            encoding: of the masks, if that has begun already.
        """
        if self.score_threshold > 0:
            kept = found.valid & (found.scores >= self.score_threshold)
            found = replace(found, count=kept.sum(dim=1))  # best first: these are the first
        if encoding is None and found.masks is not None and self.masks in ("rle", "polygons"):
            encoding = ops.begin_encoding(
                found.masks,
                found.boxes,
                original,
                count=found.count,
                threshold=self.mask_threshold,
                semantics=self.semantics,
            )
        small = {"count": found.count, "boxes": found.boxes, "labels": found.labels, "scores": found.scores}
        if found.keypoints is not None:
            small["keypoints"] = found.keypoints
        if found.mask_scores is not None and self.masks is not None:
            small["mask_scores"] = found.mask_scores
        copies = {name: begin_copy(value) for name, value in small.items()}

        def finish() -> list[Result]:
            values = {name: copy() for name, copy in copies.items()}
            counts = values.pop("count")[: len(original)].tolist()
            # Copies, or one result would keep alive the memory of the whole batch, pinned memory at that.
            results: list[Result] = [
                {name: value[i, :count].clone() for name, value in values.items()} for i, count in enumerate(counts)
            ]
            for result in results:
                if "keypoints" in result:
                    keypoints, scores = result["keypoints"].split((3, 1), dim=-1)
                    result |= {"keypoints": keypoints.contiguous(), "keypoints_scores": scores.squeeze(-1).contiguous()}
            if encoding is not None:
                for result, encoded in zip(results, encoding()[: len(original)], strict=True):
                    result["masks"] = encoded.rles if self.masks == "rle" else rle_to_polygons(encoded.rles)
            elif found.masks is not None and self.masks is not None:
                with torch.no_grad(), self._beside(found.masks.device):
                    for i, result in enumerate(results):
                        result["masks"] = self._pasted(found, i, counts[i], original[i])
            return results

        return finish

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """On a GPU a stream of its own, so that what is pasted need not wait until the next batch is through.

        What it reads is complete, since its counts have been waited for, and is kept until it was copied to the CPU.
        """
        if device.type != "cuda":
            yield
            return
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self.stream):
            yield

    def _pasted(self, found: DetectionBatch, i: int, count: int, size: Size) -> Tensor:
        assert found.masks is not None
        given = (found.masks[i, :count], found.boxes[i, :count], size)
        if self.masks == "soft":
            return ops.paste_masks(*given, semantics=self.semantics)[:, None].cpu()
        out: Literal["bool", "bits"] = "bool" if self.masks == "bool" else "bits"
        pasted = ops.paste_masks(*given, out=out, threshold=self.mask_threshold, semantics=self.semantics)
        return (pasted if out == "bits" else pasted[:, None]).cpu()

    def _converted(self, output: Mapping[str, Any]) -> Result:
        """What another model gives for an image, as a result of ours."""
        values: Result = dict(output)
        if self.score_threshold > 0:
            kept = values["scores"] >= self.score_threshold
            values = {name: value[kept] if isinstance(value, Tensor) else value for name, value in values.items()}
        masks = values.pop("masks", None)
        result: Result = {name: ordinary(value) for name, value in values.items()}
        if masks is None or self.masks is None:
            return result
        if self.masks == "soft":
            result["masks"] = ordinary(masks)
            return result
        inside = masks > self.mask_threshold
        if self.masks == "bool":
            result["masks"] = inside.cpu()
        elif self.masks == "bits":
            result["masks"] = ops.pack_bits(inside[:, 0] if inside.dim() == 4 else inside).cpu()
        elif self.masks == "polygons":
            result["masks"] = masks_to_polygons(inside)
        else:
            result["masks"] = ops.encode_bool(inside[:, 0] if inside.dim() == 4 else inside).rles
        return result


def ordinary(value: Any) -> Any:
    """A tensor on the CPU that may be written to, unlike those that inference mode leaves behind."""
    if not isinstance(value, Tensor):
        return value
    value = value.cpu()
    return value.clone() if value.is_inference() else value


def is_plain(model: GeneralizedRCNN) -> bool:
    """Whether calling a detector of ours does no more than its `forward` as it is here."""
    own = type(model).forward is GeneralizedRCNN.forward and "forward" not in vars(model)
    return own and not model._forward_hooks and not model._forward_pre_hooks


def channels(model: nn.Module) -> int:
    """Of the images that a detector takes."""
    return len(getattr(getattr(model, "transform", None), "image_mean", (0, 0, 0)))


def resized(model: nn.Module, image: Tensor) -> Size:
    """The size that torchvision's transform of a detector brings an image to, or its own; to compare images by."""
    size = (image.shape[-2], image.shape[-1])
    transform = getattr(model, "transform", None)
    return resized_size(transform, size) if isinstance(transform, GeneralizedRCNNTransform) else size


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and afterwards each module back in the mode it was in (some are frozen in eval)."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def detection_limit(model: nn.Module, limit: int | None, *, raise_only: bool = False) -> Iterator[None]:
    """Set how many detections a detector returns per image, for the duration; other models are left alone.

    Args:
        model: a detector has ``model.roi_heads.detections_per_img``.
        limit: the number of detections; None leaves the model's own.
        raise_only: leave a higher limit of the model as it is.
    """
    heads: Any = getattr(model, "roi_heads", None)
    before = getattr(heads, "detections_per_img", None)
    if limit is None or before is None or (raise_only and before >= limit):
        yield
        return
    heads.detections_per_img = limit
    try:
        yield
    finally:
        heads.detections_per_img = before


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for a model without any."""
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
