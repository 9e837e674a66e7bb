"""What number formats leave of the pictures, and what they save: `emoji` in each, against itself in fp32.

    python -m diffship.benchmarks formats [--formats NAME ...] [--prompts N] [--seeds N] [--grid FILE]

Every format draws the same prompts from the same noise. Integer formats get their ranges and their budgets from one
calibration, whose prompts are those of `diffship calibrate`. Bundles, calibration and pictures are kept in `--work`, so
that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.intervals import quality, ratio, ratio_verdict, spread
from diffship.benchmarks.measure.machine import code_digest
from diffship.benchmarks.measure.materials import GRAPHS, WEIGHTS
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
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
from diffship.core.bundle import Bundle
from diffship.core.compare import picture_psnr
from diffship.core.errors import ConfigError
from diffship.core.job import Job, digest_of
from diffship.core.quiet import timing
from diffship.core.strict import unknown
from diffship.sampling.generate import generate
from diffship.sampling.model import Model
from diffship.sampling.request import Request

SUITE = "formats"
SOURCE = "emoji"
HOW = {"steps": 25, "guidance": 4.0, "sampler": "ddim"}
SAMPLES = 64  # pictures of the calibration
ROUNDS = 5
SHOWN = 8
EQUAL_DB = 100.0  # what stands for a picture without a difference
Uint8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """name: of the rows. options: of `export --to onnx`."""

    name: str
    options: Mapping[str, Any]

    @property
    def measured(self) -> bool:
        """Whether it needs the calibration: for its ranges, or for the budget of its bits."""
        return not self.options.keys().isdisjoint(("ranges", "bits"))


def _ranged(precision: str, ranges: str) -> Format:
    return Format(f"{precision}, {ranges}", {"precision": precision, "ranges": ranges})


REFERENCE = Format("fp32", {"precision": "fp32"})
_FORMATS = (
    REFERENCE,
    *(Format(name, {"precision": name}) for name in ("fp16", "int8-weights", "int4-weights")),
    *(Format(f"{bits} bits a weight", {"precision": "mixed-weights", "bits": bits}) for bits in (6.0, 5.0)),
    *(_ranged("int8", ranges) for ranges in ("max", "percentile", "mse", "min-mean")),
    *(_ranged("w8a16", ranges) for ranges in ("max", "min-mean")),
)
FORMATS = {entry.name: entry for entry in _FORMATS}


class Made:
    """Bundles of SOURCE, and the calibration that some of them need, each made once for this code."""

    def __init__(self, work: Path, samples: int) -> None:
        self.job = Job(work / SUITE, lambda label, done, total: print(f"{label} {done}/{total}", file=sys.stderr))
        self._code = code_digest(names=(*WEIGHTS, *GRAPHS, "calibration"))
        self._samples = samples

    def bundle(self, asked: Format) -> Path:
        from diffship.export import export

        options = dict(asked.options)
        if asked.measured:
            options["calibration"] = str(self._calibration(sensitivity="bits" in options))
        key = digest_of([SOURCE, sorted(asked.options.items()), self._samples if asked.measured else 0, self._code])
        return self.job.once(f"bundle-{key[:20]}", lambda out: export(SOURCE, to="onnx", out=out, **options))

    def _calibration(self, sensitivity: bool) -> Path:
        from diffship.calibration.capture import Capture, calibrate
        from diffship.calibration.prompts import chosen
        from diffship.calibration.sensitivity import measure, write_sensitivity
        from diffship.calibration.stored import write_calibration
        from diffship.models.sources.opening import open_source

        def make(out: Path) -> None:
            pipeline = open_source(SOURCE)
            how = {name: HOW[name] for name in ("steps", "guidance")}
            asked = Capture(chosen(None, self._samples), **how)  # type: ignore[arg-type]
            found = calibrate(pipeline, asked, self.job)
            write_calibration(found, out)
            if sensitivity:  # of every layer alone, which takes much longer than the ranges
                write_sensitivity(measure(pipeline, asked, found, self.job), out)

        return self.job.once(f"calibration-{digest_of([SOURCE, self._samples, sensitivity, self._code])[:20]}", make)


def picture_db(ours: Uint8, reference: Uint8) -> list[float]:
    """PSNR of each picture (n, size, size, 3) to its neighbour in dB, EQUAL_DB where they are equal."""
    return [min(picture_psnr(*pair), EQUAL_DB) for pair in zip(ours, reference, strict=True)]


def seconds_of(models: Mapping[str, Model], rounds: int) -> dict[str, list[float]]:
    """Seconds of one picture of each model, in turns."""

    def drawing(model: Model) -> Callable[[int], object]:
        return lambda turn: generate(model, Request("red apple", seed=turn, **HOW))  # type: ignore[arg-type]

    return seconds_in_turns({name: drawing(model) for name, model in models.items()}, rounds)


def quality_rows(found: Mapping[str, Sequence[Judged]], likeness: Mapping[str, Sequence[Sequence[float]]]) -> list[Row]:
    """Figures of every format, what they differ by from the reference's, and how like its pictures are."""
    rows, reference = [], found[REFERENCE.name]
    for name, judged in found.items():
        rows += figure_rows(SUITE, name, judged, HOW, trained=False)
        if name == REFERENCE.name:
            continue
        like = quality(likeness[name], judged[0].prompts, trained=False)
        span = {"low": like.low, "high": like.high, "n": like.n}
        rows.append(quality_row(SUITE, name, "picture_psnr", like.mean, "dB", HOW, span))
        for metric in (f"top{rank}" for rank in RANKS):
            names, sides = (name, REFERENCE.name), (judged, reference)
            rows.append(difference_row(SUITE, names, sides, metric, "higher", HOW, trained=False))
    return rows


