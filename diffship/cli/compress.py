"""compress: make a model smaller by passes, and write it as a diffusers folder that every exporter takes."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from diffship.cli.export import made_parents
from diffship.cli.flags import SOURCES, add_source, existing_file, load_fields, names, worded
from diffship.cli.output import Result, table
from diffship.cli.progress import Stages, note, warn_of
from diffship.core.errors import ConfigError
from diffship.core.load_options import LoadOptions
from diffship.core.precision import FLOATS, precision_of
from diffship.core.registry import PASSES, load
from diffship.core.strict import load as load_options
from diffship.core.strict import plain_value

if TYPE_CHECKING:
    from diffship.compression.estimate import Estimate, Step
    from diffship.models.walks.cost import Cost

EXAMPLES = """examples:
  diffship compress emoji --pass layout --set name=bk-tiny -o out/emoji-tiny
  diffship compress arch:sdxl --pass layout --set name=koala-700m --dry-run
  diffship compress --recipe recipes/emoji-small.toml --set distill.data=data/emoji -o out/emoji-small
  diffship export out/emoji-tiny --to onnx -o out/emoji-tiny-onnx
"""
STOPPED = "the same command goes on from its last checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help=SOURCES,
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="where the diffusers folder goes")
    parser.add_argument(
        "--pass",
        dest="passes",
        choices=tuple(PASSES),
        action="append",
        default=[],
        help="what to do; --pass NAME --help lists the options of one",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=worded,
        action="append",
        default=[],
        help="option of --pass; with a recipe PASS.KEY=VALUE, which wins over the recipe's own",
    )
    parser.add_argument(
        "--recipe", metavar="FILE", type=Path, help="passes in a TOML file, and the source if it has one"
    )
    add_source(parser)
    parser.add_argument(
        "--precision", choices=tuple(FLOATS), help="of the weights that are written (default: as they are)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="keeps checkpoints and finished passes (default: OUTPUT.work)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and write nothing")
    parser.add_argument("--no-timing", action="store_true", help="with --dry-run: no hours, and nothing is computed")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Options of a pass come as --set KEY=VALUE; help lists those of the passes that are named."""
    if "-h" in words or "--help" in words:
        for name in dict.fromkeys(word.removeprefix("--pass=") for word in words):
            if name in PASSES:
                from diffship.cli.pass_help import options_text

                parser.epilog = f"{parser.epilog}\n{options_text(name, load(PASSES, name, 'pass'))}"


def run(options: argparse.Namespace) -> Result:
    if options.dry_run:
        return _foreseen(options)
    if options.output is None:
        raise ConfigError("no folder for the model is given; name one with -o DIR, or ask with --dry-run")
    if options.no_timing:
        raise ConfigError("--no-timing goes with --dry-run")
    from diffship.compress import compress
    from diffship.core.distributed import first_process
    from diffship.core.job import Job
    from diffship.models.parts.component import unused
    from diffship.training.loop import leave

    source, base, passes = _asked(options)
    with made_parents(options.output), Stages(options.quiet or not first_process()) as stages:
        pipeline = compress(
            source,
            passes,
            options.output,
            base=base,
            revision=options.revision,
            loading=LoadOptions(**load_fields(options)),
            precision=_stored(options),
            job=Job(options.cache or work_folder(options.output), progress=stages),
        )
    leave()
    warn_of(pipeline.source)
    for text in unused(pipeline.components.values()):
        note(f"warning: {text}")
    return _described(pipeline, options.output)


def _stored(options: argparse.Namespace) -> str | None:
    """Dtype of the weights that are written; None for as they are."""
    return precision_of(options.precision).weights if options.precision else None


def work_folder(out: Path) -> Path:
    """Where a compression keeps what it can go on from: beside its result, so that the same command finds it."""
    return out.parent / f"{out.name}.work"


def _foreseen(options: argparse.Namespace) -> Result:
    from diffship.compress import foresee

    source, base, passes = _asked(options)
    precision, timing = _stored(options), not options.no_timing
    found = foresee(
        source,
        passes,
        base=base,
        revision=options.revision,
        loading=LoadOptions(**load_fields(options)),
        precision=precision,
        timing=timing,
    )
    last = found.steps[-1]
    result = _described(found.pipeline, None, last.after if last.part == found.pipeline.denoiser.name else None)
    plan = {"passes": [_step(step) for step in found.steps], "timed": found.timed}
    return Result({**result.document, "plan": plan}, f"{_plan_text(found)}\nnothing is written (--dry-run)")


