"""What a split of the steps does to pictures: judge figures, seconds of each side and bytes, for a pair of models.

    python -m diffship.benchmarks handoff-quality [--large LARGE --small SMALL] [--data DATA]
        [--curve benchmarks/curves/emoji-top5.json] [--grid docs/images/handoff.png]

LARGE and SMALL are bundles or sources of one pair (emoji and emoji-small); DATA is the folder that `diffship train
emoji-data` wrote (data/emoji, or made of npm's archives now). The large model draws every picture once, and the
small one goes on from each place of the splits: no call is made twice. What a seed drew is kept in `--work`, so that
a run that was interrupted goes on. CURVE is for `diffship run --split auto --quality-curve`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks import freshness
from diffship.benchmarks.catalogue import results_file
from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.case import label
from diffship.benchmarks.measure.intervals import quality, spread
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.quality.judging import RANKS, Judged, Judging, difference_row, figure_rows, show
from diffship.benchmarks.studies.workbench import JUDGE, add_work, emoji_data
from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError
from diffship.core.job import Job, digest_of
from diffship.core.quiet import timing
from diffship.core.strict import plain as jsonable
from diffship.runtimes.handoff.choose import QualityCurve, QualityPoint
from diffship.runtimes.handoff.pair import check_pair
from diffship.runtimes.handoff.router import Router, begin, check_split
from diffship.runtimes.handoff.router import draw as draw_split
from diffship.sampling.generate import checked_denoiser, finish, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.model import Model
from diffship.sampling.request import Request
from diffship.sampling.wire import pack

SUITE = "handoff-quality"
BETTER = {**{f"top{rank}": "higher" for rank in RANKS}, "large_rms": "lower"}
SPLITS = ("25,0", "20,5", "15,10", "10,15", "5,20", "0,25")
BATCH = 32
SHOWN = 8
TIMED = 8  # pictures a split, one after the other, each split in its turn
Uint8 = NDArray[np.uint8]
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Ask:
    """How the pictures are drawn; `ends` are the calls of the large model, rising."""

    steps: int
    ends: tuple[int, ...]
    guidance: float = 4.0
    sampler: str = "ddim"

    def request(self, prompt: str, seed: int) -> Request:
        return Request(prompt, steps=self.steps, guidance=self.guidance, seed=seed, sampler=self.sampler)


@dataclass
class Figures:
    """Of one split: what the judge says per seed, seconds of each side, bytes."""

    judged: list[Judged] = field(default_factory=list)
    cloud: list[float] = field(default_factory=list)
    edge: list[float] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


def parse_splits(texts: Sequence[str]) -> Ask:
    """Splits such as `10,15` as what is asked.

    Raises:
        ConfigError: not two numbers, sums that differ, or one that occurs twice.
    """
    try:
        splits = [tuple(int(word) for word in text.split(",")) for text in texts]
    except ValueError:
        raise ConfigError(f"--splits {' '.join(texts)}: a split is two numbers, such as 10,15") from None
    steps = {check_split(split, 2) for split in splits}
    ends = sorted(split[0] for split in splits)
    if len(steps) != 1 or len(set(ends)) != len(ends):
        raise ConfigError(f"--splits {' '.join(texts)}: they must differ, and all have the same sum")
    return Ask(steps.pop(), tuple(ends))


def drawn_by_split(large: Model, small: Model, requests: Sequence[Request], asked: Ask) -> dict[int, Uint8]:
    """{calls of the large model: pictures (n, size, size, 3)} of `requests`, decoded by the small model.

    Equal to drawing each split anew, as a trajectory holds all that moves on. Without any call of the large model the
    small one encodes the prompt, too.
    """
    pictures: dict[int, list[Uint8]] = {end: [] for end in asked.ends}
    for first in range(0, len(requests), BATCH):
        batch = requests[first : first + BATCH]
        for end, found in _splits(large, small, batch, asked):
            pictures[end] += found
        print(f"drawn {first + len(batch)} of {len(requests)}", file=sys.stderr)
    return {end: np.stack(found) for end, found in pictures.items()}


def kept(
    job: Job, engine: str | None, large: Model, small: Model, requests: Sequence[Request], asked: Ask
) -> dict[int, Uint8]:
    """As `drawn_by_split`; what was drawn before is read."""
    from safetensors.numpy import load_file, save_file

    def make(out: Path) -> None:
        drawn = drawn_by_split(large, small, requests, asked)
        save_file({str(end): np.ascontiguousarray(pixels) for end, pixels in drawn.items()}, out)

    code = freshness.digest(results_file(SUITE), [engine or "onnxruntime"])
    facts = [code, large.digest, small.digest, engine, jsonable(asked), [[r.prompt, r.seed] for r in requests]]
    return {int(end): pixels for end, pixels in load_file(job.once(digest_of(facts), make)).items()}


def _splits(large: Model, small: Model, requests: Sequence[Request], asked: Ask) -> Iterator[tuple[int, list[Uint8]]]:
    first, last = (checked_denoiser(model) for model in (large, small))
    begun = [trajectory for request in requests for trajectory in start(large, request)]
    for end in asked.ends:
        begun = denoise(begun, first, until=end)
        left = begun if end else [trajectory for request in requests for trajectory in start(small, request)]
        yield end, [picture.pixels for picture in finish(small, denoise(left, last))]


def timed(large: Model, small: Model, texts: Sequence[str], asked: Ask, found: dict[int, Figures]) -> None:
    """Seconds that each side computes for one picture, split by split in turn, and what travels between them."""
    for place, text in enumerate([texts[0], *texts]):  # the first time warms both sides up
        for end in asked.ends:
            router = Router([large, small], (end, asked.steps - end))
            draw_split(router, begin(router, asked.request(text, 0)))
            if place:
                found[end].cloud.append(router.shares[0].seconds)
                found[end].edge.append(router.shares[1].seconds)
    for end in asked.ends:
        (trajectory,) = denoise(start(large, asked.request(texts[0], 0)), denoiser_of(large), until=end)
        found[end].sizes = {
            "handoff_bytes": len(pack(trajectory)),
            "handoff_bytes_without_embeddings": len(pack(trajectory, embeddings=False)),
        }


def rows_of(found: Mapping[int, Figures], steps: int) -> list[Row]:
    """Figures of every split, and what each one's differ from those of either model alone."""
    rows = []
    for end, figures in found.items():
        subject = _subject(end, steps)
        conditions = {"cloud_calls": end, "edge_calls": steps - end, "seeds": len(figures.judged)}
        rows += figure_rows(SUITE, subject, figures.judged, conditions, trained=False)
        rows += [
            Row(SUITE, subject, metric, statistics.median(values), "s", conditions=conditions, **spread(values))
            for metric, values in (("cloud_seconds", figures.cloud), ("edge_seconds", figures.edge))
        ]
        rows += [
            Row(SUITE, subject, name, float(size), "bytes", kind="size", conditions=conditions)
            for name, size in figures.sizes.items()
        ]
    return [*rows, *_differences(found, steps)]


