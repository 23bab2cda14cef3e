"""Settings of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings


def patch_interpreter() -> None:
    """Halve the time that the interpreter takes.

    A device function called by another one patches Triton's language anew, which its caller has done already.  Only the
    functions of Triton's own modules see it under another name; for those once is enough.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: kernels run on CPU tensors
    patch_interpreter()

settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("default")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def photos() -> list[torch.Tensor]:
    """Three images [3, H, W] of different sizes: photos where there are some beside the repository, else generated."""
    from fastmrcnn.data import Shapes, image_files, load_image

    folder = SHARED / "data" / "coco_cc" / "train"
    if folder.is_dir():
        return [load_image(path) for path in image_files(folder)[:3]]
    return [Shapes(1, image_size=size, seed=i)[0][0] for i, size in enumerate([(427, 640), (480, 640), (640, 424)])]