def cost_rows(sizes: Mapping[str, int], seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Bytes of the denoiser, seconds of a picture, and both as shares of the reference's."""
    rows, name = [], REFERENCE.name
    for other, size in sizes.items():
        rows.append(Row(SUITE, other, "denoiser_bytes", size, "bytes", kind="size"))
        rows.append(Row(SUITE, other, "denoiser_bytes_share", round(size / sizes[name], 4), "share", kind="size"))
    for other, each in seconds.items():
        value = float(np.median(each))
        rows.append(Row(SUITE, other, "picture_seconds", value, "s", conditions=dict(HOW), **spread(each)))
        if other != name and len(each) > 1:
            share = ratio(each, seconds[name])
            said = ratio_verdict(share.low, share.high, len(each))
            facts = {**HOW, "against": name, "interval": share.how, "verdict": said}
            span: dict[str, Any] = {"low": share.low, "high": share.high, "n": share.n}
            rows.append(Row(SUITE, other, "picture_seconds_ratio", share.mean, "", conditions=facts, **span))
    return rows


def run(arguments: argparse.Namespace) -> list[Row]:
    from diffship.runtimes.engines.model import open_model

    made = Made(arguments.work, arguments.samples)
    bundles = {name: made.bundle(FORMATS[name]) for name in dict.fromkeys([REFERENCE.name, *arguments.formats])}
    found: dict[str, list[Judged]] = {name: [] for name in bundles}
    likeness: dict[str, list[list[float]]] = {name: [] for name in bundles}
    shown: dict[str, Uint8] = {}
    with ExitStack() as stack:
        models = {name: stack.enter_context(open_model(str(place))) for name, place in bundles.items()}
        tokenizer = models[REFERENCE.name].tokenizers["tokenizer"]
        judging = Judging.read(arguments.data, arguments.judge, tokenizer, arguments.prompts)
        texts = judging.asked.texts
        for seed in range(arguments.seeds):
            reference = draw_once(made.job, SUITE, models[REFERENCE.name], texts, seed, **HOW)
            for name, model in models.items():
                pixels = draw_once(made.job, SUITE, model, texts, seed, **HOW)
                found[name].append(judging.look(pixels, {}))
                likeness[name].append(picture_db(pixels, reference))
                shown.setdefault(name, pixels[:SHOWN])
        with timing(SUITE):
            seconds = seconds_of(models, arguments.rounds)
    if arguments.grid:
        show(arguments.grid, shown, texts[:SHOWN])
    opened = {name: Bundle.open(place) for name, place in bundles.items()}
    sizes = {name: bundle.part_bytes(bundle.manifest.family.kind.denoiser) for name, bundle in opened.items()}
    return [*quality_rows(found, likeness), *cost_rows(sizes, seconds)]


def command_of(arguments: argparse.Namespace) -> str:
    """The command that measures the same again."""
    numbers = [f"--{name}={getattr(arguments, name)}" for name in ("prompts", "seeds", "samples", "rounds")]
    some = [] if list(arguments.formats) == list(FORMATS) else ["--formats", *arguments.formats]
    return shlex.join(["python", "-m", "diffship.benchmarks", SUITE, *numbers, *some])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", metavar="NAME", default=list(FORMATS), help=f"{', '.join(FORMATS)}")
    parser.add_argument("--data", type=Path, help="pictures with captions (made)")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"pictures of the calibration ({SAMPLES})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed pictures of each format ({ROUNDS})")
    parser.add_argument("--grid", type=Path, help="a row of pictures for every format, as PNG")
    add_work(parser)
    arguments = parser.parse_args(argv)
    for name in arguments.formats:
        if name not in FORMATS:
            raise ConfigError(unknown("format", name, FORMATS))
    arguments.data = arguments.data or emoji_data(arguments.work)
    rows = run(arguments)
    if arguments.out:
        settings = {"reference": REFERENCE.name, "samples": arguments.samples}
        write_result(arguments.out, SUITE, command_of(arguments), rows, settings)
    for row in rows:
        print(f"{row.subject:30} {row.metric:24} {row.value} {row.unit} {row.conditions.get('verdict', '')}")


if __name__ == "__main__":
    enter(main)
