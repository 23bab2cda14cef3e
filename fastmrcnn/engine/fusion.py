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
IN_PLACE = {
    f"__{function.__name__}__": function
    for function in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
}


class Proxy(fx.Proxy):
    """Knows `x += y` from `x + y`: x may be read by another name."""


def _in_place(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name, _function in IN_PLACE.items():
    setattr(Proxy, _name, _in_place(_function))


class Tracer(fx.Tracer):
    """Stops at the layers that are fused."""

    def proxy(self, node: fx.Node) -> Proxy:
        """What stands for the result of `node`."""
        return Proxy(node, self)

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
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def fuse_chain(module: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> None:
    """Replace the convolution `node`, and norm, sum and activation that follow, by one node in place of the last."""
    chain, norm, other = [node], None, None
    if (user := only_user(node)) and is_affine(found := layer_of(module, user)):
        chain, norm = [*chain, user], found
    if (user := only_user(chain[-1])) and (summand := added(user, chain[-1])) and is_relu(module, only_user(user)):
        # Alone the sum is worth nothing on a GPU, whose fused convolutions end in an activation.
        chain, other = [*chain, user], summand
    if relu := is_relu(module, user := only_user(chain[-1])):
        chain = [*chain, *([user] if user else [])]
    if any(is_in_place(module, x) for x in between(node, chain[-1]) if x not in chain):
        chain, norm, other, relu = [node], None, None, False  # what is read might be something else by then
    replace(module, chain, fused_convolution(conv, norm, relu), (node.args[0], *([other] if other else [])))


def added(node: fx.Node, to: fx.Node) -> fx.Node | None:
    """What `node` adds to the result of another, if it does no more."""
    if not is_call(node, ADD) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if first is not to and node.target in (operator.iadd, "add_"):
        return None  # the sum is in the memory of the other summand
    summand = second if first is to else first
    return summand if isinstance(summand, fx.Node) and summand is not to else None


def fuse_linear(module: fx.GraphModule, node: fx.Node, linear: nn.Linear) -> None:
    """Replace a linear layer, and the activation that follows, by one node."""
    relu = is_relu(module, user := only_user(node))
    source = node.args[0]
    assert isinstance(source, fx.Node)
    maps, channels = flattened(module, source)
    chain = [node, user] if relu and user else [node]
    replace(module, chain, fused_linear(linear, relu, channels), (source if maps is None else maps,))
    if maps is not None and not source.users:
        module.graph.erase_node(source)


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


def replace(module: fx.GraphModule, chain: Sequence[fx.Node], layer: nn.Module, args: Sequence[Any]) -> None:
    """Put `layer` in the place of nodes, of which each but the last is read by the next alone."""
    name = f"{chain[0].name}_fused"  # of the call: a layer that is called twice may become two
    module.add_module(name, layer)
    with module.graph.inserting_after(chain[-1]):
        new = module.graph.call_module(name, tuple(args))
    new.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(new)
    for node in reversed(chain):
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


def is_in_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` changes what it reads."""
    layer = layer_of(module, node)
    asked = getattr(layer, "inplace", False) or node.kwargs.get("inplace", False)
    return bool(asked) or node.target in IN_PLACE.values() or str(node.target).endswith("_")


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


def is_affine(layer: nn.Module | None) -> bool:
    """Whether it is a norm by numbers that it has, and not by those of its input."""
    return isinstance(layer, NORMS) and layer.running_mean is not None


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
