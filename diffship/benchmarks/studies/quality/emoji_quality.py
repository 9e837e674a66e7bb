"""Judge figures of an `emoji` model: does it draw what the caption says?

    python -m diffship.benchmarks emoji-quality [--model MODEL] [--data DATA]

MODEL is a bundle or a source (emoji); DATA is the folder that `diffship train emoji-data` wrote (data/emoji, or made
of npm's archives now). Training prompts and held-out skin-tone combinations are drawn apart; real pictures of the
same captions are the ceiling, an untrained U-Net the floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.catalogue import results_file
from diffship.benchmarks.entry import enter
from diffship.benchmarks.freshness import digest
from diffship.benchmarks.measure.case import label
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.quality.judging import RANKS, Bench, Judging, ask, figure_rows
from diffship.benchmarks.studies.quality.scores import hits, nearest
from diffship.benchmarks.studies.workbench import JUDGE, add_work, emoji_data, untrained
from diffship.core.job import Job, digest_of
from diffship.core.stopwatch import timed

SUITE = "emoji-quality"
Uint8 = NDArray[np.uint8]
K = TypeVar("K", bound=Hashable)


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


def _row(subject: str, metric: str, value: float, unit: str = "share") -> Row:
    return Row(SUITE, subject, metric, round(float(value), 4), unit, kind="quality")


def draw(
    model: Any,
    texts: Sequence[str],
    seeds: int,
    steps: int,
    guidance: float,
    batch: int = 32,
    sampler: str = "ddim",
    first_seed: int = 0,
) -> Uint8:
    """(seeds * n, size, size, 3): every prompt once per seed; the noise of a prompt is fixed by its place and seed."""
    from diffship.sampling.generate import Request, generate_many

    requests = [
        Request(prompt=text, steps=steps, guidance=guidance, seed=10_000 * seed + place, sampler=sampler)
        for seed in range(first_seed, first_seed + seeds)
        for place, text in enumerate(texts)
    ]
    pictures: list[Uint8] = []
    for first in range(0, len(requests), batch):
        pictures += [picture.pixels for picture in generate_many(model, requests[first : first + batch])]
        print(f"drawn {len(pictures)} of {len(requests)}", file=sys.stderr)
    return np.stack(pictures)


def draw_once(job: Job, suite: str, model: Any, texts: Sequence[str], seed: int, **how: Any) -> Uint8:
    """(n, size, size, 3): `draw` with one seed, which `job` keeps as long as the suite's code and the files of `model`
    stay."""
    from safetensors.numpy import load_file, save_file

    def make(out: Path) -> None:
        pixels = draw(model, texts, 1, first_seed=seed, **how)
        save_file({"pixels": np.ascontiguousarray(pixels)}, out)

    facts = [digest(results_file(suite), ["onnxruntime"]), model.digest, _files(model), how, seed, list(texts)]
    return np.asarray(load_file(job.once(f"drawn-{digest_of(facts)[:20]}", make))["pixels"], np.uint8)


def _files(model: Any) -> dict[str, str]:
    """sha256 of the files of a bundle's parts: in all number formats its digest is that of the same source weights."""
    from diffship.runtimes.engines.model import BundleModel

    if not isinstance(model, BundleModel):
        return {}
    manifest = model.bundle.manifest
    return {name: manifest.files[name].sha256 for part in manifest.parts for name in part.files}


def seconds_in_turns(draws: Mapping[K, Callable[[int], object]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each of `draws`, which are told the turn: `rounds` values, in turns, so that drift meets all alike."""
    found: dict[K, list[float]] = {key: [] for key in draws}
    for turn in range(rounds + 1):
        for key, draw_one in draws.items():
            _, seconds = timed(partial(draw_one, turn))
            if turn:  # the first picture prepares
                found[key].append(seconds)
    return found


def run(arguments: argparse.Namespace) -> list[Row]:
    from diffship.runtimes.engines.model import open_model

    with open_model(arguments.model) as model:
        bench = Bench.read(arguments.data, arguments.judge, model.tokenizers["tokenizer"])
        asked = {
            "training prompts": ask(bench, bench.training, arguments.prompts, seed=1),
            "held-out combinations": ask(bench, bench.held_out, len(bench.held_out) * arguments.held_out_times, seed=2),
        }
        rows: list[Row] = []
        for name, group in asked.items():
            drawn = draw(model, group.texts, arguments.seeds, arguments.steps, arguments.guidance)
            judging = Judging.of(bench, group)
            by_seed = [judging.look(pixels, {}) for pixels in np.split(drawn, arguments.seeds)]
            rows += figure_rows(SUITE, f"model, {name}", by_seed, {}, trained=False)
            rows += figure_rows(SUITE, f"real pictures, {name}", [judging.look(group.real, {})], {}, trained=False)
            if name == "training prompts":
                rows += nearest_rows(bench, "model", drawn)
    if not arguments.no_untrained:
        with open_model(str(untrained(arguments.work))) as model:
            floor = ask(bench, bench.training, min(100, arguments.prompts), seed=1)
            drawn = draw(model, floor.texts, 1, arguments.steps, arguments.guidance)
            judged = [Judging.of(bench, floor).look(drawn, {})]
            rows += figure_rows(SUITE, "untrained model", judged, {}, trained=False)
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
    parser.add_argument("--model", default="emoji", help="bundle or source (emoji)")
    parser.add_argument("--data", type=Path, help="pictures with captions (made)")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--no-untrained", action="store_true", help="without the floor: emoji with an untrained U-Net")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--held-out-times", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    add_work(parser)
    arguments = parser.parse_args(argv)
    arguments.data = arguments.data or emoji_data(arguments.work)
    rows = run(arguments)
    if arguments.out:
        command = f"python -m diffship.benchmarks emoji-quality --model {label(arguments.model)}"
        command += f" --prompts {arguments.prompts} --seeds {arguments.seeds} --steps {arguments.steps}"
        notes = {
            "guidance": arguments.guidance,
            "sampler": "ddim",
            "captions": "distinct concepts of the stated domain",
        }
        write_result(arguments.out, SUITE, command, rows, notes)
    for row in rows:
        print(f"{row.subject:60} {row.metric:28} {row.value} {row.unit}")


if __name__ == "__main__":
    enter(main)
