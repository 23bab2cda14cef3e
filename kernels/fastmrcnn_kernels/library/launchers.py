"""Launchers of Triton kernels as implementations of operators."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from fastmrcnn_kernels.host import KERNEL_DEVICES


def implement(operator: str, module: str, launcher: str) -> None:
    """Make `launcher` of `fastmrcnn_kernels.triton.<module>`, imported at the first call, do fastmrcnn::`operator`."""

    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"fastmrcnn_kernels.triton.{module}"), launcher)(*arguments)

    torch.library.impl(f"fastmrcnn::{operator}", KERNEL_DEVICES, launch)
