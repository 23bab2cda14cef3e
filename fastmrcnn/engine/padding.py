"""Networks whose results do not depend on padding: each layer that looks beyond a cell sees zeros beyond a canvas.

So an image on a larger canvas, or beside larger ones in a batch, gives what it gives alone.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from fastmrcnn.engine.fusion import ADD, RELU, is_call, layer_of
from fastmrcnn.engine.layers import Canvases, ClearBeyond, FusedConv2d, FusedRPNHead
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
CELLWISE_LAYERS = (*ACTIVATIONS, nn.BatchNorm2d, FrozenBatchNorm2d, nn.Identity, nn.Dropout, ClearBeyond)
MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
CELLWISE = ADD | RELU | MUL | {torch.cat, torch.sigmoid, getattr, operator.getitem, "size"}
"""What gives for each cell something that depends on that cell alone; or takes sizes and members."""


def keep_apart(model: GeneralizedRCNN, canvases: Canvases) -> list[str]:
    """Make a prepared detector keep canvases apart.

    Returns:
        The names of those of its parts for which that cannot be done, none if all is well.
    """
    problems = []
    for name, network in (("backbone", model.backbone), ("rpn.head", model.rpn.head)):
        problems += _keep_apart(network, canvases, name)
    multiple = model.transform.size_divisible
    if multiple % 32:
        problems.append(f"transform.size_divisible is {multiple}, of which 32 is no divisor")
    return problems


def _keep_apart(network: nn.Module, canvases: Canvases, name: str) -> list[str]:
    if isinstance(network, fx.GraphModule):
        return _keep_nodes_apart(network, canvases, name)
    if isinstance(network, FusedConv2d):
        network.canvases = canvases
        return []
    if isinstance(network, CELLWISE_LAYERS) or not any(True for _ in network.parameters()):
        return []
    if isinstance(network, FusedRPNHead | nn.Sequential | nn.ModuleList):
        return [x for child, its in network.named_children() for x in _keep_apart(its, canvases, f"{name}.{child}")]
    return [f"{name} ({type(network).__name__})"]


def _keep_nodes_apart(network: fx.GraphModule, canvases: Canvases, name: str) -> list[str]:
    problems = []
    for node in list(network.graph.nodes):
        layer = layer_of(network, node)
        if isinstance(layer, FusedConv2d):
            layer.canvases = canvases
        elif _is_maximum(node, layer):
            _insert_before(network, node, ClearBeyond(canvases, -math.inf))
        elif isinstance(layer, CELLWISE_LAYERS) or node.op in ("placeholder", "output", "get_attr"):
            continue
        elif not (is_call(node, CELLWISE) or _is_pointwise_pooling(node) or _is_nearest(node)):
            what = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", node.target)
            problems.append(f"{name}.{node.target if layer is not None else node.name} ({what})")
    network.recompile()
    return problems


def _insert_before(network: fx.GraphModule, node: fx.Node, layer: nn.Module) -> None:
    source: Any = node.args[0]
    added = f"{node.name}_canvases"
    network.add_module(added, layer)
    with network.graph.inserting_before(node):
        node.replace_input_with(source, network.graph.call_module(added, (source,)))


def _is_maximum(node: fx.Node, layer: nn.Module | None) -> bool:
    return bool(isinstance(layer, nn.MaxPool2d) and not layer.ceil_mode)


def _is_pointwise_pooling(node: fx.Node) -> bool:
    """Whether it takes every second cell, or the like: the coarsest level of torchvision's pyramids."""
    size: Any = node.kwargs["kernel_size"] if "kernel_size" in node.kwargs else (*node.args, None, None)[1]
    return is_call(node, {functional.max_pool2d, torch.max_pool2d}) and bool(size in (1, (1, 1)))


def _is_nearest(node: fx.Node) -> bool:
    """Whether it repeats cells, which sides that are multiples of each other keep within canvases."""
    return is_call(node, {functional.interpolate}) and str(node.kwargs.get("mode", "nearest")) == "nearest"
