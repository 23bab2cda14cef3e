"""Networks traced, and their layers fused: convolution, norm, sum and activation become one.

A module is traced whole (`torch.fx`); one that cannot be is left as it is, and its parts are traced instead.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from fastmrcnn.engine.layers import FusedConv2d, FusedLinear

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
RELU = {functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"}
ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}


class Tracer(fx.Tracer):
    """Stops at the layers that are fused."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Frozen norms, too, are one operation here."""
        return isinstance(module, FrozenBatchNorm2d) or super().is_leaf_module(module, name)


def fuse(module: nn.Module, example: Tensor | None = None) -> nn.Module:
    """`module` in evaluation mode, its layers fused as far as it can be traced.

    What was fused shares nothing with `module`, which is changed where it could not be traced: pass a copy.

    Args:
        module: of any kind.
        example: an input, if it takes one tensor; with it linear layers read maps without laying them out anew.
    """
    if isinstance(module, nn.Conv2d):
        return fused_convolution(module, None, False) if fusible(module) else module
    if isinstance(module, nn.Linear):
        return module if has_hooks(module) else fused_linear(module, False)
    if not any(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules()):
        return module
    if (graph := traced(module)) is not None:
        return fused_graph(module, graph, example)
    for name, child in module.named_children():
        setattr(module, name, fuse(child))
    return module


def traced(module: nn.Module) -> fx.Graph | None:
    """What a module does to tensors, or None if that depends on more than their number."""
    if any(map(has_hooks, module.modules())):
        return None  # they would be called once, while tracing
    try:
        return Tracer().trace(module)
    except Exception:  # of any kind: it runs somebody's forward with stand-ins for tensors
        return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than its forward is called with it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fused_graph(module: nn.Module, graph: fx.Graph, example: Tensor | None) -> fx.GraphModule:
    """`module` as its `graph`, fused."""
    result = fx.GraphModule(module, graph, type(module).__name__)
    if example is not None:
        with torch.no_grad():
            ShapeProp(result).propagate(example)
    for node in list(graph.nodes):
        layer = layer_of(result, node)
        if isinstance(layer, nn.Conv2d) and fusible(layer):
            fuse_chain(result, node, layer)
        elif isinstance(layer, nn.Linear):
            fuse_linear(result, node, layer)
    graph.eliminate_dead_code()
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def fuse_chain(module: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> None:
    """Replace the convolution `node`, and norm, sum and activation that follow, by one node in place of the last."""
    last, norm, other = node, None, None
    if (user := only_user(last)) and isinstance(found := layer_of(module, user), NORMS):
        last, norm = user, found
    if (user := only_user(last)) and is_call(user, ADD) and len(user.args) == 2 and not user.kwargs:
        first, second = user.args
        summand = second if first is last else first
        # Alone the sum is worth nothing on a GPU, whose fused convolutions end in an activation.
        if isinstance(summand, fx.Node) and summand is not last and is_relu(module, only_user(user)):
            last, other = user, summand
    relu = is_relu(module, user := only_user(last))
    last = user if relu and user is not None else last
    replace(module, node, last, fused_convolution(conv, norm, relu), (node.args[0], *([other] if other else [])))


def fuse_linear(module: fx.GraphModule, node: fx.Node, linear: nn.Linear) -> None:
    """Replace a linear layer, and the activation that follows, by one node."""
    relu = is_relu(module, user := only_user(node))
    last = user if relu and user is not None else node
    source = node.args[0]
    assert isinstance(source, fx.Node)
    maps, channels = flattened(module, source)
    replace(module, node, last, fused_linear(linear, relu, channels), (source if maps is None else maps,))


def flattened(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, int | None]:
    """The maps [R, C, P, P] that `node` flattens, and C; None if it does something else, or shapes are not known."""
    layer = layer_of(module, node)
    starts = [*node.args[1:], *node.kwargs.values()]
    flattens = is_call(node, {torch.flatten, "flatten"}) and starts == [1]
    flattens |= isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
    if not flattens:
        return None, None
    maps = node.args[0]
    assert isinstance(maps, fx.Node)
    known = maps.meta.get("tensor_meta")
    return (maps, known.shape[1]) if known is not None and len(known.shape) == 4 else (None, None)


def replace(module: fx.GraphModule, first: fx.Node, last: fx.Node, layer: nn.Module, args: Sequence[Any]) -> None:
    """Put `layer` in the place of the nodes from `first` to `last`."""
    name = f"{first.target}".replace(".", "_") + "_fused"
    module.add_module(name, layer)
    with module.graph.inserting_after(last):
        new = module.graph.call_module(name, tuple(args))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in reversed(list(between(first, last))):
        if not node.users and node is not new:
            module.graph.erase_node(node)


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Nodes of a graph from `first` to `last`."""
    node = first
    while node is not last:
        yield node
        node = node.next
    yield last


def only_user(node: fx.Node | None) -> fx.Node | None:
    """What alone reads the result of `node`."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def layer_of(module: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    """The module that `node` calls."""
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def is_call(node: fx.Node | None, functions: set[Any]) -> bool:
    """Whether `node` calls one of `functions`, or a method of one of those names."""
    return node is not None and node.op in ("call_function", "call_method") and node.target in functions


def is_relu(module: fx.GraphModule, node: fx.Node | None) -> bool:
    """Whether `node` is max(x, 0)."""
    return is_call(node, RELU) or isinstance(layer_of(module, node), nn.ReLU)


def fusible(conv: nn.Conv2d) -> bool:
    """Whether `FusedConv2d` computes the same."""
    zeros = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return zeros and not has_hooks(conv)


def fused_convolution(conv: nn.Conv2d, norm: nn.Module | None, relu: bool) -> FusedConv2d:
    """A convolution with the norm after it folded into its weights, in float64: deviations may be small."""
    weight = conv.weight.detach()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    if norm is not None:
        scale, shift = affine(norm)
        weight = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
        bias = (bias.double() * scale + shift).to(bias.dtype)
    return FusedConv2d(conv, weight, bias, relu)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 [C], that a norm is in evaluation."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    scale = weight * (var + norm.eps).rsqrt()
    return scale, bias - mean * scale


def fused_linear(linear: nn.Linear, relu: bool, channels: int | None = None) -> FusedLinear:
    """A linear layer with its activation, of maps of so many `channels` if that is given."""
    weight = linear.weight.detach()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    return FusedLinear(weight, bias, relu, channels)
