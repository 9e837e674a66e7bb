"""What a split of the steps does to pictures: judge figures, seconds of each side and bytes, for a pair of models.

    python -m diffship.benchmarks.handoff_quality LARGE SMALL --data DATA --out benchmarks/results/handoff-emoji.json
        [--curve benchmarks/curves/emoji.json] [--grid docs/images/handoff.png]

LARGE and SMALL are bundles or sources of one pair; DATA is the folder that `diffship train emoji-data` wrote. The large
model draws every picture once, and the small one goes on from each place of the splits: no call is made twice. CURVE
is for `diffship run --split auto --quality-curve`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.bootstrap import interval, paired, verdict
from diffship.benchmarks.emoji_quality import RANKS, Asked, Bench, ask
from diffship.benchmarks.quality import frechet_distance, hits
from diffship.benchmarks.record import write_result
from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError
from diffship.core.row import Row
from diffship.core.strict import plain as jsonable
from diffship.runtimes.handoff.choose import QualityCurve, QualityPoint
from diffship.runtimes.handoff.pair import check_pair
from diffship.runtimes.handoff.router import Router, begin, check_split
from diffship.runtimes.handoff.router import draw as draw_split
from diffship.sampling.generate import checked, finish, start
from diffship.sampling.loop import denoise, plain
from diffship.sampling.model import Model
from diffship.sampling.request import Request
from diffship.sampling.wire import pack

SUITE = "handoff-quality"
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
    """Of one split: tables (seeds, prompts) by metric, Fréchet distance per seed, seconds of each side, bytes."""

    tables: dict[str, list[list[float]]] = field(default_factory=dict)
    frechet: list[float] = field(default_factory=list)
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


def _splits(large: Model, small: Model, requests: Sequence[Request], asked: Ask) -> Iterator[tuple[int, list[Uint8]]]:
    first, last = (checked(plain(model.use("unet"))) for model in (large, small))
    begun = [trajectory for request in requests for trajectory in start(large, request)]
    for end in asked.ends:
        begun = denoise(begun, first, until=end)
        left = begun if end else [trajectory for request in requests for trajectory in start(small, request)]
        yield end, [picture.pixels for picture in finish(small, denoise(left, last))]


def judged(
    bench: Bench, asked: Asked, captions: Table, real: Table, pictures: Mapping[int, Uint8], found: dict[int, Figures]
) -> None:
    """Add the figures of one seed; the distance is to the pictures of the large model alone, where those are there."""
    whole = pictures[max(pictures)].astype(np.float64)
    for end, pixels in pictures.items():
        figures, (seen, features) = found[end], bench.look(pixels)
        for rank in RANKS:
            right = hits(seen, captions, asked.wanted, rank).astype(float)
            figures.tables.setdefault(f"top{rank}", []).append(right.tolist())
        distance = np.sqrt(np.square((pixels - whole) / 127.5).mean((1, 2, 3)))
        figures.tables.setdefault("large_rms", []).append(distance.tolist())
        figures.frechet.append(frechet_distance(features, real))


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
        (trajectory,) = denoise(start(large, asked.request(texts[0], 0)), plain(large.use("unet")), until=end)
        found[end].sizes = {
            "handoff_bytes": len(pack(trajectory)),
            "handoff_bytes_without_embeddings": len(pack(trajectory, embeddings=False)),
        }


def rows_of(found: Mapping[int, Figures], steps: int) -> list[Row]:
    """Figures of every split, and what each one's differ from those of either model alone."""
    rows = []
    for end, figures in found.items():
        subject = f"split {end},{steps - end}"
        conditions = {"cloud_calls": end, "edge_calls": steps - end, "seeds": len(figures.frechet)}
        for metric, table in figures.tables.items():
            values = interval(np.array(table))
            unit = "share" if metric.startswith("top") else "rms of [-1, 1]"
            spread: dict[str, Any] = {"low": values.low, "high": values.high, "n": values.seeds * values.units}
            rows.append(_row(subject, metric, values.mean, unit, "quality", conditions, spread))
        rows.append(_listed(subject, "frechet_distance", figures.frechet, "judge features", "quality", conditions))
        rows.append(_listed(subject, "cloud_seconds", figures.cloud, "s", "latency", conditions))
        rows.append(_listed(subject, "edge_seconds", figures.edge, "s", "latency", conditions))
        rows += [_row(subject, name, size, "bytes", "size", conditions) for name, size in figures.sizes.items()]
    return [*rows, *_differences(found, steps)]


