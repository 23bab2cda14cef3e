"""Masks pasted: against torchvision's and detectron2's method, and the kernel against the reference."""

from __future__ import annotations

from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, boxes, examples
from tolerances import assert_exact_arithmetic, assert_same_decisions, assert_within_budget
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torchvision.models.detection import roi_heads as torchvision_heads

from fastmrcnn import ops
from fastmrcnn_kernels.reference.paste import expanded

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, in the interpreter, of boxes without extent
]

IMPLEMENTATIONS: list[ops.Impl] = ["reference", "torchvision", "triton"]
SEMANTICS: list[ops.Semantics] = ["torchvision", "detectron2"]
SIZE = (33, 47)
CELLS = [1, 2, 7, 28]

Out = Literal["soft", "bool", "bits"]


def paste(masks: Tensor, found: Tensor, size: tuple[int, int] = SIZE, *, impl: ops.Impl, **options: Any) -> Tensor:
    device = DEVICE if impl == "triton" else "cpu"
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return ops.paste_masks(masks.to(device), found.to(device), size, impl=impl, **options).cpu()


def random_masks(*shape: int) -> Tensor:
    return torch.rand(*shape, shape[-1], generator=torch.Generator().manual_seed(shape[-1]))


def touching(found: Tensor, cells: int, padding: int) -> Tensor:
    """Those of `found` that torchvision can paste: they touch the image, and their masks fit into memory."""
    corners = expanded(found, cells, padding)
    inside = (corners[:, 2:] >= 0).all(dim=1) & (corners[:, 0] < SIZE[1]) & (corners[:, 1] < SIZE[0])
    return found[inside & (found[:, 2:] >= found[:, :2]).all(dim=1) & (found.abs() < 1e3).all(dim=1)]


