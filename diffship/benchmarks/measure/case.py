"""Case: one thing to measure. A suite is a list of cases; a results file is what they became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffship.core.errors import ConfigError
from diffship.core.job import digest_of
from diffship.core.limits import LIMITS
from diffship.core.precision import FLOATS
from diffship.core.strict import bounded, bounds, choices, key_value

IMAGE = "image"
PART_NAMES = (
    *("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae_encoder", "vae_decoder"),
)
DEVICES = ("cpu", "cuda")
PROMPT = "a red apple on a table"


@dataclass(frozen=True)
@bounded
class Bench:
    """What to measure of which targets: every combination of target, runner, part, batch and number of steps.

    engines: our runners (empty: the installed ones), each perhaps with options: `onnxruntime:threads=1+tune=false`
    stands beside `onnxruntime` as a runner of its own. against: peers by name. parts: part names and `image`, the whole
    way from prompt to picture (empty: all). batches: images at once; with guidance a U-Net call has two rows per image.
    size: pixels a side (0: the model's). calls: timed calls of a part per round; images: timed images per round.
    together: how many of the compared runners are loaded at once and take turns, the first of them always (0: as many
    as memory surely holds; 1: one after the other, which compares rounds instead of neighbouring calls).
    """

    targets: tuple[str, ...]
    engines: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(default=(), metadata=choices(*PART_NAMES, IMAGE))
    batches: tuple[int, ...] = field(default=(1,), metadata=bounds(1, 64))
    steps: tuple[int, ...] = field(default=(4,), metadata=bounds(*LIMITS.steps))
    size: int = field(default=0, metadata=bounds(0, LIMITS.size_px[1]))
    guidance: float = field(default=7.5, metadata=bounds(*LIMITS.guidance))
    sampler: str = "euler"
    precision: str = field(default="fp32", metadata=choices(*FLOATS))
    device: str = field(default="cpu", metadata=choices(*DEVICES))
    calls: int = field(default=5, metadata=bounds(1, 10_000))
    images: int = field(default=1, metadata=bounds(1, 1000))
    together: int = field(default=0, metadata=bounds(0, 64))

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("nothing to measure: name a bundle or a source")


@dataclass(frozen=True)
class Case:
    """One row of a suite: a target in one runner (an engine of ours or a peer), one part, one batch.

    `steps` is 0 for parts. Everything here stands in the row's conditions and in the key under which it is resumed.
    """

    target: str
    runner: str
    part: str
    batch: int
    steps: int
    size: int
    guidance: float
    sampler: str
    precision: str
    device: str
    calls: int

    @property
    def subject(self) -> str:
        """`arch:sd15 / openvino / unet`, with what distinguishes it from its neighbours."""
        extra = [f"{self.steps} steps"] * bool(self.steps) + [f"batch {self.batch}"] * (self.batch > 1)
        return " / ".join([label(self.target), self.runner, self.part]) + "".join(f", {word}" for word in extra)

    @property
    def group(self) -> tuple[object, ...]:
        """Equal for cases that differ in their runner only: those are compared."""
        return tuple(value for name, value in asdict(self).items() if name != "runner")

    def key(self, round_: int, context: Mapping[str, object]) -> str:
        """What a finished measurement is found by: the case, the round, and the code and machine it depends on."""
        return digest_of([asdict(self), round_, dict(context)])

    def conditions(self, weights: str) -> dict[str, Any]:
        """The row's conditions; `weights` says whether they are random."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("target", "calls")}
        return {"model": label(self.target), "weights": weights, **facts}


def sets(cases: Sequence[Case], together: int) -> list[list[Case]]:
    """Cases of one group as they take turns, at most `together` at once: the first one is compared in every set."""
    if together <= 1:
        return [[case] for case in cases]
    first, *others = cases
    starts = range(0, max(len(others), 1), together - 1)
    return [[first, *others[start : start + together - 1]] for start in starts]


def engine_of(runner: str) -> tuple[str, dict[str, Any]]:
    """The engine and the options that a runner's name says: `onnxruntime:threads=1+tune=false`.

    Raises:
        ConfigError: an option without a value.
    """
    engine, _, text = runner.partition(":")
    words = [word for word in text.split("+") if word]
    options = [key_value(word) for word in words]
    if None in options:
        raise ConfigError(f"{runner}: {words[options.index(None)]!r} is not KEY=VALUE")
    return engine, dict(option for option in options if option is not None)


def label(target: str) -> str:
    """How results name a target: as it was given, but an absolute path by its last name alone."""
    return Path(target).name if Path(target).is_absolute() else target


def cases_of(bench: Bench, parts: Mapping[str, tuple[str, ...]], engines: Mapping[str, tuple[str, ...]]) -> list[Case]:
    """Every case of a bench; `parts` and `engines` say what each target has, by target.

    Cases that are compared stand next to each other, so that a round interleaves them.
    """
    cases = []
    for target in bench.targets:
        wanted = [name for name in (*PART_NAMES, IMAGE) if name in (bench.parts or (*parts[target], IMAGE))]
        for part in wanted:
            for batch in bench.batches:
                for steps in bench.steps if part == IMAGE else (0,):
                    runners = (*(bench.engines or engines[target]), *bench.against)
                    cases += [_case(bench, target, runner, part, batch, steps) for runner in runners]
    return cases


def _case(bench: Bench, target: str, runner: str, part: str, batch: int, steps: int) -> Case:
    calls = bench.images if part == IMAGE else bench.calls
    shared = (bench.size, bench.guidance, bench.sampler, bench.precision, bench.device, calls)
    return Case(target, runner, part, batch, steps, *shared)
