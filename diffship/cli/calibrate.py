"""calibrate: draw pictures as the model is deployed, and note the ranges of what goes into every layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.cli.compress import work_folder
from diffship.cli.export import made_parents
from diffship.cli.flags import names
from diffship.cli.output import Result, figure, size_text, table
from diffship.cli.progress import Stages, warn_of
from diffship.core.errors import ConfigError

if TYPE_CHECKING:
    from diffship.calibration.observed import Observed
    from diffship.calibration.sensitivity import Sensitivity
    from diffship.calibration.stored import Calibration

SAMPLES, BATCH = 64, 4
_SHOWN = 10
EXAMPLES = """examples:
  diffship calibrate emoji --samples 64 --steps 25 -o out/emoji-ranges
  diffship calibrate path/to/diffusers-folder --prompts prompts.txt --samples 128 -o out/ranges
  diffship export emoji --to onnx --parts unet --precision int8 --calibration out/emoji-ranges -o out/emoji-int8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a diffusers folder, a hub id, emoji, or arch:NAME")
    parser.add_argument("-o", "--output", metavar="CAL", type=Path, required=True, help="folder of the ranges")
    parser.add_argument(
        "--prompts", dest="file", metavar="FILE", type=Path, help="one a line (default: a built-in set of 297)"
    )
    parser.add_argument("--samples", metavar="N", type=int, default=SAMPLES, help=f"pictures (default: {SAMPLES})")
    parser.add_argument("--steps", metavar="S", type=int, help="as it will be deployed (default: the model's)")
    parser.add_argument("--guidance", metavar="X", type=float, help="as it will be deployed (default: the model's)")
    parser.add_argument("--size", metavar="N", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--batch", metavar="N", type=int, default=BATCH, help=f"pictures a call (default: {BATCH})")
    parser.add_argument("--parts", metavar="A,B", type=names, default=(), help="default: the denoiser")
    parser.add_argument(
        "--sensitivity", action="store_true", help="measure what the output loses by each layer of the denoiser too"
    )
    parser.add_argument("--base", metavar="SOURCE", help="supplies the parts that SOURCE lacks")
    parser.add_argument("--revision", metavar="COMMIT", help="revision of a hub id")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keeps what is measured (default: CAL.work)")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading torch."""


def run(options: argparse.Namespace) -> Result:
    from diffship.calibration.capture import Capture, calibrate
    from diffship.calibration.prompts import chosen
    from diffship.calibration.sensitivity import measure, write_sensitivity
    from diffship.calibration.stored import calibration_digest, write_calibration
    from diffship.core.job import Job
    from diffship.core.limits import check_range
    from diffship.models.sources.opening import open_source

    check_range("samples", options.samples, 1, 4096)
    check_range("batch", options.batch, 1, 64)
    if options.output.exists():
        raise ConfigError(f"-o {options.output} exists already; choose another name, or remove it")
    prompts = chosen(options.file, options.samples)
    fields = ("steps", "guidance", "size", "seed", "batch", "parts")
    asked = Capture(prompts, **{name: getattr(options, name) for name in fields})
    with made_parents(options.output), Stages(options.quiet) as stages:
        pipeline = open_source(options.source, base=options.base, revision=options.revision)
        job = Job(options.cache or work_folder(options.output), progress=stages)
        found = calibrate(pipeline, asked, job)
        table = measure(pipeline, asked, found, job) if options.sensitivity else None
        write_calibration(found, options.output)
        if table is not None:
            write_sensitivity(table, options.output)
    warn_of(pipeline.source)
    return _described(found, table, options.output, calibration_digest(options.output))


def _described(found: Calibration, measured: Sensitivity | None, folder: Path, digest: str) -> Result:
    size = sum(file.stat().st_size for file in folder.iterdir())
    parts = {name: [_layer(layer, one) for layer, one in part.layers.items()] for name, part in found.parts.items()}
    drawn = found.drawn
    document = {
        "output": str(folder),
        "digest": digest,
        "bytes": size,
        "samples": len(drawn.prompts),
        "steps": drawn.steps,
        "parts": parts,
        "sensitivity": None if measured is None else measured.errors,
    }
    named = [(f"{name} {one['layer']}", one) for name, layers in parts.items() for one in layers]
    widest = sorted(named, key=lambda row: row[1]["growth"], reverse=True)[:_SHOWN]
    head = ("layer", "least", "largest", "widest step / median")
    rows = [(name, *(figure(one[key]) for key in ("low", "high", "growth"))) for name, one in widest]
    told = f"{len(drawn.prompts)} pictures of {drawn.steps} steps, {len(named)} layers"
    costs = "" if measured is None else f"{_costs(measured)}\n"
    return Result(document, f"{table(head, rows)}\n{costs}{told}; {size_text(size)} in {folder}")


def _costs(measured: Sensitivity) -> str:
    """The layers that cost most, in each precision."""
    rows = [
        (precision, layer, figure(psnr, ".1f"))
        for precision in next(iter(measured.errors.values()))
        for layer, psnr in measured.worst(precision, _SHOWN // 2)
    ]
    return table(("alone in", "costs most", "PSNR dB"), rows)


def _layer(name: str, one: Observed) -> dict[str, Any]:
    return {"layer": name, "low": float(one.low.min()), "high": float(one.high.max()), "growth": one.growth}
