"""Make, draw and judge the small models of an experiment, and say which differ.

    python -m diffship.benchmarks.siblings EXPERIMENT.toml --data DATA --work DIR --out benchmarks/results/NAME.json

Everything that was made or drawn is kept in `--work` by what it depends on, so that a run can be interrupted and gone
on with, and several processes can each make a few models first (`--make NAME`). DATA is the folder that
`diffship train emoji-data` wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.bootstrap import interval, paired, verdict
from diffship.benchmarks.emoji_quality import RANKS, Asked, Bench, ask, draw
from diffship.benchmarks.experiment import Experiment, Model, made_passes, read_experiment
from diffship.benchmarks.quality import frechet_distance, hits
from diffship.benchmarks.record import write_result
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.row import Row
from diffship.core.strict import plain, unknown

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

Uint8 = NDArray[np.uint8]
BETTER = {"top1": "higher", "top5": "higher", "teacher_rms": "lower"}
SHOWN = 8  # prompts in the picture grid
ROUNDS = 15


@dataclass(frozen=True)
class Drawn:
    """One model under one seed: its folder, its bundle, and the pictures of every prompt."""

    folder: Path
    bundle: Path
    pictures: Path


@dataclass(frozen=True)
class Judged:
    """One model under one seed: its bundle, and figures per prompt (`top1`, `top5`, `teacher_rms`) and in whole."""

    bundle: Path
    parameters: int
    by_prompt: dict[str, list[float]]
    frechet: float


class Siblings:
    """Works through an experiment in one folder."""

    def __init__(self, experiment: Experiment, name: str, data: Path, judge: Path, work: Path, engine: str) -> None:
        from diffship.models.sources import open_source

        self.experiment, self.name, self.data, self.engine = experiment, name, data, engine
        self.job = Job(work, lambda label, done, total: print(f"{label} {done}/{total}", file=sys.stderr))
        self.teacher = open_source(experiment.teacher)
        self._judge = judge

    def run(self) -> list[Row]:
        """Every row of the experiment."""
        found = {
            (model.name, seed): self.judged(model, seed) for model in self.experiment.models for seed in model.seeds
        }
        rows = [row for model in self.experiment.models for row in self._rows(model, found)]
        return [*rows, *self._comparisons(found), *self._latencies(found)]

    def make(self, names: Sequence[str]) -> None:
        """Make and draw the models of these names.

        Raises:
            ConfigError: the experiment has no such model.
        """
        known = {model.name: model for model in self.experiment.models}
        for name in names:
            if name not in known:
                raise ConfigError(unknown("model", name, known))
            for seed in known[name].seeds:
                self.drawn(known[name], seed)

    def drawn(self, model: Model, seed: int) -> Drawn:
        """Make, export and draw one model; what is there already is used."""
        from diffship.export import export

        passes = made_passes(self.experiment, model, seed, self.data)
        key = self._key(passes)
        started = time.monotonic()
        folder = self.job.once(f"model-{key}", lambda out: self._make(passes, out))
        bundle = self.job.once(f"bundle-{key}", lambda out: export(str(folder), to="onnx", out=out))
        pictures = self.job.once(self._pictures(key), lambda out: self._draw(folder, bundle, out))
        print(f"{model.name}, seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        return Drawn(folder, bundle, pictures)

    def _key(self, passes: Sequence[Any]) -> str:
        digest = str(self.teacher.components["unet"].digest)
        return _digest([self.experiment.teacher, digest, [[step.kind, plain(step)] for step in passes]])

    def _pictures(self, key: str) -> str:
        settings = [self.experiment.prompts, self.experiment.steps, self.experiment.guidance]
        return f"drawn-{_digest([key, *settings])}"

    def _make(self, passes: Sequence[Any], out: Path) -> None:
        from diffship.compress import compress

        if passes:
            compress(self.experiment.teacher, passes, out, job=self.job)
        else:
            self.teacher.save(out)

    def _draw(self, folder: Path, bundle: Path, out: Path) -> None:
        from safetensors.numpy import save_file

        from diffship.runtimes.model import open_model

        target, options = (str(folder), {"device": "cuda"}) if self.engine == "torch" else (str(bundle), {})
        with open_model(target, self.engine, **options) as model:
            pixels = draw(model, self._asked.texts, 1, self.experiment.steps, self.experiment.guidance)
        save_file({"pixels": np.ascontiguousarray(pixels)}, out)  # the format stores memory as it lies

    def judged(self, model: Model, seed: int) -> Judged:
        """Figures of one model under one seed; what has to be made or drawn for them is."""
        drawn = self.drawn(model, seed)
        pixels = _pixels(drawn.pictures)
        seen, features = self._bench.look(pixels)
        wanted = self._asked.wanted
        by_prompt = {f"top{rank}": hits(seen, self._captions, wanted, rank).astype(float).tolist() for rank in RANKS}
        if self._teacher_pixels is not None:
            difference = (pixels.astype(np.float64) - self._teacher_pixels) / 127.5
            by_prompt["teacher_rms"] = np.sqrt(np.square(difference).mean((1, 2, 3))).tolist()
        distance = frechet_distance(features, self._real_features)
        return Judged(drawn.bundle, _parameters(drawn.folder), by_prompt, distance)

    @cached_property
    def _teacher_pixels(self) -> NDArray[np.float64] | None:
        """Pictures of the first model without passes, from the same noise; None where the experiment has none."""
        bare = next((model for model in self.experiment.models if not model.passes), None)
        return None if bare is None else _pixels(self.drawn(bare, bare.seeds[0]).pictures).astype(np.float64)

    @cached_property
    def _bench(self) -> Bench:
        from diffship.sampling.tokenizer import ClipTokenizer

        return Bench.read(self.data, self._judge, ClipTokenizer.from_files(self.teacher.tokenizers["tokenizer"]))

    @cached_property
    def _asked(self) -> Asked:
        return ask(self._bench, self._bench.training, self.experiment.prompts, seed=1)

    @cached_property
    def _captions(self) -> NDArray[np.float64]:
        return self._bench.captions()

    @cached_property
    def _real_features(self) -> NDArray[np.float64]:
        return self._bench.look(self._asked.real)[1]

    def _rows(self, model: Model, found: Mapping[tuple[str, int], Judged]) -> list[Row]:
        mine = [found[model.name, seed] for seed in model.seeds]
        shared: dict[str, Any] = {"conditions": {"model": model.name, "seeds": len(mine)}}
        rows = [Row(self.name, model.name, "parameters", float(mine[0].parameters), kind="size", **shared)]
        for metric in mine[0].by_prompt:
            shares = interval(np.array([entry.by_prompt[metric] for entry in mine]))
            spread = _spread(shares.low, shares.high, shares.seeds * shares.units)
            unit = "share" if metric.startswith("top") else "rms of [-1, 1]"
            rows.append(_quality(self.name, model.name, metric, shares.mean, unit, {**shared, **spread}))
        distances = [entry.frechet for entry in mine]
        spread = _spread(min(distances), max(distances), len(mine))
        value = statistics.mean(distances)
        return [
            *rows,
            _quality(self.name, model.name, "frechet_distance", value, "judge features", {**shared, **spread}),
        ]

    def _comparisons(self, found: Mapping[tuple[str, int], Judged]) -> list[Row]:
        seeds = {model.name: model.seeds for model in self.experiment.models}
        rows = []
        for wish in self.experiment.comparisons:
            for theirs in wish.theirs:
                a, b = (
                    np.array([found[name, seed].by_prompt[wish.metric] for seed in seeds[name]])
                    for name in (wish.ours, theirs)
                )
                difference = paired(a, b)
                said = verdict(difference, BETTER[wish.metric], quality=True)
                conditions = {"model": wish.ours, "against": theirs, "verdict": said, "seeds": difference.seeds}
                spread = _spread(difference.low, difference.high, a.size)
                subject, metric = f"{wish.ours} against {theirs}", f"{wish.metric}_difference"
                rows.append(
                    _quality(self.name, subject, metric, difference.mean, "", {"conditions": conditions, **spread})
                )
        return rows

    def _latencies(self, found: Mapping[tuple[str, int], Judged]) -> list[Row]:
        """One U-Net call with guidance (two rows) of every model, in rounds, so that drift meets all alike."""
        bundles = {model.name: found[model.name, model.seeds[0]].bundle for model in self.experiment.models}
        seconds = unet_seconds(bundles, ROUNDS)
        rows = []
        for name, values in seconds.items():
            spread = _spread(min(values), max(values), len(values))
            conditions = {"model": name, "runner": "onnxruntime", "part": "unet", "batch": 2}
            value = statistics.median(values)
            rows.append(Row(self.name, name, "unet_call_seconds", value, "s", conditions=conditions, **spread))
        return rows

    def grid(self, file: Path) -> None:
        """A row of pictures per shown model, the same prompts and noise in each."""
        from diffship.benchmarks.grid import grid, png_bytes
        from diffship.core.atomic import write_file

        texts = self._asked.texts[:SHOWN]
        pictures: list[Uint8] = []
        labels: list[str] = []
        for model in (model for model in self.experiment.models if model.shown):
            pictures += list(_pixels(self.drawn(model, model.seeds[0]).pictures)[:SHOWN])
            labels += [f"{model.name}: {text}" for text in texts]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, png_bytes(grid(pictures, labels, SHOWN)))


def unet_seconds(bundles: Mapping[str, Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of a U-Net call with two rows at the model's size: `rounds` values for each bundle, interleaved."""
    from diffship.runtimes.model import open_model

    found: dict[str, list[float]] = {name: [] for name in bundles}
    with ExitStack() as stack:
        models = {name: stack.enter_context(open_model(str(bundle))) for name, bundle in bundles.items()}
        runners = {name: model.use("unet") for name, model in models.items()}
        feeds = {name: _feeds(models[name], runner) for name, runner in runners.items()}
        for turn in range(rounds + 1):
            for name, runner in runners.items():
                started = time.perf_counter()
                runner.run(feeds[name])
                if turn:  # the first call prepares
                    found[name].append(time.perf_counter() - started)
    return found


