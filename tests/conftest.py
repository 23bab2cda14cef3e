"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from strategies import DEFAULT_EXAMPLES


def check_bounds() -> None:
    """Make the interpreter refuse what a GPU may let pass: reading or writing beyond the tensors a kernel is given."""
    import numpy as np
    from triton.runtime import interpreter

    owned: list[tuple[int, int]] = []

    def addresses(values: Any) -> Iterator[tuple[int, int]]:
        for value in values:
            if isinstance(value, torch.Tensor):
                first = value.untyped_storage().data_ptr()
                yield first, first + value.untyped_storage().nbytes()
            elif isinstance(value, tuple | list):
                yield from addresses(value)

    def execute(self: interpreter.GridExecutor, *args: object, **kwargs: object) -> object:
        owned[:] = addresses((*args, *kwargs.values()))
        return run(self, *args, **kwargs)

    def check(access: str, pointers: Any, mask: Any) -> None:
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if used.size:
            first, last = int(used.min()), int(used.max())
            inside = any(start <= first and last < end for start, end in owned)
            assert inside, f"a kernel {access} {first:#x} to {last:#x}, outside of all that it was given"

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("reads", pointers, mask)
        return masked_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("writes", pointers, mask)
        return masked_store(self, pointers, value, mask, *rest)

    def add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("adds to", pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    run = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = execute
    masked_load = interpreter.InterpreterBuilder.create_masked_load
    masked_store = interpreter.InterpreterBuilder.create_masked_store
    atomic = interpreter.InterpreterBuilder.create_atomic_rmw
    interpreter.InterpreterBuilder.create_atomic_rmw = add
    interpreter.InterpreterBuilder.create_masked_load = load
    interpreter.InterpreterBuilder.create_masked_store = store


def patch_interpreter() -> None:
    """Halve the time that the interpreter takes.

    A device function called by another one patches Triton's language anew, which its caller has done already.  Only the
    functions of Triton's own modules see it under another name; for those once is enough.  And unions of bits, which it
    would compute by calling a function per element, are NumPy's.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def reduce(self: interpreter.ReduceOps, tensors: Any) -> Any:
        if self.combine_fn is not tl.standard._or_combine:
            return any_reduce(self, tensors)
        union = np.bitwise_or.reduce(tensors[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(union, tensors[0].dtype)

    any_reduce = interpreter.ReduceOps.generic_reduce
    interpreter.ReduceOps.generic_reduce = reduce

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
    check_bounds()

settings.register_profile("default", deadline=None, derandomize=True, max_examples=DEFAULT_EXAMPLES)
settings.register_profile("few", deadline=None, derandomize=True, max_examples=4)
settings.load_profile("default")


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """What is allocated and not written holds NaN, or the largest number, so that no result may depend on it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def photos() -> list[torch.Tensor]:
    """Three images [3, H, W] of different sizes: photos where there are some beside the repository, else generated."""
    from fastmrcnn.data import Shapes, image_files, load_image

    folder = SHARED / "data" / "coco_cc" / "train"
    if folder.is_dir():
        return [load_image(path) for path in image_files(folder)[:3]]
    return [Shapes(1, image_size=size, seed=i)[0][0] for i, size in enumerate([(427, 640), (480, 640), (640, 424)])]
