"""train: run one stage of the recipe that made the emoji family; the same command continues it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffship.cli.output import Result
from diffship.core.errors import ConfigError

STAGES = ("emoji-data", "emoji-vae", "emoji-unet", "emoji-decoder", "judge", "emoji-pack", "emoji-unpack")
EXAMPLES = """examples:
  diffship train emoji-data --data archives/ --out data/emoji
  diffship train emoji-vae --data data/emoji --out runs/emoji --minutes 60 --threads 1
  diffship train emoji-unet --data data/emoji --out runs/emoji --steps 4000
"""
NUMBERS = {
    "steps": (int, "train up to this step (default: the stage's own)"),
    "batch": (int, "pictures a step"),
    "rate": (float, "learning rate"),
    "decay": (int, "the rate falls to zero over the last N steps"),
    "minutes": (float, "stop and save after this long; the same command goes on"),
    "threads": (int, "threads of torch"),
    "seed": (int, "seed of weights and data order (default: 0)"),
}
STOPPED = "the same command goes on from its last checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=STAGES, help=f"one of {', '.join(STAGES)}")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder with metadata.jsonl")
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, required=True, help="folder of the run")
    for name, (kind, meaning) in NUMBERS.items():
        parser.add_argument(f"--{name}", metavar="N", type=kind, help=meaning)
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), help="mixed precision (default: no)")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading torch."""


def run(options: argparse.Namespace) -> Result:
    from diffship.training import commands
    from diffship.training.options import TrainOptions

    if not options.data.is_dir():
        raise ConfigError(f"--data {str(options.data)!r} is not a folder")
    chosen = {name: getattr(options, name) for name in ("precision", *NUMBERS)}
    positive("--", chosen)
    given = {name: value for name, value in chosen.items() if value is not None}
    reached: dict[str, Any] = commands.run(options.name, TrainOptions(data=options.data, out=options.out, **given))
    text = "\n".join(f"{key}: {value}" for key, value in reached.items())
    return Result({"stage": options.name, "out": str(options.out), "reached": reached}, text)


def positive(prefix: str, values: dict[str, Any]) -> None:
    """Raises ConfigError for a count or rate that is zero, negative or not finite."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not 0 < value < float("inf") and name != "seed":
            raise ConfigError(f"{prefix}{name} is {value}; legal is a positive number")
    seed = values.get("seed")
    if seed is not None and not 0 <= seed < 2**24:
        raise ConfigError(f"{prefix}seed is {seed}; legal is a whole number from 0 to {2**24 - 1}")