def _asked(options: argparse.Namespace) -> tuple[str, str | None, list[Any]]:
    """Source, base and passes, from a recipe or from flags."""
    if options.recipe is None:
        return _source(options.source), options.base, _flagged(options)
    from diffship.core.recipe import read_recipe

    if options.passes:
        raise ConfigError("--recipe has the passes; --pass does not go with it")
    recipe = read_recipe(existing_file(options.recipe, "--recipe"), changes=_changes(options.set))
    return _source(options.source or recipe.source), options.base or recipe.base, [made for _, made in recipe.passes]


def _source(given: str | None) -> str:
    if not given:
        raise ConfigError("no source is given; legal: a diffusers folder, a hub id, emoji, arch:NAME")
    return given


def _flagged(options: argparse.Namespace) -> list[Any]:
    if len(options.passes) > 1:
        raise ConfigError("one --pass at a time; several go in a recipe: --recipe FILE")
    return [_made(name, dict(options.set)) for name in options.passes]


def _made(name: str, values: dict[str, str]) -> Any:
    """The pass `name` with the values of a command line."""
    cls = load(PASSES, name, "pass")
    return load_options(cls, {key: fitting(cls, key, value) for key, value in values.items()}, f"pass {name}")


def _changes(settings: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """{pass: {option: value}} of `PASS.KEY=VALUE`."""
    found: dict[str, dict[str, Any]] = {}
    for words, value in settings:
        name, dot, key = words.partition(".")
        if not dot:
            raise ConfigError(f"--set {words}: with a recipe it is PASS.KEY=VALUE, such as distill.steps=100")
        found.setdefault(name, {})[key] = fitting(load(PASSES, name, "pass"), key, value)
    return found


def fitting(cls: type[Any], key: str, value: str) -> Any:
    """What the words after `=` are to a field: text as it is (`data=2024`), `a,b` or TOML's `["a,b"]` a list."""
    kind = get_type_hints(cls).get(key)
    if get_origin(kind) is not tuple:
        return value if kind in (str, str | None) else plain_value(value)
    with suppress(tomllib.TOMLDecodeError):
        if value.startswith("["):
            return tomllib.loads(f"list = {value}")["list"]
    return [word if str in get_args(kind) else plain_value(word) for word in names(value)]


def _described(pipeline: Any, out: Path | None, known: Cost | None = None) -> Result:
    from diffship.compression.estimate import sized_cost

    found = known or sized_cost(pipeline, pipeline.denoiser)
    part = pipeline.denoiser.name
    document = {"output": None if out is None else str(out), part: _figures(found), "history": list(pipeline.history)}
    head = ("part", "parameters", "conv+linear GMAC", "attention GMAC", "MB")
    return Result(document, f"{table(head, [(part, *_cells(found))])}\ndiffusers folder in {out}")


def _figures(found: Cost) -> dict[str, int]:
    return {
        "parameters": found.params,
        "conv_linear_macs": found.conv_linear_macs,
        "attention_macs": found.attention_macs,
        "bytes": found.bytes,
    }


def _cells(found: Cost | None) -> tuple[str, ...]:
    if found is None:
        return ("-",) * 4
    macs = (found.conv_linear_macs, found.attention_macs)
    return (f"{found.params:,}", *(f"{value / 1e9:.2f}" for value in macs), f"{found.bytes / 1e6:.1f}")


def _step(step: Step) -> dict[str, Any]:
    return {
        "pass": step.kind,
        "part": step.part,
        "before": None if step.before is None else _figures(step.before),
        "after": None if step.after is None else _figures(step.after),
        "hours": None if step.seconds is None else step.seconds / 3600,
        "note": step.note,
        "absent": step.absent,
    }


def _plan_text(found: Estimate) -> str:
    head = ("pass", "parameters before", "after", "conv+linear GMAC", "attention GMAC", "MB", "hours")
    rows = []
    for step in found.steps:
        before = "-" if step.before is None else f"{step.before.params:,}"
        hours = "-" if step.seconds is None else f"{step.seconds / 3600:.2f}"
        kind = step.kind if step.part == found.pipeline.denoiser.name else f"{step.kind} ({step.part})"
        rows.append((kind, before, *_cells(step.after), hours))
    notes = [f"{step.kind}: a target: {step.note}" for step in found.steps if step.note]
    notes += [f"{step.kind}: no hours: {step.absent}" for step in found.steps if step.absent]
    return "\n".join([table(head, rows), *notes, f"hours: {found.timed}"])
