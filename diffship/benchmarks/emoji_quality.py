"""Judge figures of an `emoji` model: does it draw what the caption says?

    python -m diffship.benchmarks.emoji_quality MODEL --data DATA --out benchmarks/results/emoji-quality.json

MODEL is a bundle or a source; DATA is the folder that `diffship train emoji-data` wrote. Training prompts and
held-out skin-tone combinations are drawn apart; real pictures of the same captions are the ceiling, an untrained U-Net
the floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.bootstrap import interval
from diffship.benchmarks.quality import frechet_distance, hits, nearest
from diffship.benchmarks.record import write_result
from diffship.core.row import Row

if TYPE_CHECKING:
    from diffship.models.judge import Judge
    from diffship.sampling.tokenizer import Tokenizer
    from diffship.training.pictures import Pictures

RANKS = (1, 5)
Uint8 = NDArray[np.uint8]


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


def judge_rows(bench: Bench, subject: str, asked: Asked, drawn: Uint8, seeds: int = 1) -> list[Row]:
    """top-1, top-5 with their 95 % intervals, and the Fréchet distance to the real pictures."""
    seen, features = bench.look(drawn)
    captions = bench.captions()
    wanted = list(asked.wanted) * seeds
    rows = []
    for rank in RANKS:
        right = interval(hits(seen, captions, wanted, rank).astype(np.float64).reshape(seeds, -1))
        rows.append(_row(subject, f"top{rank}", right.mean, low=right.low, high=right.high, n=seeds * right.units))
    _, real = bench.look(asked.real)
    rows.append(_row(subject, "frechet_distance", frechet_distance(features, real), "judge features"))
    return rows


def nearest_rows(bench: Bench, subject: str, drawn: Uint8) -> list[Row]:
    """Median distance to the nearest training picture, beside that of training pictures to each other."""

    def small(pixels: Uint8) -> NDArray[np.float32]:
        return pixels[:, ::2, ::2].astype(np.float32) / 127.5 - 1

    training = small(bench.training.pixels)
    own = [nearest(training[i : i + 1], np.delete(training, i, axis=0))[0] for i in range(0, len(training), 8)]
    return [
        _row(
            subject, "nearest_training_rms_median", float(np.median(nearest(small(drawn), training))), "rms of [-1, 1]"
        ),
        _row("training pictures", "nearest_training_rms_median", float(np.median(own)), "rms of [-1, 1]"),
    ]


def _row(subject: str, metric: str, value: float, unit: str = "share", **spread: Any) -> Row:
    digits: dict[str, Any] = {name: round(float(entry), 4) if name != "n" else entry for name, entry in spread.items()}
    return Row("emoji-quality", subject, metric, round(float(value), 4), unit, kind="quality", **digits)


def draw(model: Any, texts: Sequence[str], seeds: int, steps: int, guidance: float, batch: int = 32) -> Uint8:
    """(seeds * n, size, size, 3): every prompt once per seed; the noise of a prompt is fixed by its place and seed."""
    from diffship.sampling.generate import Request, generate_many

    requests = [
        Request(prompt=text, steps=steps, guidance=guidance, seed=10_000 * seed + place, sampler="ddim")
        for seed in range(seeds)
        for place, text in enumerate(texts)
    ]
    pictures: list[Uint8] = []
    for first in range(0, len(requests), batch):
        pictures += [picture.pixels for picture in generate_many(model, requests[first : first + batch])]
        print(f"drawn {len(pictures)} of {len(requests)}", file=sys.stderr)
    return np.stack(pictures)


def run(arguments: argparse.Namespace) -> list[Row]:
    from diffship.runtimes.model import open_model

    with open_model(arguments.model) as model:
        bench = Bench.read(arguments.data, arguments.judge, model.tokenizers["tokenizer"])
        asked = {
            "training prompts": ask(bench, bench.training, arguments.prompts, seed=1),
            "held-out combinations": ask(bench, bench.held_out, len(bench.held_out) * arguments.held_out_times, seed=2),
        }
        rows = []
        for name, group in asked.items():
            drawn = draw(model, group.texts, arguments.seeds, arguments.steps, arguments.guidance)
            rows += judge_rows(bench, f"model, {name}", group, drawn, arguments.seeds)
            rows += judge_rows(bench, f"real pictures, {name}", group, group.real)
            if name == "training prompts":
                rows += nearest_rows(bench, "model", drawn)
    if arguments.untrained:
        with open_model(arguments.untrained) as model:
            floor = ask(bench, bench.training, min(100, arguments.prompts), seed=1)
            drawn = draw(model, floor.texts, 1, arguments.steps, arguments.guidance)
            rows += judge_rows(bench, "untrained model", floor, drawn)
    return rows + judge_checks(bench, arguments.data)


def judge_checks(bench: Bench, data: Path) -> list[Row]:
    """The judge on pictures it never saw: held-out combinations, and a second drawing style of held-out concepts."""
    from diffship.training.judge import style_held_out
    from diffship.training.pictures import Pictures

    def second_style(record: dict[str, Any]) -> bool:
        known = record["concept"] in bench.concepts and not record["tone"]
        return known and record["style"] == "google" and style_held_out(record["concept"])

    other = Pictures.read(data, second_style)
    captions, rows = bench.captions(), []
    for subject, pictures in (("held-out combinations", bench.held_out), ("second style, unseen concepts", other)):
        seen, _ = bench.look(pictures.pixels)
        wanted = [bench.concepts.index(record["concept"]) for record in pictures.records]
        for rank in RANKS:
            value = float(hits(seen, captions, wanted, rank).mean())
            rows.append(_row(f"judge on real pictures, {subject} ({len(pictures)})", f"top{rank}", value))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="bundle or source")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", type=Path, default=Path(__file__).parents[1] / "models" / "emoji" / "judge")
    parser.add_argument("--untrained", help="bundle or source of the same model with an untrained U-Net")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--held-out-times", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rows = run(arguments)
    if arguments.out:
        command = "python -m diffship.benchmarks.emoji_quality emoji --data DATA --untrained UNTRAINED"
        command += f" --prompts {arguments.prompts} --seeds {arguments.seeds} --steps {arguments.steps}"
        notes = {
            "guidance": arguments.guidance,
            "sampler": "ddim",
            "captions": "distinct concepts of the stated domain",
        }
        write_result(arguments.out, "emoji-quality", command, rows, notes)
    for row in rows:
        print(f"{row.subject:60} {row.metric:28} {row.value} {row.unit}")


if __name__ == "__main__":
    main()
