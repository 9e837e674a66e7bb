"""Make, draw and judge the small models of an experiment, and say which differ.

    python -m diffship.benchmarks NAME [--data DATA] [--make MODEL]

NAME is an experiment of `benchmarks/experiments`. Everything that was made or drawn is kept in `--work` by what it
depends on, so that a run can be interrupted and gone on with, and several processes can each make a few models first
(`--make MODEL`). DATA is the folder that `diffship train emoji-data` wrote (data/emoji, or made of npm's archives now).
"""

from __future__ import annotations

import argparse
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

from diffship.benchmarks import freshness
from diffship.benchmarks.catalogue import experiment_file
from diffship.benchmarks.entry import enter, named_experiment
from diffship.benchmarks.measure.intervals import spread
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.measure.turns import REST_SECONDS
from diffship.benchmarks.studies.quality.emoji_quality import draw
from diffship.benchmarks.studies.quality.experiment import Experiment, Model, made_passes, read_experiment
from diffship.benchmarks.studies.quality.judging import Judged, Judging, difference_row, figure_rows, show
from diffship.benchmarks.studies.workbench import JUDGE, add_work, emoji_data
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.job import Job, digest_of
from diffship.core.quiet import timing
from diffship.core.strict import plain, unknown
from diffship.models.saving import save

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

Uint8 = NDArray[np.uint8]
Found = Mapping[tuple[str, int], Judged]  # by model and seed
BETTER = {"top1": "higher", "top5": "higher", "teacher_rms": "lower"}
SHOWN = 8  # prompts in the picture grid
ROUNDS = 15


@dataclass(frozen=True)
class Drawn:
    """One model under one seed: its folder, its bundle, and the pictures of every prompt."""

    folder: Path
    bundle: Path
    pictures: Path


class Siblings:
    """Works through an experiment in one folder."""

    def __init__(self, experiment: Experiment, name: str, data: Path, judge: Path, work: Path, engine: str) -> None:
        from diffship.models.sources.opening import open_source

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
        return [*rows, *self._comparisons(found), *self._latencies()]

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
        digest = str(self.teacher.denoiser.digest)
        return _digest([self._code, self.experiment.teacher, digest, [[step.kind, plain(step)] for step in passes]])

    @cached_property
    def _code(self) -> str:
        """Models and pictures of other code are made anew: the results file says which code its figures are of."""
        return freshness.digest(experiment_file(self.name), [self.engine])

    def _pictures(self, key: str) -> str:
        settings = [self.experiment.prompts, self.experiment.steps, self.experiment.guidance]
        return f"drawn-{_digest([key, *settings])}"

    def _make(self, passes: Sequence[Any], out: Path) -> None:
        from diffship.compress import compress

        if passes:
            compress(self.experiment.teacher, passes, out, job=self.job)
        else:
            save(self.teacher, out)

    def _draw(self, folder: Path, bundle: Path, out: Path) -> None:
        from safetensors.numpy import save_file

        from diffship.runtimes.engines.model import open_model

        target, options = (str(folder), {"device": "cuda"}) if self.engine == "torch" else (str(bundle), {})
        with open_model(target, self.engine, **options) as model:
            pixels = draw(model, self._judging.asked.texts, 1, self.experiment.steps, self.experiment.guidance)
        save_file({"pixels": np.ascontiguousarray(pixels)}, out)  # the format stores memory as it lies

    def judged(self, model: Model, seed: int) -> Judged:
        """Figures of one model under one seed; what has to be made or drawn for them is."""
        return self._judging.look(_pixels(self.drawn(model, seed)), self._beside)

    @cached_property
    def _beside(self) -> dict[str, Uint8]:
        """Pictures of the first model without passes, from the same noise; none if the experiment has none."""
        bare = next((model for model in self.experiment.models if not model.passes), None)
        return {} if bare is None else {"teacher_rms": _pixels(self.drawn(bare, bare.seeds[0]))}

    @cached_property
    def _judging(self) -> Judging:
        from diffship.sampling.tokenizer import ClipTokenizer

        tokenizer = ClipTokenizer.from_files(self.teacher.tokenizers["tokenizer"])
        return Judging.read(self.data, self._judge, tokenizer, self.experiment.prompts)

    def _rows(self, model: Model, found: Found) -> list[Row]:
        mine = [found[model.name, seed] for seed in model.seeds]
        conditions = {"model": model.name, "seeds": len(mine)}
        count = float(_parameters(self.drawn(model, model.seeds[0]).folder))
        size = Row(self.name, model.name, "parameters", count, kind="size", conditions=conditions)
        return [size, *figure_rows(self.name, model.name, mine, conditions, trained=True)]

    def _comparisons(self, found: Found) -> list[Row]:
        seeds = {model.name: model.seeds for model in self.experiment.models}
        rows = []
        for wish in self.experiment.comparisons:
            for theirs in wish.theirs:
                ours, others = ([found[name, seed] for seed in seeds[name]] for name in (wish.ours, theirs))
                names, conditions = (wish.ours, theirs), {"model": wish.ours}
                better = BETTER[wish.metric]
                sides = (ours, others)
                rows.append(difference_row(self.name, names, sides, wish.metric, better, conditions, trained=True))
        return rows

    def _latencies(self) -> list[Row]:
        """One U-Net call with guidance (two rows) of every model, in rounds, so that drift meets all alike."""
        bundles = {model.name: self.drawn(model, model.seeds[0]).bundle for model in self.experiment.models}
        with timing(self.name):
            seconds = unet_seconds(bundles, ROUNDS)
        rows = []
        for name, values in seconds.items():
            part = Bundle.open(bundles[name]).manifest.family.kind.denoiser
            conditions = {"model": name, "runner": "onnxruntime", "part": part, "batch": 2}
            value = statistics.median(values)
            rows.append(Row(self.name, name, "unet_call_seconds", value, "s", conditions=conditions, **spread(values)))
        return rows

    def grid(self, file: Path) -> None:
        """A row of pictures per shown model, the same prompts and noise in each."""
        shown = [model for model in self.experiment.models if model.shown]
        sets = {model.name: _pixels(self.drawn(model, model.seeds[0])) for model in shown}
        show(file, sets, self._judging.asked.texts[:SHOWN])