def by_detectron2(masks: Tensor, found: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    """Its method: the mask sampled at all pixel centres of the image.  Boxes without extent give NaN, or zeros."""
    y, x = (torch.arange(side, dtype=masks.dtype) + 0.5 for side in size)
    x, y = (
        (pixel - found[:, i : i + 1]) / (found[:, i + 2 : i + 3] - found[:, i : i + 1]) * 2 - 1
        for i, pixel in enumerate((x, y))
    )
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def flat(found: Tensor) -> Tensor:
    return ~(found[:, 2:] != found[:, :2]).all(dim=1)


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
@given(found=boxes(6, extent=40.0), cells=st.sampled_from(CELLS), padding=st.integers(0, 2))
def test_equals_torchvision(impl: ops.Impl, found: Tensor, cells: int, padding: int) -> None:
    """In float64; and the host's implementation in float32, where that is torchvision's own arithmetic, to the bit."""
    found = touching(found, cells, padding)
    masks = random_masks(len(found), 1, cells)
    wide, exact = masks.double(), found.double()
    expected = torchvision_heads.paste_masks_in_image(wide, exact, SIZE, padding)
    pasted = ops.paste_masks_in_image(wide, exact, SIZE, padding, impl=impl)
    assert pasted.shape == expected.shape
    assert_exact_arithmetic(pasted, expected)
    if impl == "torchvision":
        expected = torchvision_heads.paste_masks_in_image(masks, found, SIZE, padding)
        assert torch.equal(ops.paste_masks_in_image(masks, found, SIZE, padding, impl=impl), expected)


@pytest.mark.parametrize("impl", ["reference", "torchvision"])
@given(found=boxes(6, extent=40.0), cells=st.sampled_from(CELLS))
def test_equals_detectron2(impl: ops.Impl, found: Tensor, cells: int) -> None:
    """Inverted boxes, which show the mask inverted, included.  Far boxes are left out, where float64 rounds, too."""
    found = found[(found.abs() < 1e3).all(dim=1)]
    masks = random_masks(len(found), cells)
    expected = by_detectron2(masks.double(), found.double())
    expected[flat(found)] = 0
    pasted = paste(masks.double(), found.double(), impl=impl, semantics="detectron2")
    steep = 1 / (found[:, 2:] - found[:, :2])[~flat(found)].abs().amin().item() if not flat(found).all() else 1
    assert_exact_arithmetic(pasted, expected, scale=max(1.0, cells * steep * max(SIZE)))
    if impl == "torchvision":
        expected = by_detectron2(masks, found).nan_to_num(nan=0.0)
        assert torch.equal(paste(masks, found, impl=impl, semantics="detectron2"), expected)


@pytest.mark.parametrize("impl", ["torchvision", "triton"])
@pytest.mark.parametrize("semantics", SEMANTICS)
@examples(40, interpreted=8)
@given(found=boxes(4, extent=40.0), cells=st.sampled_from([2, 14, 28]))
def test_float32_keeps_to_the_budget(impl: ops.Impl, semantics: ops.Semantics, found: Tensor, cells: int) -> None:
    """Where rounding moves no corner to another pixel; boxes of at least a pixel, so that slopes are bounded."""
    found = found[((found[:, 2:] - found[:, :2]) >= 1).all(dim=1) & (found.abs() < 1e3).all(dim=1)]
    found = found[(expanded(found, cells, 1) == expanded(found.double(), cells, 1)).all(dim=1)]
    masks = random_masks(len(found), cells)
    oracle = paste(masks.double(), found.double(), impl="reference", semantics=semantics)
    reference = paste(masks, found, impl="reference", semantics=semantics)
    assert_within_budget(paste(masks, found, impl=impl, semantics=semantics), reference, oracle)
    filled = paste(masks, found, impl=impl, out="bool", semantics=semantics)
    band = 2 * (reference.double() - oracle).abs().amax().item() + torch.finfo(torch.float32).eps if len(found) else 0.0
    assert_same_decisions(filled, oracle > 0.5, (oracle - 0.5).abs(), band)


@pytest.mark.parametrize("semantics", SEMANTICS)
@examples(200, interpreted=15)
@given(
    found=boxes(4, extent=40.0, not_finite=True),
    cells=st.sampled_from([1, 2, 5, 14, 28]),
    padding=st.integers(0, 2),
    size=st.sampled_from([SIZE, (1, 70), (50, 1), (17, 64)]),
    out=st.sampled_from(["soft", "bool", "bits"]),
    threshold=st.sampled_from([0.25, 0.5]),
    logits=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_kernel_equals_reference(
    semantics: ops.Semantics, found: Tensor, cells: int, size: tuple[int, int], dtype: torch.dtype, **options: Any
) -> None:
    """To the bit, since both round alike."""
    masks = random_masks(len(found), cells).to(dtype)
    if options["logits"]:
        masks = masks * 4 - 2
    expected = paste(masks, found, size, impl="reference", semantics=semantics, **options)
    pasted = paste(masks, found, size, impl="triton", semantics=semantics, **options)
    assert pasted.dtype == expected.dtype
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_pixel(impl: ops.Impl) -> None:
    """A box that lies within a pixel shows the middle of its mask there, and nothing elsewhere."""
    masks = torch.arange(49.0).view(1, 7, 7) / 49
    pasted = paste(masks, torch.tensor([[5.4, 3.4, 5.6, 3.6]]), (8, 9), impl=impl)
    assert pasted[0, 3, 5] == masks[0, 3, 3]
    assert (pasted != 0).sum() == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_masks(impl: ops.Impl) -> None:
    none = torch.zeros(0, 7, 7), torch.zeros(0, 4)
    assert paste(*none, (8, 9), impl=impl).shape == (0, 8, 9)
    assert paste(*none, (8, 70), impl=impl, out="bits").shape == (0, 8, 3)
    assert paste(torch.zeros(2, 0, 7, 7), torch.zeros(2, 0, 4), (8, 9), impl=impl, out="bool").shape == (2, 0, 8, 9)
    assert paste(torch.zeros(0, 3, 7, 7), torch.zeros(0, 3, 4), (8, 9), impl=impl).shape == (0, 3, 8, 9)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_boxes_beside_the_image_and_not_finite_paste_nothing(impl: ops.Impl, semantics: ops.Semantics) -> None:
    nan, inf = torch.nan, torch.inf
    found = torch.tensor(
        [
            [-50.0, 2, -20, 9],
            [2, 60, 9, 90],
            [nan, 1, 5, 5],
            [1, 1, inf, 5],
            [1, 1, 5, -inf],
            [5, 5, 5, 5.0],
            [1e9, 1e9, 2e9, 2e9],
            [-1e38, -1e38, 1e38, 1e38],
            [-2e8, -2e8, 2e8, 2e8],
        ]
    )
    if semantics == "torchvision":
        found[5] = torch.tensor([30.0, 2, 3, 9])  # inverted
    pasted = paste(torch.ones(9, 14, 14), found, (20, 30), impl=impl, semantics=semantics)
    assert pasted.shape == (9, 20, 30)
    assert (pasted == 0).all()


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reach", [200.0, 1e5, 1e8])
def test_a_box_larger_than_the_image_covers_it(impl: ops.Impl, semantics: ops.Semantics, reach: float) -> None:
    found = torch.tensor([[-reach, -reach, reach, reach]])
    pasted = paste(torch.ones(1, 14, 14), found, (20, 30), impl=impl, semantics=semantics)
    # PyTorch's `grid_sample` rounds four weights, which should add up to 1.
    rounding = 4 * torch.finfo(torch.float32).eps if (impl, semantics) == ("torchvision", "detectron2") else 0
    assert (pasted - 1).abs().max() <= rounding


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("semantics", "inside"), [("torchvision", False), ("detectron2", True)])
def test_a_value_that_equals_the_threshold(impl: ops.Impl, semantics: ops.Semantics, inside: bool) -> None:
    """detectron2 takes it for inside."""
    pasted = paste(
        torch.full((1, 4, 4), 0.5),
        torch.tensor([[2.0, 2, 10, 10]]),
        (12, 12),
        impl=impl,
        out="bool",
        semantics=semantics,
    )
    assert bool(pasted[0, 6, 6]) == inside
    assert not pasted[0, 0, 0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bool_and_bits_are_soft_above_the_threshold(impl: ops.Impl) -> None:
    masks = random_masks(3, 9)
    found = torch.tensor([[1.0, 2, 20, 15], [5, 5, 6, 6], [0, 0, 70, 20]])
    inside = paste(masks, found, (20, 70), impl=impl) > 0.3
    assert torch.equal(paste(masks, found, (20, 70), impl=impl, out="bool", threshold=0.3), inside)
    bits = paste(masks, found, (20, 70), impl=impl, out="bits", threshold=0.3)
    assert bits.shape == (3, 20, 3)
    assert torch.equal(ops.unpack_bits(bits, 70), inside)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e9, 7.0])
