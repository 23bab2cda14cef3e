"""Recipes: what they publish, and that our model can be built and trained by each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import WeightsEnum

from fastmrcnn.models.config import build_model
from fastmrcnn.training.config import DataConfig, TrainConfig
from fastmrcnn.training.optim import learning_rate, schedule_factor, stretched
from fastmrcnn.training.recipes import RECIPES, small

DATA = DataConfig(Path("images"), Path("annotations.json"), workers=7)
COCO = 118_287  # images of train2017

# images, epochs of them, the learning rate, and steps after which it was divided by ten, as published
PUBLISHED: dict[str, tuple[int, float, float, list[int]]] = {
    "torchvision_1x": (16, 26, 0.02, [16, 22]),
    "detectron2_1x": (16, 90_000 * 16 / COCO, 0.02, [60_000, 80_000]),
    "detectron2_3x": (16, 270_000 * 16 / COCO, 0.02, [210_000, 250_000]),
    "lsj": (64, 400, 0.1, [352, 384]),
    "paper": (16, 160_000 * 16 / COCO, 0.02, [120_000]),
}


def test_names() -> None:
    assert list(RECIPES) == ["torchvision_1x", "detectron2_1x", "detectron2_3x", "lsj", "paper", "small"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedule(name: str) -> None:
    batch, epochs, rate, milestones = PUBLISHED[name]
    config = RECIPES[name](DATA)
    assert learning_rate(config.optim, batch) == pytest.approx(rate)
    steps, found = stretched(config, batch)
    assert found == milestones
    assert (config.epochs if steps is None else steps * batch / COCO) == pytest.approx(epochs)
    assert (config.optim.momentum, config.optim.gamma, config.optim.schedule) == (0.9, 0.1, "step")


@pytest.mark.parametrize("name", RECIPES)
def test_data_is_the_callers(name: str) -> None:
    config = RECIPES[name](DATA)
    assert isinstance(config, TrainConfig)
    assert replace(config.data, aspect_groups=DATA.aspect_groups) == DATA
    assert DATA.aspect_groups == 3


@pytest.mark.parametrize("name", RECIPES)
def test_model_can_be_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights without numbers: the names are torchvision's."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
    config = RECIPES[name](DATA)
    with torch.device("meta"):
        model = build_model(config.model, 2)
    learns = model.backbone.body.layer1[0].conv1.weight.requires_grad
    assert learns == (name == "lsj")  # all others keep the stem and the first stage of pretrained weights
    assert model.backbone.body.layer2[0].conv1.weight.requires_grad


@pytest.mark.parametrize("name", RECIPES)
def test_schedule_fits_on_one_gpu(name: str) -> None:
    config = RECIPES[name](DATA)
    per_epoch = COCO // config.batch_size
    steps, milestones = stretched(config, config.batch_size)
    total = steps or config.epochs * per_epoch
    optim: Any = replace(config.optim, milestones=milestones)
    factor = schedule_factor(optim, total, per_epoch, in_steps=steps is not None)
    assert factor(config.optim.warmup_steps) == pytest.approx(1, abs=0.02)
    assert factor(total - 1) <= 0.1


def test_each_says_what_it_is() -> None:
    for name, recipe in RECIPES.items():
        text = str(recipe.__doc__)
        assert len(text.splitlines()[0]) <= 120, name
        assert "Source: " in text or recipe is small, name


def test_what_sets_recipes_apart() -> None:
    made = {name: recipe(DATA) for name, recipe in RECIPES.items()}
    assert {name for name, config in made.items() if config.augment.jitter == 1024} == {"lsj"}
    assert {name for name, config in made.items() if config.model.norm == "sync"} == {"lsj"}
    assert {name for name, config in made.items() if config.optim.weight_decay != 1e-4} == {"lsj"}
    assert made["lsj"].optim.weight_decay == 4e-5
    varied = {name for name, config in made.items() if config.augment.min_sizes == [640, 672, 704, 736, 768, 800]}
    assert varied == {"detectron2_1x", "detectron2_3x", "small"}
    assert all(config.model.min_size in (800, None) for config in made.values())  # torchvision's own is 800, too
    assert {name for name, config in made.items() if config.optim.warmup_steps == 1000} == set(PUBLISHED) - {"paper"}
    assert {name for name, config in made.items() if config.model.weights} == {"small"}
    assert {name for name, config in made.items() if config.optim.ema} == {"small"}
