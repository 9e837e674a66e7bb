"""A whole picture, before and after: 25 guided steps and the KL decoder against 4 of a pruned LCM and a tiny decoder.

    python -m diffship.benchmarks fast-chain [--pair emoji|sd15] [--made NAME=SOURCE ...]

`emoji` is trained, and `few-steps` judges its pictures. `sd15` has full size and random weights, so that it proves cost
alone; it takes minutes a picture. Both sides of a pair run in ONNX Runtime, in turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.intervals import ratio, ratio_verdict, spread
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.quality.distilled import Distilled, add_made
from diffship.benchmarks.studies.quality.few_steps import Way, seconds_of
from diffship.benchmarks.studies.workbench import DATA, add_work
from diffship.core.quiet import timing

SUITE = "fast-chain"
FAST = "emoji-small-lcm-lora with emoji-tiny-vae"


@dataclass(frozen=True)
class Pair:
    """The slow way and the fast one, and how many pictures of each are timed."""

    slow: Way
    fast: Way
    rounds: int


PAIRS = {
    "emoji": Pair(Way("emoji", "ddim", 25, 4.0), Way(FAST, "lcm", 4), 15),
    # a model with a guidance embedding takes guidance in one row
    "sd15": Pair(Way("arch:sd15", "ddim", 25, 7.5), Way("arch:hybrid-224m+lcm+taesd", "lcm", 4, 7.5), 3),
}


def bundle_of(made: Distilled, model: str) -> Path:
    """The bundle of a side; that of FAST gets its auto-encoder first."""
    name, joined, vae = model.partition(" with ")
    return made.bundle(made.with_vae(name, vae) if joined else model)


def rows_of(pair: Pair, seconds: Sequence[Sequence[float]]) -> list[Row]:
    """Seconds of a picture on both sides, and how many times as fast the second one is."""
    rows = [
        Row(SUITE, way.name, "picture_seconds", statistics.median(each), "s", conditions=asdict(way), **spread(each))
        for way, each in zip((pair.slow, pair.fast), seconds, strict=True)
    ]
    found = ratio(*seconds)
    slower = [None if end is None else 1 / end for end in (found.high, found.low)]  # a verdict is of ours / theirs
    said = ratio_verdict(slower[0], slower[1], found.n)
    facts = {"against": pair.slow.name, "interval": found.how, "verdict": said}
    last = Row(SUITE, pair.fast.name, "times_as_fast", found.mean, low=found.low, high=found.high, n=found.n)
    return [*rows, replace(last, conditions=facts)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=tuple(PAIRS), action="append", help="one of them (both)")
    parser.add_argument(
        "--data", type=Path, default=DATA, help=f"pictures with captions, if models are trained ({DATA})"
    )
    parser.add_argument("--rounds", type=int, help="timed pictures of each side (15; sd15: 3)")
    add_made(parser)
    add_work(parser)
    arguments = parser.parse_args(argv)
    made = Distilled(arguments.made, arguments.data, arguments.work / "few-steps")
    rows = [row for name in arguments.pair or PAIRS for row in _measured(PAIRS[name], made, arguments.rounds)]
    if arguments.out:
        write_result(arguments.out, SUITE, f"python -m diffship.benchmarks {SUITE}", rows)
    for row in rows:
        print(f"{row.subject:60} {row.metric:20} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


def _measured(pair: Pair, made: Distilled, rounds: int | None) -> list[Row]:
    from diffship.runtimes.engines.model import open_model

    sides = (pair.slow, pair.fast)
    bundles = {way.model: bundle_of(made, way.model) for way in sides}
    with ExitStack() as stack, timing(SUITE):
        models = {name: stack.enter_context(open_model(str(bundle), "onnxruntime")) for name, bundle in bundles.items()}
        seconds = seconds_of(models, sides, rounds or pair.rounds)
    return rows_of(pair, [seconds[way] for way in sides])


if __name__ == "__main__":
    enter(main)
