"""train: run one stage of the recipe that made the emoji family; the same command continues it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.cli.output import Result
from diffship.core.errors import ConfigError
from diffship.core.registry import STAGES
from diffship.core.sniff import also

if TYPE_CHECKING:
    from diffship.training.options import TrainOptions

STEPPED = ("emoji-vae", "emoji-unet", "emoji-decoder", "judge")  # they train, on what emoji-data wrote
DATA = (
    "what emoji-data wrote; for emoji-data itself the npm archives, for emoji-pack the runs (-o of the other stages), "
    "for emoji-unpack a packed family"
)
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
    parser.add_argument("name", metavar="NAME", choices=tuple(STAGES), help=f"one of {', '.join(STAGES)}")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help=DATA)
    parser.add_argument(
        "-o", "--out", metavar="DIR", type=Path, required=True, help="folder of the runs, or the result"
    )
    for name, (kind, meaning) in NUMBERS.items():
        parser.add_argument(f"--{name}", metavar="N", type=kind, help=meaning)
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), help="mixed precision (default: no)")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading torch."""


def run(options: argparse.Namespace) -> Result:
    from diffship.training import commands
    from diffship.training.options import TrainOptions

    _check_data(options.name, options.data)
    chosen = {name: getattr(options, name) for name in ("precision", *NUMBERS)}
    positive("--", chosen)
    given = {name: value for name, value in chosen.items() if value is not None}
    asked = TrainOptions(data=options.data, out=options.out, **given)
    reached: dict[str, Any] = commands.run(options.name, asked)
    text = told(reached, _goal(options.name, asked))
    return Result({"stage": options.name, "out": str(options.out), "reached": reached}, text)


def _check_data(stage: str, data: Path) -> None:
    if not data.is_dir():
        raise ConfigError(f"--data {str(data)!r} is not a folder{also(data)}")
    if stage in STEPPED and not (data / "metadata.jsonl").is_file():
        command = f"diffship train emoji-data --data ARCHIVES -o {data}"
        raise ConfigError(f"--data {str(data)!r} has no metadata.jsonl. Run first: {command}")


def _goal(stage: str, options: TrainOptions) -> int:
    """The steps that a stage is to reach; 0 for one without."""
    from diffship.training.emoji_stages import schedule

    return schedule(stage, options).steps if stage in STEPPED else 0


def told(reached: Mapping[str, Any], goal: int) -> str:
    """A line for each figure; a stage that stopped before its last step says so."""
    lines = {key: str(value) for key, value in reached.items()}
    if goal and int(reached["step"]) < goal:
        lines["step"] += f" of {goal}; time is up, the same command goes on"
    return "\n".join(f"{key}: {value}" for key, value in lines.items())


def positive(prefix: str, values: dict[str, Any]) -> None:
    """Raises ConfigError for a count or rate that is zero, negative or not finite."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not 0 < value < float("inf") and name != "seed":
            raise ConfigError(f"{prefix}{name} is {value}; legal is a positive number")
    seed = values.get("seed")
    if seed is not None and not 0 <= seed < 2**24:
        raise ConfigError(f"{prefix}seed is {seed}; legal is a whole number from 0 to {2**24 - 1}")
