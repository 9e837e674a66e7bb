"""compare: set two bundles or sources side by side: part by part, step by step, picture by picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.cli.flags import add_engine, add_request, engine_options, names, requests_of
from diffship.cli.output import Result, figure, table
from diffship.cli.places import add_overwrite, refuse_taken, require_file_place
from diffship.cli.progress import Stages
from diffship.core.errors import ConfigError
from diffship.core.registry import RUNNERS

if TYPE_CHECKING:
    from diffship.side_by_side import PartFigures, Side, StepFigures

EXAMPLES = """examples:
  diffship compare emoji out/emoji
  diffship compare out/emoji out/emoji --engine onnxruntime --engine-b openvino --no-steps
  diffship compare emoji out/emoji "red apple" "black cat" --steps 10 --grid out/compare.png
"""
PROMPTS = ("red apple",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="the reference: a bundle or a source")
    parser.add_argument("second", metavar="B", help="the candidate: a bundle or a source")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", default=[], help=f"default: {PROMPTS[0]!r}")
    parser.add_argument("--parts", metavar="A,B", type=names, help="only these parts")
    parser.add_argument("--no-steps", action="store_true", help="parts only: draw nothing")
    parser.add_argument("--psnr", metavar="DB", type=float, help="floor for every part, also where the weights differ")
    parser.add_argument("--grid", metavar="FILE", type=Path, help="write the pictures side by side")
    add_overwrite(parser, "pictures")
    engine = add_engine(parser)
    engine.add_argument("--engine-b", choices=tuple(RUNNERS), help="engine of B (default: that of A)")
    add_request(parser)


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading an engine."""


def run(options: argparse.Namespace) -> Result:
    from diffship import side_by_side
    from diffship.core.compare import picture_psnr

    _check(options)
    prompts = options.prompts or list(PROMPTS)
    requests = requests_of(options, prompts)
    settings = engine_options(options)
    with (
        Stages(options.quiet) as stages,
        side_by_side.open_side(options.first, options.engine, settings) as first,
        side_by_side.open_side(options.second, options.engine_b or options.engine, settings) as second,
    ):
        parts = []
        chosen = side_by_side.common_parts(first, second, options.parts)
        for done, part in enumerate(chosen):
            stages("parts", done, len(chosen))
            parts.append(side_by_side.compare_part(first, second, part, options.seed or 0, options.psnr))
        steps, pairs = ([], []) if options.no_steps else side_by_side.compare_steps(first, second, requests, stages)
    scores = [picture_psnr(*pair) for pair in pairs if pair[0].shape == pair[1].shape]
    if options.grid:
        from diffship.cli.drawing import write_grid

        labels = [f"{letter}: {prompt}" for prompt in prompts for letter in "AB"]
        write_grid(options.grid, [picture for pair in pairs for picture in pair], labels, 2 if len(pairs) == 1 else 4)
    return _result((first, second), parts, steps, prompts, scores, options.grid)


def _check(options: argparse.Namespace) -> None:
    if options.grid and options.no_steps:
        raise ConfigError("--grid needs pictures; leave --no-steps out")
    if options.grid:
        require_file_place(options.grid, "--grid")
        refuse_taken([("--grid", options.grid)], options.overwrite)
    if options.prompts and options.no_steps:
        raise ConfigError("--no-steps draws nothing; leave the prompts out")


def _result(
    sides: tuple[Side, Side],
    parts: list[PartFigures],
    steps: list[StepFigures],
    prompts: list[str],
    scores: list[float],
    grid: Path | None,
) -> Result:
    passed = all(part.passed for part in parts)
    document = {
        "a": sides[0].name,
        "b": sides[1].name,
        "parts": [
            {"name": p.name, "same_source": p.same_source, "judged": p.judged, "passed": p.passed, **_worst(p)}
            for p in parts
        ],
        "steps": [{"prompt": s.prompt, "step": s.step, "max_abs": s.max_abs, "psnr_db": s.psnr_db} for s in steps],
        "pictures": [{"prompt": p, "psnr_db": s} for p, s in zip(prompts, scores, strict=False)],
        "grid": None if grid is None else str(grid),
    }
    return Result(document, _text(sides, parts, steps, prompts, scores), 0 if passed else 1)


def _worst(part: PartFigures) -> dict[str, object]:
    worst = part.report.worst
    figures = {"output": worst.name, "max_abs": worst.max_abs, "psnr_db": worst.psnr_db, "cosine": worst.cosine}
    return {**figures, "floor_db": part.report.tolerance.psnr_db, "reason": worst.reason}


def _text(
    sides: tuple[Side, Side],
    parts: list[PartFigures],
    steps: list[StepFigures],
    prompts: list[str],
    scores: list[float],
) -> str:
    rows = [_row(part) for part in parts]
    head = ("part", "weights", "verdict", "output", "max abs", "PSNR dB", "cosine")
    lines = [f"A: {sides[0].name}", f"B: {sides[1].name}", "", table(head, rows)]
    if steps:
        walk = [(prompts[s.prompt], s.step, figure(s.max_abs), figure(s.psnr_db, ".1f")) for s in steps]
        lines += ["", table(("prompt", "step", "latents max abs", "PSNR dB"), walk)]
    for prompt, score in zip(prompts, scores, strict=False):
        lines.append(f"picture {prompt!r}: {'equal' if score == math.inf else f'PSNR {score:.1f} dB'}")
    return "\n".join(lines)


def _row(part: PartFigures) -> tuple[object, ...]:
    worst = part.report.worst
    verdict = ("same" if part.passed else "DIFFERENT") if part.judged else "not judged"
    weights = "same" if part.same_source else "different"
    figures = (figure(worst.max_abs), figure(worst.psnr_db, ".1f"), figure(worst.cosine, ".6f"))
    return (part.name, weights, verdict, worst.name, *figures)
