"""A trained detector as one function from bytes to detections: fused, and captured where there is a GPU."""

from fastmrcnn.engine.engine import Engine, compile

__all__ = ["Engine", "compile"]
