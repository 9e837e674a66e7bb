"""What few steps leave of the pictures: models distilled to LCMs against their teacher, judged and timed.

    python -m diffship.benchmarks few-steps [--made NAME=SOURCE ...] [--data DATA] [--grid FILE]

The teacher `emoji` draws with guidance, by DDIM and by DPM-Solver++, and with the LCM sampler without having been
distilled, which is the honest baseline of the latter. Every way draws the same prompts from the same noise, under
several seeds of sampling. Models that are not named are trained by their recipes, hours each. What was made or drawn
is kept in `--work`, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.intervals import LEVEL, spread
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.quality.distilled import MADE, Distilled, add_made
from diffship.benchmarks.studies.quality.emoji_quality import draw_once, seconds_in_turns
from diffship.benchmarks.studies.quality.judging import (
    RANKS,
    Judged,
    Judging,
    difference_row,
    figure_rows,
    quality_row,
    show,
)
from diffship.benchmarks.studies.workbench import JUDGE, add_work, emoji_data
from diffship.core.quiet import timing
from diffship.sampling.generate import generate
from diffship.sampling.model import Model
from diffship.sampling.request import Request

SUITE = "few-steps"
TEACHER, GUIDANCE = "emoji", 4.0
STEPS = (1, 2, 4, 8)
ROUNDS = 15
SHOWN = 8
RESAMPLES = 4000
Uint8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Way:
    """A model and how it is drawn with."""

    model: str
    sampler: str
    steps: int
    guidance: float = 1.0

    @property
    def name(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.model}, {self.sampler}, {self.steps} steps{guided}"

    def request(self, prompt: str, seed: int) -> Request:
        return Request(prompt, steps=self.steps, guidance=self.guidance, sampler=self.sampler, seed=seed)


REFERENCE = Way(TEACHER, "ddim", 25, GUIDANCE)


def ways(models: Sequence[str]) -> list[Way]:
    """The teacher's ways, and those of distilled `models`; the one that takes guidance as an input gets it."""
    samplers = [Way(TEACHER, sampler, steps, GUIDANCE) for sampler in ("ddim", "dpmpp-2m") for steps in (25, 8, 4)]
    undistilled = [Way(TEACHER, "lcm", steps, GUIDANCE) for steps in STEPS]
    guided = {"emoji-lcm": GUIDANCE}
    distilled = [Way(model, "lcm", steps, guided.get(model, 1.0)) for model in models for steps in STEPS]
    return [*samplers, *undistilled, *distilled]


def kept_row(subject: str, ours: Sequence[Judged], reference: Sequence[Judged], metric: str) -> Row:
    """Our share of the reference's figure, with a 95 % interval from prompts that are drawn again, pairs together."""
    table = np.array([[entry.by_prompt[metric] for entry in side] for side in (ours, reference)])
    by_prompt = table.mean(axis=1)  # (2, prompts)
    picks = np.random.default_rng(0).integers(by_prompt.shape[1], size=(RESAMPLES, by_prompt.shape[1]))
    above, below = by_prompt[:, picks].mean(axis=2)
    ratios = above / np.maximum(below, 1e-9)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(by_prompt[0].mean() / max(by_prompt[1].mean(), 1e-9))
    how = f"bootstrap over {by_prompt.shape[1]} prompts, {len(ours)} sampling seeds averaged in each"
    facts = {"against": REFERENCE.name, "interval": how}
    span = {"low": float(low), "high": float(high), "n": int(table[0].size)}
    return quality_row(SUITE, subject, f"{metric}_kept", value, "share", facts, span)


def rows_of(found: Mapping[Way, Sequence[Judged]]) -> list[Row]:
    """Figures of every way, and what each one's differ from the reference."""
    rows, reference = [], found[REFERENCE]
    for way, judged in found.items():
        rows += figure_rows(SUITE, way.name, judged, {**asdict(way), "seeds": len(judged)}, trained=False)
        if way == REFERENCE:
            continue
        for metric in (f"top{rank}" for rank in RANKS):
            names, sides = (way.name, REFERENCE.name), (judged, reference)
            rows.append(difference_row(SUITE, names, sides, metric, "higher", asdict(way), trained=False))
            rows.append(kept_row(way.name, judged, reference, metric))
    return rows


def seconds_of(models: Mapping[str, Model], asked: Sequence[Way], rounds: int) -> dict[Way, list[float]]:
    """Seconds of one whole picture for each way, in turns."""

    def drawing(way: Way) -> Callable[[int], object]:
        return lambda turn: generate(models[way.model], way.request("red apple", turn))

    return seconds_in_turns({way: drawing(way) for way in asked}, rounds)


def run(arguments: argparse.Namespace) -> list[Row]:
    from diffship.runtimes.engines.model import open_model

    chosen = tuple(arguments.models)
    made = Distilled(arguments.made, arguments.data, arguments.work / SUITE)
    found: dict[Way, list[Judged]] = {way: [] for way in ways(chosen)}
    shown: dict[str, Uint8] = {}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(open_model(str(made.bundle(name)), "onnxruntime")) for name in (TEACHER, *chosen)
        }
        tokenizer = models[TEACHER].tokenizers["tokenizer"]
        judging = Judging.read(arguments.data, arguments.judge, tokenizer, arguments.prompts)
        for way, judged in found.items():
            for seed in range(arguments.seeds):
                how = {"steps": way.steps, "guidance": way.guidance, "sampler": way.sampler}
                pixels = draw_once(made.job, SUITE, models[way.model], judging.asked.texts, seed, **how)
                judged.append(judging.look(pixels, {}))
                shown.setdefault(way.name, pixels[:SHOWN])
            print(f"{way.name}: top5 {statistics.mean(judged[0].by_prompt['top5']):.3f}", file=sys.stderr)
        with timing(SUITE):
            seconds = seconds_of(models, list(found), arguments.rounds)
    if arguments.grid:
        show(arguments.grid, shown, judging.asked.texts[:SHOWN])
    timed = [
        Row(SUITE, way.name, "picture_seconds", statistics.median(each), "s", conditions=asdict(way), **spread(each))
        for way, each in seconds.items()
    ]
    return [*rows_of(found), *timed]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_made(parser)
    models = [name for name in MADE if "lcm" in name]
    parser.add_argument("--models", nargs="*", choices=models, default=models, help="distilled models (all)")
    parser.add_argument("--data", type=Path, help="pictures with captions (made)")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed pictures of each way ({ROUNDS})")
    parser.add_argument("--grid", type=Path, help="a row of pictures for every way, as PNG")
    add_work(parser)
    arguments = parser.parse_args(argv)
    arguments.data = arguments.data or emoji_data(arguments.work)
    rows = run(arguments)
    if arguments.out:
        command = f"python -m diffship.benchmarks {SUITE} --prompts {arguments.prompts} --seeds {arguments.seeds}"
        write_result(arguments.out, SUITE, command, rows, {"reference": REFERENCE.name, "models": arguments.models})
    for row in rows:
        print(f"{row.subject:60} {row.metric:20} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


if __name__ == "__main__":
    enter(main)
