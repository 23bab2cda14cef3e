"""Checkpoints, one file per format; reading one never executes code."""

from fastmrcnn.checkpoints.native import ModelInfo, load_checkpoint, load_model, save_checkpoint

__all__ = ["ModelInfo", "load_checkpoint", "load_model", "save_checkpoint"]
