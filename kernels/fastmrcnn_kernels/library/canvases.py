"""What lies beyond the canvases of a batch, as a PyTorch operator that changes maps in place, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmrcnn_kernels.library.launchers import implement

torch.library.define("fastmrcnn::clear_beyond_", "(Tensor(a!) maps, Tensor canvases, SymInt stride, float value) -> ()")
implement("clear_beyond_", "canvases", "clear_beyond_")


@torch.library.register_fake("fastmrcnn::clear_beyond_")
def _nothing(maps: Tensor, canvases: Tensor, *rest: Any) -> None:
    return None


def clear_beyond_(maps: Tensor, canvases: Tensor, stride: int, value: float) -> None:
    """See `fastmrcnn.ops.clear_beyond_`."""
    torch.ops.fastmrcnn.clear_beyond_(maps, canvases, stride, value)