def _feeds(model: Any, runner: Any) -> dict[str, NDArray[Any]]:
    side = model.family.default_size // model.family.vae_factor
    sizes = {"batch_size": 2, "height": side, "width": side, "sequence_length": 77}
    rng = np.random.default_rng(0)
    feeds = {spec.name: rng.standard_normal(spec.resolve(sizes)).astype(np.float32) for spec in runner.inputs}
    return {**feeds, "timestep": np.full(2, 500.0, np.float32)}


def _spread(low: float, high: float, count: int) -> dict[str, Any]:
    return {"low": round(float(low), 5), "high": round(float(high), 5), "n": count}


def _quality(suite: str, subject: str, metric: str, value: float, unit: str, more: Mapping[str, Any]) -> Row:
    return Row(suite, subject, metric, round(float(value), 4), unit, kind="quality", **more)


def _pixels(file: Path) -> Uint8:
    from safetensors.numpy import load_file

    return np.asarray(load_file(file)["pixels"], np.uint8)


def _parameters(folder: Path) -> int:
    from diffship.compression.narrow import count_parameters
    from diffship.models.sources import open_source

    pipeline: Pipeline = open_source(str(folder))
    return count_parameters(pipeline.components["unet"].weights)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--judge", type=Path, default=Path(__file__).parents[1] / "models" / "emoji" / "judge")
    parser.add_argument("--engine", choices=("onnxruntime", "torch"), default="onnxruntime", help="torch: on a GPU")
    parser.add_argument("--make", metavar="NAME", action="append", help="make and draw this model, and no more")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grid", type=Path, help="picture grid of the shown models, as PNG")
    arguments = parser.parse_args(argv)
    experiment = read_experiment(arguments.experiment, arguments.data)
    name = arguments.experiment.stem
    siblings = Siblings(experiment, name, arguments.data, arguments.judge, arguments.work, arguments.engine)
    if arguments.make:
        siblings.make(arguments.make)
        return
    rows = siblings.run()
    if arguments.grid:
        siblings.grid(arguments.grid)
    if arguments.out:
        command = f"python -m diffship.benchmarks.siblings {arguments.experiment.name} --data DATA --work DIR"
        write_result(arguments.out, name, command, rows, plain(experiment))
    for row in rows:
        print(f"{row.subject:60} {row.metric:24} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


if __name__ == "__main__":
    main()
