"""The command `fastmrcnn`: train, evaluate, predict, summary, demo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from fastmrcnn import demo, evaluate, predict, summary, train

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Any], str]] = {
    "train": (train.TrainConfig, train.run, "train a detector on COCO-format data"),
    "evaluate": (evaluate.EvaluateConfig, evaluate.run, "average precision of a checkpoint or of a results file"),
    "predict": (predict.PredictConfig, predict.run, "detect objects in images: pictures and a COCO results file"),
    "summary": (summary.SummaryConfig, summary.run, "parameters and floating-point operations per layer"),
    "demo": (demo.DemoConfig, demo.run, "train a small model on generated shapes and draw what it finds"),
}


def build_parser() -> ArgumentParser:
    """The parser of the command line: each command's options are the fields of its configuration."""
    parser = ArgumentParser(prog="fastmrcnn", description="Mask R-CNN: train, evaluate, predict.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (config, _, about) in COMMANDS.items():
        command = ArgumentParser(description=about[0].upper() + about[1:] + ".")
        command.add_argument("--config", action="config", help="YAML file of options; later options override it")
        command.add_class_arguments(config, None, as_group=False)
        commands.add_subcommand(name, command, help=about)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; `arguments` default to those of the process."""
    parser = build_parser()
    chosen = parser.instantiate(parser.parse_args(arguments))
    config, run, _ = COMMANDS[chosen.command]
    options = dict(vars(chosen[chosen.command]))
    options.pop("config", None)
    try:
        run(config(**options))
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError, NotADirectoryError) as error:
        sys.exit(f"fastmrcnn {chosen.command}: {error}")


if __name__ == "__main__":
    main()
