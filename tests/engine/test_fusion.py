"""Fused layers give what the layers that they were made of give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_within_budget
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d

from fastmrcnn.engine.fusion import fuse
from fastmrcnn.engine.layers import ClassMasks, FusedConv2d, FusedLinear, FusedRPNHead


def shaken(module: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that do something, and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d):
            for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.2)):
                if getattr(m, name) is not None:
                    getattr(m, name).data.copy_(torch.rand(m.weight.shape, generator=generator) + low)
        elif getattr(m, "bias", None) is not None and isinstance(m.bias, Tensor):
            m.bias.data.copy_(torch.randn(m.bias.shape, generator=generator))
    return module.eval().requires_grad_(False)


def copy_of(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype)


def assert_fused_equally(module: nn.Module, x: Tensor, example: Tensor | None = None) -> nn.Module:
    """In float64 to rounding, in float32 within the budget of errors; returns the fused module."""
    exact = module.double()(x.double())
    wide = fuse(copy_of(module, torch.float64), None if example is None else example.double())
    torch.testing.assert_close(wide(x.double()), exact, rtol=1e-11, atol=1e-11)
    module = module.float()
    reference = module(x)
    fused = fuse(copy_of(module, torch.float32), example)
    before = x.clone()
    assert_within_budget(fused(x), reference, exact)
    assert torch.equal(x, before)
    return fused


class Block(nn.Module):
    """A residual block, as networks write it, with options."""

    def __init__(self, norm: Callable[[int], nn.Module], add: Callable[[Tensor, Tensor], Tensor], relu: Any) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), norm(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, 1, 2, dilation=2, groups=2), norm(16)
        self.down, self.norm3 = nn.Conv2d(8, 16, 1, 2), norm(16)
        self.add, self.relu = add, relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(self.add(y, self.norm3(self.down(x))))


def add_to(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


@pytest.mark.parametrize("relu", [functional.relu, torch.relu, nn.ReLU(inplace=True), lambda x: x.relu_()])
@pytest.mark.parametrize("add", [torch.add, add_to, lambda a, b: b + a])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, lambda c: FrozenBatchNorm2d(c, eps=0.0)])
def test_residual_block(norm: Any, add: Any, relu: Any) -> None:
    torch.manual_seed(0)
    fused = assert_fused_equally(shaken(Block(norm, add, relu)), torch.randn(2, 8, 15, 14))
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(FusedConv2d) == 3
    assert not {nn.Conv2d, nn.BatchNorm2d, FrozenBatchNorm2d, nn.ReLU} & set(kinds)
    calls = [node for node in fused.graph.nodes if node.op not in ("placeholder", "output")]
    assert len(calls) == 3


class Odd(nn.Module):
    """What may not be fused: results that are used twice, norms that come first, sums that are no convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.shared, self.reflecting = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.own = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(self.conv(self.norm(x)))
        z = self.shared(y) + y
        z = functional.relu(self.shared(self.reflecting(z)) + 1.5)
        z = torch.add(self.same(z), y, alpha=2)
        return self.conv(z) + self.conv(functional.relu(y))


def test_what_may_not_be_fused() -> None:
    torch.manual_seed(0)
    fused = assert_fused_equally(shaken(Odd()), torch.randn(2, 4, 9, 8))
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(nn.BatchNorm2d) == 3
    assert kinds.count(nn.Conv2d) == 2


class Sums(nn.Module):
    """A layer with an activation and without, a sum that is broadcast, and sums in memory that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.conv(x)) - self.conv(x)
        mean = y.mean(dim=(2, 3), keepdim=True)
        y = functional.relu(self.conv(y) + self.gate(mean)) - functional.relu(self.gate(mean) + y)
        z, w = x + 1, x + 2
        z += self.conv(y)
        v = w[:, :]
        v += self.conv(y)
        v = functional.relu(v)
        u, t = self.conv(y), self.conv(y)
        y.mul_(2)
        z *= y
        functional.relu(u, inplace=True)
        return functional.relu(z) + v + w + u + functional.relu(t)


def test_sums_and_layers_called_twice() -> None:
    torch.manual_seed(0)
    assert_fused_equally(shaken(Sums()), torch.randn(2, 4, 9, 8))


class Untraceable(nn.Module):
    """A loop over as many inputs as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        while x.shape[-1] > 4 and float(x.abs().max()) > -1:
            x = self.inner(x)
        return self.last(x.mean(dim=(2, 3)))


def test_parts_of_what_cannot_be_traced() -> None:
    torch.manual_seed(0)
    fused = assert_fused_equally(shaken(Untraceable()), torch.randn(2, 4, 9, 8))
    assert isinstance(fused, Untraceable)
    assert isinstance(fused.last, FusedLinear)
    assert [type(m) for m in fused.inner.children()] == [FusedConv2d]


def test_hooks_are_kept() -> None:
    """What has a hook is called as it is."""
    module, seen = shaken(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    fused = fuse(module)
    fused(torch.zeros(1, 3, 2, 2))
    fused(torch.zeros(1, 3, 2, 2))
    assert len(seen) == 2


@pytest.mark.parametrize(
    "head", [TwoMLPHead(8 * 49, 32), FastRCNNConvFCHead((8, 7, 7), [8, 8], [32], norm_layer=nn.BatchNorm2d)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("known", [False, True])
def test_box_heads(head: nn.Module, memory_format: torch.memory_format, known: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 7, 7).contiguous(memory_format=memory_format)
    fused = assert_fused_equally(shaken(head), x, torch.zeros(1, 8, 7, 7) if known else None)
    assert not any(isinstance(m, nn.Linear | nn.ReLU) for m in fused.modules())
    flattens = any(isinstance(m, nn.Flatten) for m in fused.modules())
    flattens |= any("flatten" in str(node.target) for node in fused.graph.nodes)
    assert flattens != known


@pytest.mark.parametrize("anchors", [1, 3])
def test_rpn_head(anchors: int) -> None:
    torch.manual_seed(0)
    head = shaken(RPNHead(8, anchors, conv_depth=2))
    maps = [torch.randn(2, 8, side, side + 1) for side in (9, 5)]
    exact = head.double()([x.double() for x in maps])
    reference = head.float()(maps)
    fused = FusedRPNHead(fuse(head.conv), head.cls_logits, head.bbox_pred)
    for found, expected, oracle in zip(fused(maps), reference, exact, strict=True):
        for level in range(2):
            assert_within_budget(found[level], expected[level], oracle[level])


@pytest.mark.parametrize("classes", [1, 4])
def test_masks_of_a_class(classes: int) -> None:
    torch.manual_seed(0)
    predictor = shaken(MaskRCNNPredictor(8, 16, classes))
    x, labels = torch.randn(5, 8, 7, 7), torch.tensor([0, 3, 1, 2, 3])
    of_label = torch.zeros_like(labels) if classes == 1 else labels
    exact = predictor.double()(x.double())[torch.arange(5), of_label]
    reference = predictor.float()(x)[torch.arange(5), of_label]
    own = ClassMasks(predictor.conv5_mask, predictor.mask_fcn_logits)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_within_budget(own(x.contiguous(memory_format=memory_format), labels), reference, exact)
    assert own(x[:0], labels[:0]).shape == (0, 14, 14)
