"""Hold the README's figures against a cheap measurement of each, in CI: a claim that is contradicted fails.

    python -m diffship.benchmarks sentinels [--only calls,load] [--edge PYTHON] [--peers DIR] [--data DIR]

CLAIMS says which sentinel watches which figure, and how far a cheap form may lie from it: other models, other machines.
A claim is contradicted if the whole interval that was measured lies beyond its bound. What cannot be measured here,
because optimum or the pictures are not there, is told, and fails with `--all`; so is a lead of our engines over other
toolchains on another processor than the results': whose kernels are faster is a fact about a processor.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from diffship.benchmarks.measure.intervals import Interval
from diffship.benchmarks.measure.machine import environment
from diffship.benchmarks.publish.pages import read_all
from diffship.benchmarks.publish.readings import SENTINELS, Kit, Readings
from diffship.benchmarks.studies.workbench import WORK
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.quiet import timing
from diffship.core.strict import unknown

MOST, LEAST = "at most", "at least"
SECONDS = 2.5  # absolute seconds hold on machines of about the same speed; ratios are what is watched closely
SHORT = 2.5  # what is the same for every picture (HTTP, PNG) weighs more in short ones, and most on a fast processor
Figures = Mapping[str, float]
Of = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Claim:
    """What figures of the results claim, and what watches it.

    figures: `file / subject / metric` as in the README's markers; `*` stands for what a subject counted. reading: of a
    sentinel, `sentinel.name`. A reading must be `sense` the claim times `slack` (for at least: divided by it), plus
    `room` (minus). of: what is claimed, from the figures' values. kernels: it compares kernels of other makers.
    """

    figures: tuple[str, ...]
    reading: str
    sense: str = MOST
    slack: float = 1.0
    room: float = 0.0
    of: Of = lambda values: values[0]
    kernels: bool = False

    @property
    def sentinel(self) -> str:
        return self.reading.partition(".")[0]

    def bound(self, figures: Figures) -> float:
        """The largest or the least value that does not contradict it."""
        claimed = self.of([found(name, figures) for name in self.figures])
        return claimed * self.slack + self.room if self.sense == MOST else claimed / self.slack - self.room

    def contradicted(self, reading: Interval, figures: Figures) -> bool:
        low, high = (reading.mean if end is None else end for end in (reading.low, reading.high))
        bound = self.bound(figures)
        holds = low <= bound if self.sense == MOST else high >= bound
        return not holds  # NaN holds nothing


def _ratio(values: Sequence[float]) -> float:
    return values[0] / values[1]


def _product(values: Sequence[float]) -> float:
    return values[0] * values[1]


_SD15 = "cpu-edge / arch:sd15 / {} / unet / call_seconds_p50"
_EMOJI = "cpu-edge / emoji / {} / image, 25 steps / image_seconds_p50"
_IMAGE = "cpu-image / arch:sd15{} / {} / image, 4 steps / image_seconds_p50"
_EXPORT = "export-sd15 / {} / export_{}"
_SERVER = "serving / emoji, 25 steps, {} / {}"
_CAPACITY = _SERVER.format("clients 8, batch 8", "throughput")
_STEADY = "load 0.7*"
_CALL = "compression / {} / unet_call_seconds"


def _pair(form: str, ours: str, theirs: str) -> tuple[str, str]:
    return form.format(ours), form.format(theirs)


CLAIMS = (
    # exports: the published one itself, and its ratios on a quarter of the model, where what is the same for every size
    # (importing torch, say) weighs more
    Claim((_EXPORT.format("diffship", "seconds"),), "export.seconds", slack=SECONDS),
    Claim((_EXPORT.format("diffship", "peak_resident_bytes"),), "export.peak_bytes", slack=1.15),
    Claim(
        _pair("export-sd15 / {} / export_seconds", "diffship", "optimum-cli"),
        "export-peer.seconds_ratio",
        slack=1.7,
        of=_ratio,
    ),
    Claim(
        _pair("export-sd15 / {} / export_peak_resident_bytes", "diffship", "optimum-cli"),
        "export-peer.peak_ratio",
        slack=2.0,
        of=_ratio,
    ),
    # calls and pictures: ratios, side by side
    Claim(_pair(_EMOJI, "onnxruntime", "diffusers"), "calls.diffusers", slack=1.4, of=_ratio, kernels=True),
    Claim(_pair(_EMOJI, "onnxruntime", "optimum"), "calls.optimum", slack=1.25, of=_ratio, kernels=True),
    Claim(
        ("cpu-edge / emoji / onnxruntime / image, 25 steps against optimum / image_seconds_ratio",),
        "calls.optimum",
        slack=1.25,
        kernels=True,
    ),
    Claim(_pair(_SD15, "onnxruntime", "diffusers"), "large-calls.onnxruntime", slack=1.4, of=_ratio, kernels=True),
    Claim(_pair(_SD15, "openvino", "diffusers"), "large-calls.openvino", slack=1.4, of=_ratio, kernels=True),
    Claim(_pair(_SD15, "onnxruntime", "optimum"), "calls.optimum", slack=1.25, of=_ratio, kernels=True),
    Claim(
        (_IMAGE.format("", "onnxruntime"), _IMAGE.format("", "diffusers")),
        "large-calls.onnxruntime",
        slack=1.4,
        of=_ratio,
        kernels=True,
    ),
    Claim(
        (_IMAGE.format("+lcm", "onnxruntime"), _IMAGE.format("+lcm", "diffusers")),
        "large-calls.onnxruntime",
        slack=1.4,
        of=_ratio,
        kernels=True,
    ),
    Claim(_pair(_CALL, "40 %, distilled", "teacher"), "small-model.call_ratio", slack=1.3, of=_ratio),
    # quality: fifty prompts say little, but they would say that a model does not draw
    Claim(("compression / 40 %, distilled / top5",), "judge.small", LEAST),
    Claim(("compression / teacher / top5",), "judge.teacher", LEAST),
    # cold start
    Claim(("cold-start / *without torch / cold_start_seconds_median",), "cold-start.seconds", slack=SECONDS),
    Claim(("cold-start / *without torch / installed_bytes",), "cold-start.installed_bytes", slack=1.2),
    # the server
    Claim((_SERVER.format("clients 8, against one client", "throughput_ratio"),), "load.batching_gain", LEAST, 1.15),
    Claim((_SERVER.format("load 5*", "goodput_over_capacity"),), "load.goodput", LEAST, 1.2),
    Claim((_SERVER.format(_STEADY, "request_seconds_p50"), _CAPACITY), "load.p50_pictures", slack=SHORT, of=_product),
    Claim((_SERVER.format(_STEADY, "request_seconds_p99"), _CAPACITY), "load.p99_pictures", slack=SHORT, of=_product),
    Claim((_SERVER.format(_STEADY, "refused_share"),), "load.refused_share", room=0.02),
    Claim(("serving / * / memory_slope",), "load.grown_mb", room=30.0),  # of half a minute, an arena or two
    # counts
    *(
        claim
        for name, subject, metric in (
            ("requests", "requests that are not legal", "refused"),
            ("files", "files with a changed byte", "refused"),
            ("faults", "faults of the cloud", "survived"),
        )
        for claim in (
            Claim(
                (f"reliability / {subject} / {metric}", f"reliability / {subject} / tried"),
                f"counts.{name}_share",
                LEAST,
                of=_ratio,
            ),
            Claim((f"reliability / {subject} / tried",), f"counts.{name}_tried", LEAST),
        )
    ),
)
# The rulers: what they must read, whatever is claimed.
RULERS = {
    "clock": (1.0, 1.5),
    "client_clock": (1.0, 1.8),
    "peak": (1.0, 1.3),
    "false_verdicts": (0.035, 0.06),
}


def figures_of(root: Path) -> dict[str, float]:
    """`file / subject / metric` -> value of every committed row that has one."""
    return {
        f"{name} / {row.subject} / {row.metric}": row.value
        for name, results in read_all(root).items()
        for row in results.rows
        if row.value is not None
    }


def found(pattern: str, figures: Figures) -> float:
    """The one figure that a claim names.

    Raises:
        ConfigError: there is none, or several.
    """
    names = [name for name in figures if fnmatchcase(name, pattern)]
    if len(names) != 1:
        raise ConfigError(f"a sentinel watches {pattern!r}, and the results have {len(names)} such figures")
    return figures[names[0]]


def watched(marker: str) -> list[Claim]:
    """The claims that hold a figure of a page."""
    return [claim for claim in CLAIMS if any(fnmatchcase(marker, name) for name in claim.figures)]


@dataclass(frozen=True)
class Verdict:
    """One claim, or one ruler: fine, contradicted, or not checked, with a line that says so."""

    status: str
    text: str


def processors(root: Path) -> dict[str, str]:
    """Which processor each committed file was measured on."""
    return {name: str(results.environment.get("cpu")) for name, results in read_all(root).items()}


def judged(
    readings: Mapping[str, Readings | str], figures: Figures, cpus: Mapping[str, str] | None = None, here: str = ""
) -> list[Verdict]:
    """What the readings of each sentinel that ran say; a text instead of readings is why there are none.

    cpus: of each results file; `here`, that of this machine.
    """
    lines = []
    for name, known in readings.items():
        if isinstance(known, str):
            lines.append(Verdict("not checked", f"{name}: {known}"))
        elif name == "instruments":
            lines += [_ruler(key, known[key]) for key in RULERS]
        else:
            found = {claim: _claim(claim, known, figures) for claim in CLAIMS if claim.sentinel == name}
            lines += [_of_processor(claim, line, cpus or {}, here) for claim, line in found.items()]
    return lines


def _ruler(name: str, reading: Interval) -> Verdict:
    low, high = RULERS[name]
    fine = low <= reading.mean <= high
    return Verdict("fine" if fine else "contradicted", f"instruments.{name}: {reading.mean:.4g}, {low:g} to {high:g}")


def _claim(claim: Claim, known: Readings, figures: Figures) -> Verdict:
    reading = known.get(claim.reading.partition(".")[2])
    about = " and ".join(claim.figures)
    if reading is None:
        return Verdict("not checked", f"{claim.reading}: not measured here ({about})")
    span = "" if reading.low is None or reading.high is None else f" ({reading.low:.4g} to {reading.high:.4g})"
    bound = f"{claim.sense} {claim.bound(figures):.4g}"
    status = "contradicted" if claim.contradicted(reading, figures) else "fine"
    return Verdict(status, f"{claim.reading}: {reading.mean:.4g}{span}, {bound} by {about}")


def _of_processor(claim: Claim, line: Verdict, cpus: Mapping[str, str], here: str) -> Verdict:
    """A lead that is gone on another processor is told, and no contradiction."""
    others = {cpus.get(name.partition(" / ")[0], here) for name in claim.figures} - {here}
    if line.status != "contradicted" or not claim.kernels or not others:
        return line
    return Verdict("not checked", f"{line.text}; measured on {', '.join(sorted(others))}, and this is {here}")


def run(kit: Kit, names: Sequence[str], say: Callable[[str], object]) -> dict[str, Readings | str]:
    """The readings of each sentinel, or why it has none."""
    known: dict[str, Readings | str] = {}
    with timing("sentinels"):
        for name in names:
            started = time.monotonic()
            try:
                known[name] = SENTINELS[name](kit)
            except DiffshipError as fault:
                known[name] = str(fault)
            say(f"{name}: {time.monotonic() - started:.0f} s")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sentinels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SENTINELS), metavar="A,B", help=", ".join(SENTINELS))
    parser.add_argument("--root", type=Path, default=Path("."), help="the clone that holds benchmarks/results")
    parser.add_argument("--work", type=Path, default=WORK / "sentinels", metavar="DIR", help="keeps what is made")
    parser.add_argument("--edge", metavar="PYTHON", help="of an environment without torch (made)")
    parser.add_argument("--peers", type=Path, default=Path("."), metavar="DIR", help="where .venv-optimum lies")
    parser.add_argument("--data", type=Path, metavar="DIR", help="pictures with captions (made)")
    parser.add_argument("--all", action="store_true", help="what cannot be checked here fails too")
    given = parser.parse_args(argv)
    names = [name for name in re.split(r"[, ]+", given.only) if name]
    for name in names:
        if name not in SENTINELS:
            raise ConfigError(unknown("sentinel", name, SENTINELS))
    figures, cpus, here = figures_of(given.root), processors(given.root), str(environment()["cpu"])
    for claim in CLAIMS:
        claim.bound(figures)  # a claim whose figure is gone is told before anything is measured
    given.work.mkdir(parents=True, exist_ok=True)
    kit = Kit(given.work, given.peers, given.edge, given.data)
    lines: list[Verdict] = []
    for name in names:
        ran = run(kit, [name], lambda text: print(text, file=sys.stderr, flush=True))
        made = judged(ran, figures, cpus, here)
        for line in made:
            print(f"{line.status:12}  {line.text}", flush=True)
        lines += made
    bad = {"contradicted", "not checked"} if given.all else {"contradicted"}
    return int(any(line.status in bad for line in lines))
