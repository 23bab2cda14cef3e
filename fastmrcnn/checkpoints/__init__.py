"""Trained weights: this library's own checkpoints, and those of others."""

from fastmrcnn.checkpoints.initial import LoadedWeights, load_weights
from fastmrcnn.checkpoints.loading import load, load_model
from fastmrcnn.checkpoints.native import ModelInfo, load_checkpoint, save_checkpoint

__all__ = ["LoadedWeights", "ModelInfo", "load", "load_checkpoint", "load_model", "load_weights", "save_checkpoint"]
