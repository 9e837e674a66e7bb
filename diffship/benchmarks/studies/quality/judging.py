"""Sets of pictures before the judge of `emoji`: figures per prompt, and the rows and comparisons made of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.measure.intervals import Interval, quality, quality_verdict, spread
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.quality.scores import frechet_distance, hits
from diffship.core.errors import ConfigError

if TYPE_CHECKING:
    from diffship.sampling.tokenizer import Tokenizer
    from diffship.training.judge_model import Judge
    from diffship.training.pictures import Pictures

RANKS = (1, 5)

Uint8 = NDArray[np.uint8]
Table = NDArray[np.float64]
_DIGITS = 5


@dataclass(frozen=True)
class Bench:
    """The judge, the captions it chooses among (distinct concepts of the domain), and the real pictures."""

    judge: Judge
    tokenizer: Tokenizer
    concepts: tuple[str, ...]
    training: Pictures
    held_out: Pictures

    @classmethod
    def read(cls, data: Path, judge: Path, tokenizer: Tokenizer) -> Bench:
        from diffship.training.judge_model import load_judge
        from diffship.training.pictures import Pictures

        def inside(split: str) -> Pictures:
            return Pictures.read(data, lambda r: r["style"] == "fluent" and r["domain"] and r["split"] == split)

        training = inside("train")
        concepts = tuple(sorted({record["concept"] for record in training.records}))
        return cls(load_judge(judge), tokenizer, concepts, training, inside("held_out"))

    def captions(self) -> NDArray[np.float64]:
        """(m, d) unit vectors of the distinct captions."""
        import torch

        ids = self.tokenizer(self.concepts).ids
        ends = (ids == ids[0, -1]).argmax(axis=1)  # padding repeats the end token; only the first one counts
        mask = np.arange(ids.shape[1]) <= ends[:, None]
        return np.asarray(self.judge.read(torch.from_numpy(ids), torch.from_numpy(mask)).double().numpy())

    def look(self, pixels: Uint8) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, size, size, 3) uint8 -> unit vectors and features of the judge."""
        import torch

        seen, features = [], []
        for start in range(0, len(pixels), 64):
            batch = torch.from_numpy(pixels[start : start + 64]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            seen.append(self.judge.see(batch).double().numpy())
            features.append(self.judge.features(batch).double().numpy())
        return np.concatenate(seen), np.concatenate(features)


@dataclass(frozen=True)
class Asked:
    """Prompts with the concept each must be recognised as and a real picture of each."""

    texts: tuple[str, ...]
    wanted: tuple[int, ...]
    real: Uint8


def ask(bench: Bench, pictures: Pictures, count: int, seed: int) -> Asked:
    """`count` captions of `pictures`: each once while they last, then again."""
    order = np.random.default_rng(seed).permutation(len(pictures))
    rows = [int(order[i % len(order)]) for i in range(count)]
    records = [pictures.records[row] for row in rows]
    wanted = tuple(bench.concepts.index(record["concept"]) for record in records)
    return Asked(tuple(record["text"] for record in records), wanted, pictures.pixels[rows])


@dataclass(frozen=True)
class Judged:
    """One set of pictures: figures of every prompt by metric (`top1`, `top5`, distances), and of the whole.

    `prompts` are the texts; a text that was asked several times stands there as often.
    """

    by_prompt: dict[str, list[float]]
    frechet: float
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Judging:
    """Prompts with what each is to be recognised as, and real pictures of them to compare with."""

    bench: Bench
    asked: Asked
    captions: Table
    real: Table

    @classmethod
    def read(cls, data: Path, judge: Path, tokenizer: Tokenizer, prompts: int) -> Judging:
        bench = Bench.read(data, judge, tokenizer)
        return cls.of(bench, ask(bench, bench.training, prompts, seed=1))

    @classmethod
    def of(cls, bench: Bench, asked: Asked) -> Judging:
        return cls(bench, asked, bench.captions(), bench.look(asked.real)[1])

    def look(self, pixels: Uint8, beside: Mapping[str, Uint8]) -> Judged:
        """Whether each picture (n, size, size, 3) is recognised, and its distance to its neighbour in other sets.

        beside: metric -> pictures; distances are root mean squares in units of [-1, 1].
        """
        seen, features = self.bench.look(pixels)
        found = {f"top{rank}": hits(seen, self.captions, self.asked.wanted, rank).astype(float) for rank in RANKS}
        for metric, others in beside.items():
            difference = (pixels.astype(np.float64) - others) / 127.5
            found[metric] = np.sqrt(np.square(difference).mean((1, 2, 3)))
        by_prompt = {metric: values.tolist() for metric, values in found.items()}
        return Judged(by_prompt, frechet_distance(features, self.real), self.asked.texts)


def figure_rows(
    suite: str, subject: str, judged: Sequence[Judged], conditions: Mapping[str, Any], trained: bool
) -> list[Row]:
    """Means over seeds and prompts with their 95 % intervals, and the Fréchet distance with its range over seeds.

    One Judged a seed; `trained`: of training (another model each), not of sampling (the same model again).
    """
    rows = []
    for metric in judged[0].by_prompt:
        found = quality([entry.by_prompt[metric] for entry in judged], judged[0].prompts, trained)
        unit = "share" if metric.startswith("top") else "rms of [-1, 1]"
        rows.append(_interval_row(suite, subject, metric, found, unit, conditions))
    distances = [entry.frechet for entry in judged]
    value = statistics.mean(distances)
    last = quality_row(suite, subject, "frechet_distance", value, "judge features", conditions, spread(distances))
    return [*rows, last]


def difference_row(
    suite: str,
    names: tuple[str, str],
    sides: tuple[Sequence[Judged], Sequence[Judged]],
    metric: str,
    better: str,
    conditions: Mapping[str, Any],
    trained: bool,
) -> Row:
    """Ours minus theirs over the same seeds and prompts, its interval, and what may be said of it."""
    ours, theirs = (np.array([entry.by_prompt[metric] for entry in side]) for side in sides)
    if ours.shape != theirs.shape or sides[0][0].prompts != sides[1][0].prompts:
        raise ConfigError(f"{names[0]} and {names[1]} were not judged on the same seeds and prompts")
    found = quality(ours - theirs, sides[0][0].prompts, trained)
    seeds, count = len(ours), len(sides[0][0].prompts)
    said = quality_verdict(found, better, seeds, count, trained)
    facts = {**conditions, "against": names[1], "verdict": said, "seeds": seeds}
    return _interval_row(suite, f"{names[0]} against {names[1]}", f"{metric}_difference", found, "", facts)


def _interval_row(
    suite: str, subject: str, metric: str, found: Interval, unit: str, conditions: Mapping[str, Any]
) -> Row:
    low, high = found.low, found.high
    if unit == "share":  # the interval is symmetric, and no share lies outside 0 to 1
        low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (low, high))
    span = {"low": low, "high": high, "n": found.n}
    return quality_row(suite, subject, metric, found.mean, unit, {**conditions, "interval": found.how}, span)


def quality_row(
    suite: str,
    subject: str,
    metric: str,
    value: float,
    unit: str,
    conditions: Mapping[str, Any],
    span: Mapping[str, Any],
) -> Row:
    """A row of quality in five digits; `span` has `low`, `high` (None: there is no spread) and `n`."""
    low, high = (None if end is None else _rounded(end) for end in (span["low"], span["high"]))
    facts = dict(conditions)
    shape: dict[str, Any] = {"kind": "quality", "low": low, "high": high, "n": span["n"], "conditions": facts}
    return Row(suite, subject, metric, _rounded(value), unit, **shape)


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS) + 0.0  # what rounds to -0.0 is 0.0


def show(file: Path, sets: Mapping[str, Uint8], texts: Sequence[str]) -> None:
    """A PNG with a row of pictures for each set, the same prompts in each; labels name the set and the prompt."""
    from diffship.core.atomic import write_file
    from diffship.sampling.grid import grid, png_bytes

    cells = [picture for pictures in sets.values() for picture in pictures[: len(texts)]]
    labels = [f"{name}: {text}" for name in sets for text in texts]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, png_bytes(grid(cells, labels, len(texts))))
