"""What it takes to build TensorRT engines without a GPU: seconds, memory and bytes of each part.

    python -m diffship.benchmarks engine-build [--only arch:sd15]

Random weights are as good as any here: what a build costs depends on shapes. DIR takes up to 20 GB and is kept empty.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.workbench import add_work
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.manifest import Part
from diffship.core.quiet import timing
from diffship.core.registry import kind
from diffship.core.strict import unknown
from diffship.export import export

SUITE = "engine-build"
SM = (89, 120)


@dataclass(frozen=True)
class Case:
    """A source and the parts whose engines are built; none means all."""

    source: str
    parts: tuple[str, ...] = ()


_XL = kind("sdxl")
CASES = (
    Case("emoji"),
    Case("arch:sd15"),
    Case("arch:koala-700m", (_XL.denoiser,)),
    Case("arch:sdxl", (_XL.text_parts[-1], _XL.denoiser, _XL.decoder)),
)


def rows_of(case: Case, work: Path, sm: Sequence[int], precision: str) -> list[Row]:
    """Build the engines of one case, one after the other; nothing of them is kept."""
    folder = work / "engines"
    shutil.rmtree(folder, ignore_errors=True)
    options: dict[str, Any] = {"sm": tuple(sm), "precision": precision, "parts": case.parts or None, "verify": False}
    try:
        bundle = export(case.source, to="tensorrt", out=folder, job=Job(), **options)
        return [row for part in bundle.manifest.parts for row in _part_rows(case.source, part, sm)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _part_rows(source: str, part: Part, sm: Sequence[int]) -> list[Row]:
    made = part.extra["build"]
    conditions = {"model": source, "part": part.name, "precision": part.precision, "sm": list(sm)}
    conditions |= {"flavour": "rtx", "library": made["version"], "parameters": part.extra["parameters"]}
    figures = (
        ("build_seconds", made["seconds"], "s", "latency"),
        ("build_peak_bytes", made["peak_bytes"], "bytes", "memory"),
        ("plan_bytes", made["bytes"], "bytes", "size"),
        ("weight_bytes", part.extra["data_bytes"], "bytes", "size"),
    )
    subject = f"{source} / {part.name}, {part.precision}"
    return [
        Row(SUITE, subject, metric, float(value), unit, kind=kind, conditions=conditions)
        for metric, value, unit, kind in figures
    ]


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these sources. Raises ConfigError for a source that has none."""
    known = {case.source: case for case in CASES}
    for name in names:
        if name not in known:
            raise ConfigError(unknown("source", name, known))
    return [case for case in CASES if not names or case.source in names]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="SOURCE")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16")
    add_work(parser)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for case in chosen(arguments.only):
        with timing(SUITE):
            found = rows_of(case, arguments.work, SM, arguments.precision)
        for row in found:
            print(f"{row.subject:44} {row.metric:18} {row.value:.6g} {row.unit}", flush=True)
        rows += found
    if arguments.out:
        command = f"python -m diffship.benchmarks engine-build --precision {arguments.precision}"
        write_result(arguments.out, SUITE, command, rows, {"title": "RTX engines built without a GPU", "sm": list(SM)})


if __name__ == "__main__":
    enter(main)
