"""One step: it asks the device nothing, leaves out what is not finite, and accumulates as larger batches do."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, shapes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmrcnn
from fastmrcnn import ops
from fastmrcnn.batches import LoadedBatch
from fastmrcnn.data.items import TrainingItems
from fastmrcnn.data.loading import collate_loaded
from fastmrcnn.data.sampling import Key
from fastmrcnn.data.views import Resize
from fastmrcnn.models.config import build_model
from fastmrcnn.models.mask_rcnn import GeneralizedRCNN
from fastmrcnn.models.surgery import add_mask_iou_head
from fastmrcnn.ops.implementations import IMPLEMENTATIONS
from fastmrcnn.training.capture import WARM_UP, CapturedLearner
from fastmrcnn.training.config import OptimConfig
from fastmrcnn.training.optim import WeightAverage, schedule_factor
from fastmrcnn.training.readings import Readings
from fastmrcnn.training.step import Learner, seed_all


def batches(count: int, size: int = 2) -> list[LoadedBatch]:
    items = TrainingItems(shapes(count * size), 0, None, Resize([64], 64))
    keys = [Key(0, i, i) for i in range(count * size)]
    return [collate_loaded([items[key] for key in keys[i * size : (i + 1) * size]]) for i in range(count)]


def model(**changes: Any) -> GeneralizedRCNN:
    torch.manual_seed(0)
    return build_model(config(Path(), **changes).model, 4).train()


def learner(network: GeneralizedRCNN, **options: Any) -> Learner:
    precision = options.pop("precision", "float32")
    sgd = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.01, 0.9, fused=True)
    return Learner(network, sgd, OptimConfig(**options), precision)


def weights(network: GeneralizedRCNN) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, for which kernels are chosen: a value that is read, or a shape that depends on one, is an error."""
    for name, module in vars(ops).items():
        if hasattr(module, "choose_kernel") and name != "implementations":
            monkeypatch.setattr(module, "choose_kernel", kernel)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def kernel(op: str, *arguments: Any) -> tuple[str, Any]:
    """What `choose_kernel` returns on a GPU."""
    return "triton", IMPLEMENTATIONS[op]["triton"]


@pytest.mark.parametrize(
    ("builder", "precision", "kind", "steps"),
    [
        ("maskrcnn_resnet50_fpn", "float32", Learner, 2),
        ("maskrcnn_resnet50_fpn", "bfloat16", Learner, 2),
        ("maskrcnn_resnet50_fpn", "float16", Learner, 2),
        ("keypointrcnn_resnet50_fpn", "float32", Learner, 2),
        ("maskrcnn_resnet50_fpn", "float16", CapturedLearner, WARM_UP + 2),
    ],
)
def test_a_whole_step_reads_nothing(builder: str, precision: str, kind: type[Learner], steps: int, fake: None) -> None:
    """From bytes to new weights: forward, losses, backward, scaling, clipping, optimizer, average, schedule, notes.

    On a fake CPU, since PyTorch's backward pass asks a fake GPU for a real one; in fused updates, those of a GPU.
    """
    few = {f"rpn_{when}_nms_top_n_train": 20 for when in ("pre", "post")}
    network = getattr(fastmrcnn, builder)(weights=None, weights_backbone=None, num_classes=3, **few).train()
    if network.roi_heads.has_mask():
        add_mask_iou_head(network, 3)
    sgd = torch.optim.SGD(network.parameters(), 0.01, 0.9, fused=True)
    options = OptimConfig(clip_norm=1.0, accumulate=2)
    learns = kind(network, sgd, options, precision, WeightAverage(network, 0.9))
    factor = schedule_factor(options, 10, 5, in_steps=False)
    batch = LoadedBatch(
        image_ids=[1, 2],
        size=(128, 160),
        pixels=torch.zeros(2 * 60 * 80 * 3, dtype=torch.uint8),
        pixel_offsets=torch.tensor([0, 60 * 80 * 3]),
        views=torch.zeros(2, 8, dtype=torch.int64),
        boxes=torch.rand(2, 5, 4),
        labels=torch.ones(2, 5, dtype=torch.int64),
        count=torch.ones(2, dtype=torch.int64),
        words=torch.zeros(2 * 5 * 60 * 3, dtype=torch.int32),
        word_offsets=torch.tensor([0, 5 * 60 * 3]),
        keypoints=torch.rand(2, 5, 17, 3),
    )
    readings: Readings | None = None
    for step in range(steps):
        learns.set_learning_rate(0.02 * factor(step))
        values = learns.learn([batch, batch], (0, step))
        readings = readings or Readings(list(values), steps, "cpu")
        readings.add(step, values, batch.image_ids)
    assert values["grad_norm"].shape == ()
    assert all(value.dtype == torch.float32 for value in values.values())


