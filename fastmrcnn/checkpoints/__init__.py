"""Checkpoints, one file per format; reading one never executes code."""

from fastmrcnn.checkpoints.initial import LoadedWeights, load_weights
from fastmrcnn.checkpoints.native import ModelInfo, load_checkpoint, load_model, save_checkpoint

__all__ = ["LoadedWeights", "ModelInfo", "load_checkpoint", "load_model", "load_weights", "save_checkpoint"]