@pytest.mark.parametrize("out", ["soft", "bool", "bits"])
def test_a_batch_of_images_of_different_sizes(impl: ops.Impl, garbage: float, out: Out) -> None:
    """One canvas for all; whatever is in slots without a mask leaves no trace."""
    sizes, count = torch.tensor([[20, 30], [13, 40], [20, 40]]), torch.tensor([2, 3, 0])
    masks = random_masks(3, 3, 7)
    start = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(0)) * 15
    found = torch.cat((start, start + 17), dim=-1)
    used = torch.arange(3) < count[:, None]
    masks = torch.where(used[..., None, None], masks, garbage)
    found = torch.where(used[..., None], found, garbage)
    pasted = paste(masks, found, (20, 40), impl=impl, sizes=sizes, count=count, out=out)
    if out == "bits":
        pasted = ops.unpack_bits(pasted, 40)
    for i, ((height, width), number) in enumerate(zip(sizes.tolist(), count.tolist(), strict=True)):
        expected = paste(masks[i, :number], found[i, :number], (height, width), impl=impl, out="soft")
        assert torch.equal(pasted[i, :number, :height, :width], expected if out == "soft" else expected > 0.5)
        assert pasted[i, :number].count_nonzero() == pasted[i, :number, :height, :width].count_nonzero()
        assert not pasted[i, number:].any()


def test_gradients() -> None:
    """Of soft masks, in float64 against differences, and of the kernel as of the reference."""
    masks, found = random_masks(2, 3), torch.tensor([[1.0, 2, 9, 7], [-3, 4, 5, 20]])
    for impl in ("reference", "torchvision"):
        leaf = masks.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda m, i=impl: ops.paste_masks(m, found.double(), (8, 10), impl=i), leaf)
    gradients = []
    for impl in IMPLEMENTATIONS:
        leaf = masks.clone().requires_grad_()
        pasted = paste(leaf, found, (8, 10), impl=impl)
        gradients += torch.autograd.grad((pasted * torch.arange(80.0).view(8, 10)).sum(), leaf)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert not paste(leaf, found, (8, 10), impl="triton", out="bool").requires_grad


def test_shapes_do_not_depend_on_data() -> None:
    """Nothing is read from the GPU: fake tensors have nothing to read."""
    with FakeTensorMode(), torch.device("cuda"):
        masks, found, sizes = torch.rand(2, 3, 28, 28), torch.rand(2, 3, 4), torch.ones(2, 2, dtype=torch.int64)
        for out, shape, dtype in (
            ("soft", (80, 100), torch.float32),
            ("bool", (80, 100), torch.bool),
            ("bits", (80, 4), torch.int32),
        ):
            pasted = ops.paste_masks(masks, found, (80, 100), sizes=sizes, count=sizes[:, 0], out=cast(Any, out))
            assert (pasted.shape[2:], pasted.dtype, pasted.device.type) == (shape, dtype, "cuda")


def test_what_is_refused() -> None:
    masks, found = torch.rand(2, 7, 7), torch.rand(2, 4)
    for message, options in {
        "out='words'": {"out": "words"},
        "semantics='caffe'": {"semantics": "caffe"},
        "padding=-1": {"padding": -1},
        "threshold=-0.1": {"threshold": -0.1},
        "threshold=0: expected a positive": {"threshold": 0, "semantics": "detectron2"},
        r"count: expected shape \[1\]": {"count": torch.tensor([1, 2])},
        r"sizes: expected shape \[1, 2\]": {"sizes": torch.ones(2, 2, dtype=torch.int64)},
        "size=": {"size": (0, 5)},
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.paste_masks(masks, found, **cast(Any, {"size": (8, 9)} | options))
    with pytest.raises(ValueError, match=r"masks: expected shape \[\*, 7, 7\], got \[2, 6, 7\]"):
        ops.paste_masks(masks[..., 1:].mT, found, (8, 9))
    with pytest.raises(TypeError, match="impl='triton': expected float32"):
        ops.paste_masks(masks.double(), found, (8, 9), impl="triton")
