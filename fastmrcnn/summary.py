"""What a network consists of: parameters and floating-point operations, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastmrcnn.batches import DetectionBatch, ImageBatch
from fastmrcnn.inference import channels
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN


@dataclass
class SummaryConfig:
    """Which network to summarise, on which input.

    Args:
        model: the network.
        num_classes: classes, with the background.
        image_size: height and width of the padded input, in pixels.
        depth: levels of nested layers that are listed.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    num_classes: int = 91
    image_size: tuple[int, int] = (800, 1344)
    depth: int = 3


@dataclass
class LayerSummary:
    """One layer, its own and what it contains: parameters, and floating-point operations for one image."""

    name: str
    kind: str
    parameters: int
    flops: int


def summarize(model: GeneralizedRCNN, image_size: tuple[int, int], depth: int = 3) -> list[LayerSummary]:
    """Layers of `model` down to `depth`, the whole first; operations of one detection of an `image_size` image.

    Counted on shapes alone, without arithmetic: the box head sees all proposals and the mask head all detections.
    Two operations per multiply-add; element-wise work and pooling are not counted.
    """
    model = model.to("meta").eval()
    pixels = torch.empty(1, channels(model), *image_size, device="meta")
    images = ImageBatch(pixels, torch.tensor([list(image_size)], device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _Detect(model)(images)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    def operations(name: str, module: nn.Module) -> int:
        """Of a module that is called, or, of one that only holds others, of what it holds."""
        if (key := f"_Detect.model.{name}") in flops:
            return flops[key]
        return sum(operations(f"{name}.{child}", part) for child, part in module.named_children())

    layers = [LayerSummary("", type(model).__name__, _parameters(model), flops.get("Global", 0))]
    for name, module in model.named_modules():
        if name and name.count(".") < depth and _parameters(module):
            layers.append(LayerSummary(name, type(module).__name__, _parameters(module), operations(name, module)))
    return layers


class _Detect(nn.Module):
    """Makes `detect` a call, which is what the counter of operations follows."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: ImageBatch) -> DetectionBatch:
        return self.model.detect(images)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def table(layers: list[LayerSummary]) -> str:
    """`layers` as text, contained layers indented."""
    lines = [f"{'layer':<44}{'type':<26}{'parameters':>12}{'GFLOP':>10}"]
    for layer in layers:
        indent = "  " * (layer.name.count(".") + 1) if layer.name else ""
        name = indent + (layer.name.rsplit(".", 1)[-1] or "total")
        lines.append(f"{name:<44}{layer.kind:<26}{layer.parameters:>12,}{layer.flops / 1e9:>10.2f}")
    return "\n".join(lines)


def run(config: SummaryConfig) -> None:
    """Print the table."""
    model = build_model(config.model, config.num_classes)
    print(table(summarize(model, config.image_size, config.depth)))