def _differences(found: Mapping[int, Figures], steps: int) -> Iterator[Row]:
    for other in (max(found), min(found)):
        for end, figures in found.items():
            for metric in (f"top{rank}" for rank in RANKS if end != other):
                difference = paired(figures.tables[metric], found[other].tables[metric])
                conditions = {
                    "against": f"split {other},{steps - other}",
                    "verdict": verdict(difference, "higher", quality=True),
                    "seeds": difference.seeds,
                }
                spread: dict[str, Any] = {
                    "low": difference.low,
                    "high": difference.high,
                    "n": difference.seeds * difference.units,
                }
                subject = f"split {end},{steps - end} against {other},{steps - other}"
                yield _row(subject, f"{metric}_difference", difference.mean, "", "quality", conditions, spread)


def curve_of(found: Mapping[int, Figures], large: Model, small: Model, steps: int, metric: str) -> QualityCurve:
    """The measured points, for `--split auto`."""
    points = []
    for end, figures in sorted(found.items()):
        values = interval(np.array(figures.tables[metric]))
        points.append(QualityPoint(end, round(values.mean, 4), round(values.low, 4), round(values.high, 4)))
    return QualityCurve(large.digest, small.digest, steps, metric, "higher", tuple(points))


def _listed(
    subject: str, metric: str, values: Sequence[float], unit: str, kind: str, conditions: Mapping[str, Any]
) -> Row:
    spread: dict[str, Any] = {"low": min(values), "high": max(values), "n": len(values)}
    return _row(subject, metric, statistics.median(values), unit, kind, conditions, spread)


def _row(
    subject: str,
    metric: str,
    value: float,
    unit: str,
    kind: str,
    conditions: Mapping[str, Any],
    spread: Mapping[str, Any] | None = None,
) -> Row:
    digits: dict[str, Any] = {
        name: entry if name == "n" else round(float(entry), 5) for name, entry in (spread or {}).items()
    }
    return Row(SUITE, subject, metric, round(float(value), 5), unit, kind=kind, conditions=dict(conditions), **digits)


def show(file: Path, pictures: Mapping[int, Uint8], texts: Sequence[str], steps: int) -> None:
    """A row of pictures per split, the same prompts and noise in each."""
    from diffship.benchmarks.grid import grid, png_bytes

    ends = sorted(pictures, reverse=True)
    cells = [picture for end in ends for picture in pictures[end][:SHOWN]]
    labels = [f"{end},{steps - end}: {text}" for end in ends for text in texts[:SHOWN]]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, png_bytes(grid(cells, labels, min(SHOWN, len(texts)))))


def run(arguments: argparse.Namespace) -> list[Row]:
    from contextlib import ExitStack

    from diffship.runtimes.model import open_model

    asked = parse_splits(arguments.splits)
    found = {end: Figures() for end in asked.ends}
    with ExitStack() as stack:
        large, small = (
            stack.enter_context(open_model(text, arguments.engine)) for text in (arguments.large, arguments.small)
        )
        for warning in check_pair([large, small], asked.sampler):
            print(f"warning: {warning}", file=sys.stderr)
        bench = Bench.read(arguments.data, arguments.judge, large.tokenizers["tokenizer"])
        prompts = ask(bench, bench.training, arguments.prompts, seed=1)
        captions, (_, real) = bench.captions(), bench.look(prompts.real)
        for seed in range(arguments.seeds):
            requests = [asked.request(text, 10_000 * seed + place) for place, text in enumerate(prompts.texts)]
            pictures = drawn_by_split(large, small, requests, asked)
            judged(bench, prompts, captions, real, pictures, found)
            if arguments.grid and not seed:
                show(arguments.grid, pictures, prompts.texts, asked.steps)
        timed(large, small, prompts.texts[:TIMED], asked, found)
        if arguments.curve:
            curve = curve_of(found, large, small, asked.steps, arguments.metric)
            arguments.curve.parent.mkdir(parents=True, exist_ok=True)
            write_file(arguments.curve, json.dumps(jsonable(curve), indent=1) + "\n")
    return rows_of(found, asked.steps)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("large", help="bundle or source")
    parser.add_argument("small", help="bundle or source")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", type=Path, default=Path(__file__).parents[1] / "models" / "emoji" / "judge")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), metavar="A,B")
    parser.add_argument("--engine")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--metric", choices=[f"top{rank}" for rank in RANKS], default="top5", help="of the curve")
    parser.add_argument("--curve", type=Path, help="write the pair's quality curve")
    parser.add_argument("--grid", type=Path, help="picture grid of the splits, as PNG")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rows = run(arguments)
    if arguments.out:
        command = f"python -m diffship.benchmarks.handoff_quality {arguments.large} {arguments.small} --data DATA"
        command += f" --prompts {arguments.prompts} --seeds {arguments.seeds} --splits {' '.join(arguments.splits)}"
        write_result(arguments.out, SUITE, command, rows, {"guidance": 4.0, "sampler": "ddim"})
    for row in rows:
        print(f"{row.subject:34} {row.metric:34} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


if __name__ == "__main__":
    main()
