"""Backbones of ResNets: with a feature pyramid, up to stage 4, or with a dilated stage 5."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

Neck = Literal["fpn", "c4", "dc5"]


class Body(NamedTuple):
    """A ResNet: blocks in each stage, groups of the 3x3 convolutions, and their width per group in the first stage."""

    blocks: tuple[int, int, int, int]
    groups: int = 1
    width: int = 64


BODIES = {
    "resnet50": Body((3, 4, 6, 3)),
    "resnet101": Body((3, 4, 23, 3)),
    "resnext101_32x4d": Body((3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": Body((3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Body((3, 4, 23, 3), 64, 4),
}


class OneMap(nn.Module):
    """The maps of a ResNet up to one of its stages, as a pyramid of one level."""

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps [N, out_channels, H / 16, W / 16], rounded up, called "0"."""
        return OrderedDict([("0", self.body(images))])


def resnet(name: str, weights: str | None, stride_in_1x1: bool) -> ResNet:
    """A ResNet with frozen norms, its bottlenecks halving maps in their 1x1 or, as torchvision's, 3x3 convolution."""
    body = BODIES[name]
    network = ResNet(
        Bottleneck,
        list(body.blocks),
        groups=body.groups,
        width_per_group=body.width,
        norm_layer=FrozenBatchNorm2d,
    )
    if weights is not None:
        choices: Any = get_model_weights(name)
        chosen = choices[weights.rpartition(".")[-1]]
        network.load_state_dict(chosen.get_state_dict(progress=True, check_hash=True))
    if stride_in_1x1:
        for stage in (network.layer2, network.layer3, network.layer4):
            first = cast(Bottleneck, stage[0])
            first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    return network


def dilated(stage: nn.Sequential) -> nn.Sequential:
    """A stage of a ResNet that does not halve maps, its 3x3 convolutions reaching twice as far instead."""
    blocks: Any = stage
    for block in blocks:
        for name in ("conv1", "conv2"):
            getattr(block, name).stride = (1, 1)
        block.conv2.dilation = block.conv2.padding = (2, 2)
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)
    return stage


def backbone_of(network: ResNet, neck: Neck) -> nn.Module:
    """The maps that a detector sees: of a pyramid (256 channels, levels "0" to "3" and "pool"), or one."""
    if neck == "fpn":
        layers = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
        return BackboneWithFPN(network, layers, [256, 512, 1024, 2048], 256)
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"]
    parts = OrderedDict((name, getattr(network, name)) for name in names)
    if neck == "dc5":
        parts["layer4"] = dilated(network.layer4)
    return OneMap(nn.Sequential(parts), 2048 if neck == "dc5" else 1024)