def unet_seconds(bundles: Mapping[str, Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of a U-Net call with two rows at the model's size: `rounds` values for each bundle, interleaved."""
    from diffship.runtimes.engines.model import open_model

    found: dict[str, list[float]] = {name: [] for name in bundles}
    with ExitStack() as stack:
        models = {name: stack.enter_context(open_model(str(bundle))) for name, bundle in bundles.items()}
        runners = {name: model.use(model.family.kind.denoiser) for name, model in models.items()}
        feeds = {name: _feeds(models[name], runner) for name, runner in runners.items()}
        for turn in range(rounds + 1):
            for name, runner in runners.items():
                time.sleep(REST_SECONDS)
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


def _pixels(drawn: Drawn) -> Uint8:
    from safetensors.numpy import load_file

    return np.asarray(load_file(drawn.pictures)["pixels"], np.uint8)


def _parameters(folder: Path) -> int:
    from diffship.models.sources.opening import open_source

    pipeline: Pipeline = open_source(str(folder))
    return pipeline.denoiser.parameters


def _digest(value: object) -> str:
    return digest_of(value)[:20]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=named_experiment)
    parser.add_argument("--data", type=Path, help="pictures with captions (made)")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--engine", choices=("onnxruntime", "torch"), default="onnxruntime", help="torch: on a GPU")
    parser.add_argument("--make", metavar="NAME", action="append", help="make and draw this model, and no more")
    add_work(parser)
    parser.add_argument("--grid", type=Path, help="picture grid of the shown models, as PNG")
    arguments = parser.parse_args(argv)
    read_experiment(arguments.experiment)  # a wrong file is told before anything is fetched
    data, name = arguments.data or emoji_data(arguments.work), arguments.experiment.stem
    experiment = read_experiment(arguments.experiment, data)
    siblings = Siblings(experiment, name, data, arguments.judge, arguments.work / name, arguments.engine)
    if arguments.make:
        siblings.make(arguments.make)
        return
    rows = siblings.run()
    if arguments.grid:
        siblings.grid(arguments.grid)
    if arguments.out:
        command = f"python -m diffship.benchmarks {name}"
        write_result(arguments.out, name, command, rows, plain(experiment))
    for row in rows:
        print(f"{row.subject:60} {row.metric:24} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


if __name__ == "__main__":
    enter(main)
