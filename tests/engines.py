"""The ways of a GPU without one: on the CPU, and on tensors that are fake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastmrcnn.batches
import fastmrcnn.models.sampling
import fastmrcnn.ops.detections
import fastmrcnn.ops.images
import fastmrcnn.ops.masks
import fastmrcnn.ops.roi
import fastmrcnn.ops.suppression
import fastmrcnn_kernels.torchvision_ops


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU take the way of a GPU: nothing is read or trimmed, operations are the reference's."""
    modules: list[Any] = [fastmrcnn.batches, fastmrcnn.models.sampling, fastmrcnn_kernels.torchvision_ops]
    modules += [fastmrcnn.ops.detections, fastmrcnn.ops.images, fastmrcnn.ops.masks, fastmrcnn.ops.roi]
    for module in (*modules, fastmrcnn.ops.suppression):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


def fake_cuda_model(model: Any) -> None:
    """Give a detector fake tensors on a GPU, under a `FakeTensorMode`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    generator = model.rpn.anchor_generator
    generator.cell_anchors = [torch.empty(anchors.shape, device="cuda") for anchors in generator.cell_anchors]