def _differences(found: Mapping[int, Figures], steps: int) -> Iterator[Row]:
    """Every split against the large model alone, and every other one against the small model alone."""
    largest, smallest = max(found), min(found)
    pairs = [(end, largest) for end in found if end != largest]
    pairs += [(end, smallest) for end in found if end not in (largest, smallest)]
    for end, other in pairs:
        for metric in (f"top{rank}" for rank in RANKS):
            names = (_subject(end, steps), _subject(other, steps))
            sides = (found[end].judged, found[other].judged)
            yield difference_row(SUITE, names, sides, metric, "higher", {}, trained=False)


def _subject(end: int, steps: int) -> str:
    return f"split {end},{steps - end}"


def curve_of(found: Mapping[int, Figures], large: Model, small: Model, steps: int, metric: str) -> QualityCurve:
    """The measured points, for `--split auto`."""
    points = []
    for end, figures in sorted(found.items()):
        judged = figures.judged
        values = quality([entry.by_prompt[metric] for entry in judged], judged[0].prompts, trained=False)
        low, high = (None if value is None else round(value, 4) for value in (values.low, values.high))
        points.append(QualityPoint(end, round(values.mean, 4), low, high))
    return QualityCurve(large.digest, small.digest, steps, metric, BETTER[metric], tuple(points))


def run(arguments: argparse.Namespace) -> list[Row]:
    from contextlib import ExitStack

    from diffship.runtimes.engines.model import open_model

    asked = parse_splits(arguments.splits)
    found, job = {end: Figures() for end in asked.ends}, Job(arguments.work)
    with ExitStack() as stack:
        large, small = (
            stack.enter_context(open_model(text, arguments.engine)) for text in (arguments.large, arguments.small)
        )
        for warning in check_pair([large, small], asked.sampler):
            print(f"warning: {warning}", file=sys.stderr)
        judging = Judging.read(arguments.data, arguments.judge, large.tokenizers["tokenizer"], arguments.prompts)
        texts = judging.asked.texts
        for seed in range(arguments.seeds):
            requests = [asked.request(text, 10_000 * seed + place) for place, text in enumerate(texts)]
            pictures = kept(job, arguments.engine, large, small, requests, asked)
            for end, pixels in pictures.items():
                # the distance is to the pictures of the large model alone, where those are there
                found[end].judged.append(judging.look(pixels, {"large_rms": pictures[max(pictures)]}))
            if arguments.grid and not seed:
                ends = sorted(pictures, reverse=True)
                show(arguments.grid, {f"{end},{asked.steps - end}": pictures[end] for end in ends}, texts[:SHOWN])
        with timing(SUITE):
            timed(large, small, texts[:TIMED], asked, found)
        if arguments.curve:
            curve = curve_of(found, large, small, asked.steps, arguments.metric)
            arguments.curve.parent.mkdir(parents=True, exist_ok=True)
            write_file(arguments.curve, json.dumps(jsonable(curve), indent=1) + "\n")
    return rows_of(found, asked.steps)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", default="emoji", help="bundle or source (emoji)")
    parser.add_argument("--small", default="emoji-small", help="bundle or source (emoji-small)")
    parser.add_argument("--data", type=Path, help="pictures with captions (made)")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), metavar="A,B")
    parser.add_argument("--engine")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--metric", choices=list(BETTER), default="top5", help="of the curve")
    parser.add_argument("--curve", type=Path, help="write the pair's quality curve")
    parser.add_argument("--grid", type=Path, help="picture grid of the splits, as PNG")
    add_work(parser)
    arguments = parser.parse_args(argv)
    arguments.data = arguments.data or emoji_data(arguments.work)
    rows = run(arguments)
    if arguments.out:
        command = "python -m diffship.benchmarks handoff-quality"
        command += f" --large {label(arguments.large)} --small {label(arguments.small)}"
        command += f" --prompts {arguments.prompts} --seeds {arguments.seeds} --splits {' '.join(arguments.splits)}"
        write_result(arguments.out, SUITE, command, rows, {"guidance": 4.0, "sampler": "ddim"})
    for row in rows:
        print(f"{row.subject:34} {row.metric:34} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


if __name__ == "__main__":
    enter(main)
