"""Sets of pictures before the judge of `emoji`: figures per prompt, and the rows and comparisons made of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.bootstrap import interval, paired, verdict
from diffship.benchmarks.quality import frechet_distance, hits
from diffship.core.row import Row

if TYPE_CHECKING:
    from diffship.models.judge import Judge
    from diffship.sampling.tokenizer import Tokenizer
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
        from diffship.models.judge import load_judge
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
    """One set of pictures: figures of every prompt by metric (`top1`, `top5`, distances), and of the whole."""

    by_prompt: dict[str, list[float]]
    frechet: float


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
        return Judged(by_prompt, frechet_distance(features, self.real))


def figure_rows(suite: str, subject: str, judged: Sequence[Judged], conditions: Mapping[str, Any]) -> list[Row]:
    """Means over seeds and prompts with their 95 % intervals, and the Fréchet distance with its range over seeds."""
    rows = []
    for metric in judged[0].by_prompt:
        values = interval(np.array([entry.by_prompt[metric] for entry in judged]))
        unit = "share" if metric.startswith("top") else "rms of [-1, 1]"
        spread = spread_of(values.low, values.high, values.seeds * values.units)
        rows.append(quality_row(suite, subject, metric, values.mean, unit, conditions, spread))
    distances = [entry.frechet for entry in judged]
    spread, unit = spread_of(min(distances), max(distances), len(distances)), "judge features"
    value = statistics.mean(distances)
    return [*rows, quality_row(suite, subject, "frechet_distance", value, unit, conditions, spread)]


def difference_row(
    suite: str,
    names: tuple[str, str],
    sides: tuple[Sequence[Judged], Sequence[Judged]],
    metric: str,
    better: str,
    conditions: Mapping[str, Any],
) -> Row:
    """Ours minus theirs over the same seeds and prompts, its interval, and what may be said of it."""
    ours, theirs = (np.array([entry.by_prompt[metric] for entry in side]) for side in sides)
    difference = paired(ours, theirs)
    said = verdict(difference, better, quality=True)
    facts = {**conditions, "against": names[1], "verdict": said, "seeds": difference.seeds}
    spread = spread_of(difference.low, difference.high, difference.seeds * difference.units)
    subject = f"{names[0]} against {names[1]}"
    return quality_row(suite, subject, f"{metric}_difference", difference.mean, "", facts, spread)


def quality_row(
    suite: str,
    subject: str,
    metric: str,
    value: float,
    unit: str,
    conditions: Mapping[str, Any],
    spread: Mapping[str, Any],
) -> Row:
    rounded = round(float(value), _DIGITS)
    return Row(suite, subject, metric, rounded, unit, kind="quality", conditions=dict(conditions), **spread)


def spread_of(low: float, high: float, count: int) -> dict[str, Any]:
    return {"low": round(float(low), _DIGITS), "high": round(float(high), _DIGITS), "n": count}


def show(file: Path, sets: Mapping[str, Uint8], texts: Sequence[str]) -> None:
    """A PNG with a row of pictures for each set, the same prompts in each; labels name the set and the prompt."""
    from diffship.benchmarks.grid import grid, png_bytes
    from diffship.core.atomic import write_file

    cells = [picture for pictures in sets.values() for picture in pictures[: len(texts)]]
    labels = [f"{name}: {text}" for name in sets for text in texts]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, png_bytes(grid(cells, labels, len(texts))))
