"""The command `fastmrcnn`: train, evaluate, predict, convert, export, summary, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from fastmrcnn import convert, demo, evaluate, predict, summary, train
from fastmrcnn.export import ExportConfig
from fastmrcnn.export import run as run_export
from fastmrcnn.training.config import DataConfig
from fastmrcnn.training.recipes import RECIPES

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Any], str]] = {
    "train": (train.TrainConfig, train.run, "train a detector on COCO-format data"),
    "evaluate": (evaluate.EvaluateConfig, evaluate.run, "average precision of a checkpoint or of a results file"),
    "predict": (predict.PredictConfig, predict.run, "detect objects in images: pictures and a COCO results file"),
    "convert": (convert.ConvertConfig, convert.run, "bring weights of another library into this one's format, or back"),
    "export": (ExportConfig, run_export, "write a detector as a file that runs without this library"),
    "summary": (summary.SummaryConfig, summary.run, "parameters and floating-point operations per layer"),
    "demo": (demo.DemoConfig, demo.run, "train a small model on generated shapes and draw what it finds"),
}


def build_parser(recipe: str | None = None) -> ArgumentParser:
    """The parser of the command line: each command's options are the fields of its configuration.

    The defaults of training are those of `recipe`, if one is named.
    """
    parser = ArgumentParser(prog="fastmrcnn", description="Mask R-CNN: train, evaluate, predict.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (config, _, about) in COMMANDS.items():
        listed = f" {about_recipes()}" if name == "train" else ""
        command = ArgumentParser(description=about[0].upper() + about[1:] + "." + listed)
        command.add_argument("--config", action="config", help="YAML file of options; later options override it")
        command.add_class_arguments(config, None, as_group=False, as_positional=name == "convert")
        if name == "train" and recipe is not None:
            command.set_defaults(dict(recipe_defaults(recipe)))
        commands.add_subcommand(name, command, help=about)
    return parser


def about_recipes() -> str:
    """What to say of the recipes, and what each is."""
    each = [f"{name} ({str(recipe.__doc__).splitlines()[0].rstrip('.')})" for name, recipe in RECIPES.items()]
    return f"With --recipe NAME options have the defaults of a recipe, which is one of {', '.join(each)}."


def recipe_defaults(name: str) -> Iterator[tuple[str, Any]]:
    """The options of a recipe by their names on the command line, all but where one's own data is."""
    values = asdict(RECIPES[name](DataConfig(Path(), Path())))
    del values["data"]["train_images"], values["data"]["train_annotations"]
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{part}", its) for part, its in value.items())
        else:
            yield key, value


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """`arguments` with options that have a short name by their own."""
    return ["--model.mask_iou=true" if argument == "--mask-iou" else argument for argument in arguments]


def split_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe that `arguments` name, and the others: defaults have to be known before these can be parsed."""
    if arguments[:1] != ["train"]:
        return None, list(arguments)
    parser = argparse.ArgumentParser(prog="fastmrcnn train", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES)
    known, rest = parser.parse_known_args(arguments)
    return known.recipe, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; `arguments` default to those of the process."""
    recipe, arguments = split_recipe(spelled_out(sys.argv[1:] if arguments is None else arguments))
    parser = build_parser(recipe)
    chosen = parser.instantiate(parser.parse_args(arguments))
    config, run, _ = COMMANDS[chosen.command]
    options = dict(vars(chosen[chosen.command]))
    options.pop("config", None)
    try:
        run(config(**options))
    except (ValueError, TypeError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(f"fastmrcnn {chosen.command}: {error}")


if __name__ == "__main__":
    main()
