"""What the optimiser updates, at which rate, and the average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_exact_arithmetic
from torch import nn

from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.training.config import DataConfig, OptimConfig, TrainConfig
from fastmrcnn.training.optim import (
    WeightAverage,
    build_optimizer,
    explained,
    learning_rate,
    parameter_groups,
    schedule_factor,
    stretched,
)


def config(steps: int | None = None, **optim: Any) -> TrainConfig:
    return TrainConfig(DataConfig(Path(), Path()), optim=OptimConfig(**optim), steps=steps)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 1, 1)
    return nn.Sequential(*layers).double()


def test_norms_and_biases_do_not_decay() -> None:
    model = network()
    decaying, others = parameter_groups(model, OptimConfig(weight_decay=0.5))
    assert decaying["weight_decay"] == 0.5
    assert others["weight_decay"] == 0.0
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert {id(p) for p in others["params"]} == {id(p) for p in model.parameters()} - {
        id(p) for p in decaying["params"]
    }


def test_every_parameter_that_learns_is_in_one_group() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig("maskrcnn_resnet50_fpn_v2", norm="group", freeze=["backbone.body.layer1"]), 3)
    grouped = [id(p) for group in parameter_groups(model, OptimConfig()) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_shared_parameter_is_in_one_group() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    groups = parameter_groups(nn.Sequential(first, second), OptimConfig())
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_nothing_learns() -> None:
    with pytest.raises(ValueError, match="no parameter of the model learns"):
        parameter_groups(network().requires_grad_(False), OptimConfig())


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizer(name: Any, kind: type) -> None:
    model = network()
    optimizer = build_optimizer(model, OptimConfig(name=name, momentum=0.7, weight_decay=0.5), 0.125)
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0.7
    assert optimizer.param_groups[0]["fused"] is True  # one launch on a GPU


@pytest.mark.parametrize(("lr_batch", "rate"), [(16, 0.005), (4, 0.02), (0, 0.02)])
def test_learning_rate_is_proportional_to_images(lr_batch: int, rate: float) -> None:
    assert learning_rate(OptimConfig(lr=0.02, lr_batch=lr_batch), 4) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("options", "images", "expected"),
    [
        ({"steps": 90_000, "milestones": [60_000, 80_000]}, 16, (90_000, [60_000, 80_000])),
        ({"steps": 90_000, "milestones": [60_000, 80_000]}, 4, (360_000, [240_000, 320_000])),
        ({"steps": 90_000, "milestones": [60_000, 80_000]}, 64, (22_500, [15_000, 20_000])),
        ({"steps": 100, "milestones": [50], "lr_batch": 0}, 4, (100, [50])),
        ({"milestones": [16, 22]}, 4, (None, [16, 22])),
        ({"steps": 1, "milestones": []}, 64, (1, [])),
    ],
)
def test_runs_in_steps_are_stretched(options: dict[str, Any], images: int, expected: Any) -> None:
    assert stretched(config(**options), images) == expected


def test_explanation() -> None:
    assert explained(config(), 16) == "learning rate 0.02"
    assert explained(config(lr_batch=0), 4) == "learning rate 0.02"
    assert explained(config(), 4) == "learning rate 0.005 = 0.02 x 4 images per step / 16"
    assert explained(config(steps=100, milestones=[60, 80]), 8) == (
        "learning rate 0.01 = 0.02 x 8 images per step / 16; 200 steps = 100 x 16 / 8, milestones 120, 160 likewise"
    )
    assert explained(config(steps=100, schedule="cosine"), 8).endswith("200 steps = 100 x 16 / 8")


def test_warm_up_is_linear() -> None:
    factor = schedule_factor(OptimConfig(warmup_steps=10, milestones=[]), 100, 20, in_steps=False)
    assert factor(0) == 0.001
    assert factor(5) == pytest.approx((0.001 + 1) / 2)
    assert factor(10) == factor(99) == 1.0
    assert schedule_factor(OptimConfig(warmup_steps=0, milestones=[]), 100, 20, in_steps=False)(0) == 1.0


@pytest.mark.parametrize(("milestones", "in_steps"), [([2, 3], False), ([40, 60], True)])
def test_milestones_are_epochs_or_steps(milestones: list[int], in_steps: bool) -> None:
    factor = schedule_factor(OptimConfig(warmup_steps=10, milestones=milestones, gamma=0.1), 100, 20, in_steps)
    assert factor(39) == 1.0
    assert factor(40) == factor(59) == pytest.approx(0.1)
    assert factor(60) == pytest.approx(0.01)


def test_cosine_falls_to_zero() -> None:
    options = OptimConfig(warmup_steps=10, schedule="cosine", milestones=[1], gamma=0.1)
    factor = schedule_factor(options, 100, 1, in_steps=True)
    assert factor(50) == pytest.approx(0.5)
    assert factor(25) == pytest.approx(0.8535534)
    assert factor(5) == pytest.approx((0.001 + 1) / 2, rel=0.01)
    assert factor(100) == factor(200) == pytest.approx(0)
    assert 0 < factor(99) < 0.001


def test_epochs_are_no_steps() -> None:
    with pytest.raises(ValueError, match=r"optim\.milestones: \[16, 22\] are within the warm-up of 500 steps"):
        schedule_factor(OptimConfig(milestones=[16, 22]), 1000, 10, in_steps=True)
    for total, in_steps in ((1000, False), (10, True)):  # the latter never comes to them
        schedule_factor(OptimConfig(milestones=[16, 22]), total, 10, in_steps)


def test_scheduler_takes_the_factor() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    factor = schedule_factor(OptimConfig(warmup_steps=0, milestones=[1]), 10, 1, in_steps=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.2)]


def test_average_is_exponential() -> None:
    model = network()
    average = WeightAverage(model, decay=0.3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for t, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        assert decay == min(0.3, (1 + t) / (10 + t))
        for value in model.state_dict().values():
            new = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 9
            value.copy_(new)
        average.update(model)
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value
            expected[name] = mixed if value.is_floating_point() else value.clone()
    with average.swapped(model):
        for name, value in model.state_dict().items():
            assert_exact_arithmetic(value, expected[name], scale=9)
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_swapped_weights_come_back() -> None:
    model = network()
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 1
    own = {name: value.clone() for name, value in model.state_dict().items()}
    places = [value.data_ptr() for value in model.state_dict().values()]
    swapped = average.swapped(model)
    swapped.__enter__()
    assert torch.equal(model[0].weight, own["0.weight"] - 1)
    swapped.__exit__(KeyError, KeyError(), None)  # as if evaluation had failed
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert [value.data_ptr() for value in model.state_dict().values()] == places  # what a graph captured stays valid


def test_average_goes_on_from_its_state() -> None:
    model = network()
    average, other = WeightAverage(model, decay=0.5), WeightAverage(model, decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += 1
        average.update(model)
    other.load_state_dict(average.state_dict())
    for one in (average, other):
        with torch.no_grad():
            model[0].weight += 1
        one.update(model)
        with torch.no_grad():
            model[0].weight -= 1
    for name, value in average.average.items():
        assert torch.equal(other.average[name], value)
    with pytest.raises(ValueError, match=r"is of another model: 2 differ, such as 0\.weight"):
        WeightAverage(nn.Sequential(nn.Linear(2, 4)), decay=0.5).load_state_dict(
            WeightAverage(nn.Sequential(nn.Linear(3, 5)), decay=0.5).state_dict()
        )


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_average(decay: float) -> None:
    with pytest.raises(ValueError, match="ema: expected a decay from 0 to below 1"):
        WeightAverage(network(), decay)