def test_reading_a_fake_tensor_fails(fake: None) -> None:
    """So the test above can fail."""
    with pytest.raises(RuntimeError):
        torch.rand(3).sum().item()


def test_accumulated_batches_are_one_mean() -> None:
    """Gradients of a step of two batches are the mean of those of each, with the same random numbers."""
    both = batches(2)
    network = model()
    learns = learner(network)
    gradients = []
    for part, batch in enumerate(both):
        seed_all(7, 3, part)
        network.zero_grad()
        torch.stack(list(learns.losses(batch).values())).sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    network.zero_grad()
    learns.optimizer.param_groups[0].update(lr=1.0, momentum=0.0)
    before = [p.detach().clone() for p in network.parameters()]
    learns.learn(both, (7, 3))
    for p, old, a, b in zip(network.parameters(), before, *gradients, strict=True):
        torch.testing.assert_close(old - p.detach(), (a + b) / 2, rtol=1e-3, atol=1e-5)


def test_loaded_batches_are_those_of_the_model() -> None:
    """Bytes and packed masks become what the model makes of float images and masks, to the bit, and so do losses."""
    images, targets = zip(*(shapes(2)[i] for i in range(2)), strict=True)
    network = model()
    (batch,) = batches(1)
    expected, wanted, _ = network.transform.batch(list(images), list(targets))
    found, given = network.transform.load(batch)
    assert torch.equal(found.tensors, expected.tensors)
    assert torch.equal(found.sizes, expected.sizes)
    seed_all(1)
    losses = network.losses(expected, wanted)
    seed_all(1)
    assert network.losses(found, given) == losses


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_is_left_out(poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = batches(2)
    network = model()
    learns = learner(network, clip_norm=1.0)
    learns.learn([first], (0, 0))
    before = weights(network)
    momentum = deepcopy(learns.optimizer.state_dict()["state"])
    handle = None
    if poison == "loss":
        original = network.losses
        monkeypatch.setattr(network, "losses", lambda *a: {k: v * torch.nan for k, v in original(*a).items()})
    else:
        handle = next(network.rpn.parameters()).register_hook(lambda grad: grad * torch.inf)
    values = learns.learn([second], (0, 1))
    assert not values["grad_norm"].isfinite()
    assert values["loss_mask"].isfinite() == (poison == "gradient")
    for name, value in weights(network).items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    for i, state in learns.optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum[i]["momentum_buffer"])
    monkeypatch.undo()
    if handle is not None:
        handle.remove()
    assert learns.learn([second], (0, 1))["grad_norm"].isfinite()
    assert not torch.equal(next(iter(weights(network).values())), next(iter(before.values())))
    assert learns.scaler.get_scale() == 1.0


def test_float16_scales_losses() -> None:
    (batch,) = batches(1)
    learns = learner(model(), precision="float16")
    before = learns.scaler.get_scale()
    assert before > 1
    next(learns.model.rpn.parameters()).register_hook(lambda grad: grad * torch.inf)
    learns.learn([batch], (0, 0))
    assert learns.scaler.get_scale() == before / 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision(precision: str) -> None:
    """Images and features have 16 bits; losses, and mask targets within them, do not."""
    (batch,) = batches(1)
    network = model()
    seen: list[torch.dtype] = []
    network.backbone.register_forward_hook(lambda m, i, o: seen.extend(x.dtype for x in (*i, *o.values())))
    values = learner(network, precision=precision).learn([batch], (0, 0))
    assert set(seen) == {getattr(torch, precision)}
    assert all(value.dtype == torch.float32 for value in values.values())
    unknown = {"grad_norm"} if precision == "float16" else set()  # where the scale is still to be found
    assert all(value.isfinite() for name, value in values.items() if name not in unknown)
