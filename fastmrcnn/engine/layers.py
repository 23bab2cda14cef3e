"""Layers that do in one call what a trained network has in several: norm, bias, sum and activation of a convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from fastmrcnn import ops
from fastmrcnn.batches import ImageBatch


class Canvases:
    """The canvases of the batch that a network is run on, known to those of its layers that look beyond a cell."""

    def __init__(self) -> None:
        self.images: ImageBatch | None = None

    def clear_beyond(self, maps: Tensor, value: float = 0.0) -> Tensor:
        """Maps of the network, in place: what lies beyond the canvas of its image becomes `value`."""
        if self.images is None or self.images.canvases is None:
            return maps
        return ops.clear_beyond_(maps, self.images.canvases, self.images.stride(maps), value)


class ClearBeyond(nn.Module):
    """Clears what lies beyond canvases, before a layer that is not ours looks there."""

    def __init__(self, canvases: Canvases, value: float) -> None:
        super().__init__()
        self.canvases = canvases
        self.value = value

    def forward(self, maps: Tensor) -> Tensor:
        """`maps`."""
        return self.canvases.clear_beyond(maps, self.value)


class FusedConv2d(nn.Module):
    """relu(convolution(x) + bias + z), where relu and z are optional, on maps laid out channels_last.

    A norm that follows is part of the weights already.  Made from a `Conv2d` whose padding is zeros.
    """

    canvases: Canvases | None = None
    """Of the images, if the layer's maps are theirs, and padded: it then changes what lies beyond, in its input."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.geometry: Any = list(conv.stride), [int(p) for p in conv.padding], list(conv.dilation), conv.groups
        self.relu = relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Maps [N, out, H', W'] of maps [N, in, H, W]; `z` has that shape, or is broadcast."""
        if self.canvases is not None and self.looks_around:
            x = self.canvases.clear_beyond(x)
        run = _fused_convolution(x) if z is None or z.shape == self.shape(x) else None
        if run is not None and (self.relu or (z is not None and x.device.type == "cpu")):
            return run(x, z, self.weight, self.bias, *self.geometry, self.relu)
        y = functional.conv2d(x, self.weight, self.bias, *self.geometry)
        if z is not None:
            y = y + z
        return y.relu_() if self.relu else y

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """That of the result, before a sum."""
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(
                x.shape[2:], self.weight.shape[2:], *self.geometry[:3], strict=True
            )
        ]
        return (x.shape[0], len(self.weight), *sides)

    @property
    def looks_around(self) -> bool:
        """Whether a cell of the result depends on more than one of the input."""
        return tuple(self.weight.shape[2:]) != (1, 1)

    def extra_repr(self) -> str:
        """What `print` says of it."""
        outputs, inputs, height, width = self.weight.shape
        return f"{inputs}, {outputs}, kernel_size={(height, width)}, relu={self.relu}"


def _fused_convolution(x: Tensor) -> Callable[..., Tensor] | None:
    """PyTorch's own fused convolution for maps like `x`, or None; traced, or without values, they have none."""
    if isinstance(x, FakeTensor) or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return None
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return _onednn
    if x.is_cuda and torch.version.hip is None and torch.backends.cudnn.enabled:
        return _cudnn
    return None


def _onednn(x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation, groups, relu = rest
    geometry = padding, stride, dilation, groups
    name = "relu" if relu else "none"
    if z is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, name, [], "")
    last = "relu" if relu else None
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    return binary(x, z, weight, bias, *geometry, "add", 1.0, last, [], "")


def _cudnn(x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation, groups, _ = rest
    if z is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, stride, padding, dilation, groups)


class FusedLinear(nn.Module):
    """relu(W x + b), where relu is optional, in the dtype of its weights.

    Maps [R, C, P, P] are taken as they lie in memory, channels last.
    """

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool, channels: int | None = None) -> None:
        """`weight` [out, in]; with `channels` its columns are those of flattened maps of so many channels."""
        super().__init__()
        if channels is not None:
            weight = weight.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[R, out] of [R, in], or of maps."""
        if x.dim() == 4:
            x = x.permute(0, 2, 3, 1).flatten(1)
        x = x.to(self.weight.dtype)
        if self.relu:
            return torch._addmm_activation(self.bias, x, self.weight.t())
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, relu={self.relu}"


class FusedRPNHead(nn.Module):
    """torchvision's `RPNHead`, with objectness and deltas from one convolution, which reads the maps once.

    Its outputs are padded to a multiple of 8, which tensor cores want.
    """

    def __init__(self, conv: nn.Module, logits: nn.Conv2d, deltas: nn.Conv2d) -> None:
        """`conv` is what comes first, fused; the others are 1 x 1."""
        super().__init__()
        self.conv = conv
        self.anchors, self.values = logits.out_channels, deltas.out_channels
        weight = torch.cat((logits.weight.detach(), deltas.weight.detach()))
        bias = torch.cat([_bias(layer) for layer in (logits, deltas)])
        padding = -len(weight) % 8
        weight, bias = functional.pad(weight, (0,) * 7 + (padding,)), functional.pad(bias, (0, padding))
        self.outputs = FusedConv2d(logits, weight, bias, relu=False)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness [N, A, H, W] and deltas [N, 4 A, H, W] of each of the maps, views of one result."""
        outputs = [self.outputs(self.conv(x)) for x in features]
        end = self.anchors + self.values
        return [x[:, : self.anchors] for x in outputs], [x[:, self.anchors : end] for x in outputs]


class ClassMasks(nn.Module):
    """torchvision's `MaskRCNNPredictor` for one class of each RoI, the only one of interest.

    Its transposed convolution, 2 x 2 with stride 2, is a linear layer of each cell to its four pixels.
    """

    def __init__(self, transposed: nn.ConvTranspose2d, logits: nn.Conv2d) -> None:
        super().__init__()
        weight = transposed.weight.detach().permute(2, 3, 1, 0).flatten(0, 2)  # [2 2 hidden, in]
        self.pixels = FusedLinear(weight, _bias(transposed).repeat(4), relu=True)
        self.weight = nn.Parameter(logits.weight.detach().flatten(1), requires_grad=False)  # [classes, hidden]
        self.bias = nn.Parameter(_bias(logits), requires_grad=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits [R, 2 M, 2 M] of class `labels` [R] of each RoI of [R, in, M, M], channels_last."""
        rois, _, height, width = x.shape
        if len(self.weight) == 1:
            labels = torch.zeros_like(labels)
        cells = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        pixels = self.pixels(cells).view(rois, height * width * 4, self.weight.shape[1])
        logits = torch.baddbmm(self.bias[labels, None, None], pixels, self.weight[labels, :, None])
        return logits.view(rois, height, width, 2, 2).transpose(2, 3).reshape(rois, 2 * height, 2 * width)


def _bias(layer: Any) -> Tensor:
    """The bias of a layer, zeros if it has none."""
    outputs = layer.out_channels
    return layer.weight.new_zeros(outputs) if layer.bias is None else layer.bias.detach()
