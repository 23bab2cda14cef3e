"""Weights of matterport's Mask R-CNN, from Keras' layers: transposed, norms folded, boxes x before y.

The source of the names is `mrcnn/model.py` of matterport/Mask_RCNN.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from fastmrcnn.checkpoints.hdf5 import Layers
from fastmrcnn.checkpoints.weights import Weights, expected, info_of, model_name, some
from fastmrcnn.models.config import ModelConfig
from fastmrcnn.models.matterport import EPS

DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
"""By which deltas (dy, dx, dh, dw) are multiplied, those of the RPN, too."""

POOLED = 7


def convert(layers: Layers, exclude: tuple[str, ...] = (), *, partial: bool = False) -> Weights:
    """The detector whose weights a file of Keras holds.

    Args:
        layers: weights by layer and name.
        exclude: names, or regular expressions, of layers to leave out.
        partial: a file may lack layers; their weights are then not in the result's `state`.

    Raises:
        ValueError: it is no Mask R-CNN of matterport's; the message says what is lacking or left over.
    """
    layers = {name: its for name, its in layers.items() if its and not any(re.fullmatch(x, name) for x in exclude)}
    blocks = len({name.partition("_")[0] for name in layers if name.startswith("res4")})
    depth = {6: "resnet50", 23: "resnet101"}.get(blocks)
    if depth is None:
        raise ValueError(f"it has {blocks} blocks in its fourth stage: expected 6 of a ResNet-50 or 23 of a ResNet-101")
    config = ModelConfig(model_name(f"maskrcnn_{depth}_fpn"), conventions="matterport")
    last = next((layers[name] for name in ("mrcnn_class_logits", "mrcnn_mask") if name in layers), None)
    classes = 81 if last is None else last["kernel"].shape[-1]
    info = info_of(config, classes - 1)
    source = _Source(layers)
    state: dict[str, Tensor] = {}
    lacking = []
    for name, shape in expected(info).items():
        try:
            value = source.tensor(name)
        except KeyError as error:
            lacking.append(str(error.args[0]))
            continue
        if value.shape != shape:
            raise ValueError(f"it has {name} as {list(value.shape)}: expected {list(shape)}")
        state[name] = value.contiguous()
    lacking = list(dict.fromkeys(lacking))
    left = [name for name in layers if name not in source.used]
    if left:
        raise ValueError(f"it is no Mask R-CNN of matterport's: it also has {some(left)}")
    if lacking and not partial:
        raise ValueError(f"it is no Mask R-CNN of matterport's: it lacks {some(lacking)}")
    return Weights("matterport", info, state)


class _Source:
    """Tensors of our names, from those of Keras.  A layer that is not there is a KeyError with its name."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.used: set[str] = set()

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer that our model calls `name`."""
        layer, _, part = name.rpartition(".")
        for pattern, make in self.rules():
            if found := re.fullmatch(pattern, layer):
                weight, bias = (make(found)) if part in ("weight", "bias") else (None, None)
                value = weight if part == "weight" else bias
                assert value is not None
                return value.float()
        return self.of_backbone(layer, part).float()

    def rules(self) -> list[tuple[str, Callable[[re.Match[str]], tuple[Tensor, Tensor]]]]:
        """What makes weight and bias of our layers."""
        return [
            (
                r"backbone\.fpn\.inner_blocks\.(\d)\.0",
                lambda m: self.convolution(f"fpn_c{int(m[1]) + 2}p{int(m[1]) + 2}"),
            ),
            (r"backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: self.convolution(f"fpn_p{int(m[1]) + 2}")),
            (r"rpn\.head\.conv\.0\.0", lambda _: self.convolution("rpn_conv_shared")),
            (r"rpn\.head\.cls_logits", lambda _: self.objectness()),
            (r"rpn\.head\.bbox_pred", lambda _: self.anchor_deltas()),
            (r"roi_heads\.box_head\.fc(6|7)", lambda m: self.box_layer(int(m[1]) - 5)),
            (r"roi_heads\.box_predictor\.cls_score", lambda _: self.dense("mrcnn_class_logits")),
            (r"roi_heads\.box_predictor\.bbox_pred", lambda _: self.box_deltas()),
            (
                r"roi_heads\.mask_head\.(\d)\.0",
                lambda m: self.normed(f"mrcnn_mask_conv{int(m[1]) + 1}", f"mrcnn_mask_bn{int(m[1]) + 1}"),
            ),
            (r"roi_heads\.mask_predictor\.conv5_mask", lambda _: self.convolution("mrcnn_mask_deconv")),
            (r"roi_heads\.mask_predictor\.mask_fcn_logits", lambda _: self.convolution("mrcnn_mask")),
        ]

    def of_backbone(self, layer: str, part: str) -> Tensor:
        """Of a convolution, whose bias goes into the mean of the norm behind it, or of that norm."""
        convolution, norm = keras_names(layer)
        if layer.rpartition(".")[2].startswith("conv") or layer.endswith("downsample.0"):
            return self.convolution(convolution)[0]
        if part == "running_mean":
            return self.get(norm, "moving_mean") - self.get(convolution, "bias")
        return self.get(norm, {"weight": "gamma", "bias": "beta", "running_var": "moving_variance"}[part])

    def get(self, layer: str, part: str) -> Tensor:
        """A weight of a layer, float64."""
        if layer not in self.layers or part not in self.layers[layer]:
            raise KeyError(layer)
        self.used.add(layer)
        return self.layers[layer][part].double()

    def convolution(self, layer: str) -> tuple[Tensor, Tensor]:
        """[out, in, H, W] of [H, W, in, out]; a transposed one has [in, out, H, W], of [H, W, out, in]."""
        return self.get(layer, "kernel").permute(3, 2, 0, 1), self.get(layer, "bias")

    def dense(self, layer: str) -> tuple[Tensor, Tensor]:
        """[out, in] of [in, out]."""
        return self.get(layer, "kernel").T, self.get(layer, "bias")

    def normed(self, layer: str, norm: str) -> tuple[Tensor, Tensor]:
        """A convolution that includes the norm behind it."""
        weight, bias = self.convolution(layer)
        scale = self.get(norm, "gamma") / torch.sqrt(self.get(norm, "moving_variance") + EPS)
        shift = self.get(norm, "beta") - self.get(norm, "moving_mean") * scale
        return weight * scale[:, None, None, None], bias * scale + shift

    def objectness(self) -> tuple[Tensor, Tensor]:
        """One logit for two, background and object: a softmax of both is a sigmoid of their difference."""
        weight, bias = self.convolution("rpn_class_raw")
        return weight[1::2] - weight[0::2], bias[1::2] - bias[0::2]

    def anchor_deltas(self) -> tuple[Tensor, Tensor]:
        """(dx, dy, dw, dh) of (dy, dx, dh, dw), times the deviations."""
        weight, bias = self.convolution("rpn_bbox_pred")
        scale = torch.tensor(DEVIATIONS, dtype=weight.dtype)
        return _x_first(weight, scale), _x_first(bias, scale)

    def box_layer(self, number: int) -> tuple[Tensor, Tensor]:
        """A convolution over all of a RoI, and its norm, as a linear layer."""
        weight, bias = self.normed(f"mrcnn_class_conv{number}", f"mrcnn_class_bn{number}")
        return weight.flatten(1), bias

    def box_deltas(self) -> tuple[Tensor, Tensor]:
        """(dx, dy, dw, dh) per class, which are divided by (10, 10, 5, 5) as here."""
        weight, bias = self.dense("mrcnn_bbox_fc")
        one = torch.ones(4, dtype=weight.dtype)
        return _x_first(weight, one), _x_first(bias, one)


def keras_names(layer: str) -> tuple[str, str]:
    """What Keras calls a convolution of our backbone, and its norm, by the name of either."""
    if layer in ("backbone.body.conv1", "backbone.body.bn1"):
        return "conv1", "bn_conv1"
    found = re.fullmatch(r"backbone\.body\.layer(\d)\.(\d+)\.(?:(?:conv|bn)(\d)|downsample\.\d)", layer)
    if found is None:
        raise ValueError(f"{layer} has no counterpart in matterport's network")
    branch = f"2{'abc'[int(found[3]) - 1]}" if found[3] else "1"
    block = f"{int(found[1]) + 1}{chr(ord('a') + int(found[2]))}_branch{branch}"
    return f"res{block}", f"bn{block}"


def _x_first(values: Tensor, scale: Tensor) -> Tensor:
    """Rows of four, scaled and with x before y."""
    rows = values.unflatten(0, (-1, 4)) * scale.view(-1, *[1] * (values.dim() - 1))
    return rows[:, [1, 0, 3, 2]].flatten(0, 1)
