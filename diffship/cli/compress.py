"""compress: make a model smaller by passes, and write it as a diffusers folder that every exporter takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from diffship.cli.export import made_parents
from diffship.cli.flags import existing_file, names, plain_value, setting
from diffship.cli.output import Result, table
from diffship.cli.progress import Stages
from diffship.core.errors import ConfigError
from diffship.core.registry import PASSES, load
from diffship.core.strict import load as load_options

EXAMPLES = """examples:
  diffship compress emoji --pass layout --set name=bk-tiny -o out/emoji-tiny
  diffship compress arch:sdxl --pass layout --set name=koala-700m --dry-run
  diffship export out/emoji-tiny --to onnx -o out/emoji-tiny-onnx
"""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a diffusers folder, a hub id, emoji, or arch:NAME")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="where the diffusers folder goes")
    parser.add_argument("--pass", dest="passes", choices=tuple(PASSES), action="append", default=[], help="what to do")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", type=setting, action="append", default=[], help="option of --pass"
    )
    parser.add_argument(
        "--recipe", metavar="FILE", type=Path, help="passes in a TOML file, and the source if it has one"
    )
    parser.add_argument("--base", metavar="SOURCE", help="supplies the parts that SOURCE lacks")
    parser.add_argument("--revision", metavar="COMMIT", help="revision of a hub id; the resolved commit is recorded")
    parser.add_argument(
        "--precision", choices=tuple(DTYPES), help="of the weights that are written (default: as they are)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and write nothing")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Options of a pass come as --set KEY=VALUE."""


def run(options: argparse.Namespace) -> Result:
    from diffship.compress import compress
    from diffship.core.job import Job

    if options.output is None and not options.dry_run:
        raise ConfigError("no folder for the model is given; name one with -o DIR, or ask with --dry-run")
    source, base, passes = _asked(options)
    out = None if options.dry_run else options.output
    with nullcontext() if out is None else made_parents(out), Stages(options.quiet) as stages:
        pipeline = compress(
            source,
            passes,
            out,
            base=base,
            revision=options.revision,
            precision=DTYPES.get(options.precision),
            job=Job(progress=stages),
        )
    return _described(pipeline, out)


def _asked(options: argparse.Namespace) -> tuple[str, str | None, list[Any]]:
    """Source, base and passes, from a recipe or from flags."""
    if options.recipe is None:
        return _source(options.source), options.base, _flagged(options)
    from diffship.core.recipe import read_recipe

    if options.passes or options.set:
        raise ConfigError("--recipe has the passes; --pass and --set do not go with it")
    recipe = read_recipe(existing_file(options.recipe, "--recipe"))
    return _source(options.source or recipe.source), options.base or recipe.base, [made for _, made in recipe.passes]


def _source(given: str | None) -> str:
    if not given:
        raise ConfigError("no source is given; legal: a diffusers folder, a hub id, emoji, arch:NAME")
    return given


def _flagged(options: argparse.Namespace) -> list[Any]:
    if len(options.passes) > 1:
        raise ConfigError("one --pass at a time; several go in a recipe: --recipe FILE")
    return [_made(name, dict(options.set)) for name in options.passes]


def _made(name: str, values: dict[str, Any]) -> Any:
    """The pass `name`; where a field takes several values, `a,b` on the command line is a list."""
    cls = load(PASSES, name, "pass")
    hints = get_type_hints(cls)
    listed = {key for key in values if get_origin(hints.get(key)) is tuple}
    for key in listed:
        values[key] = [plain_value(word) for word in names(str(values[key]))]
    return load_options(cls, values, f"pass {name}")


def _described(pipeline: Any, out: Path | None) -> Result:
    from diffship.models.cost import cost

    size = pipeline.family.default_size // pipeline.family.vae_factor
    found = cost(pipeline.components["unet"], {"height": size, "width": size})
    unet = {
        "parameters": found.params,
        "conv_linear_macs": found.conv_linear_macs,
        "attention_macs": found.attention_macs,
    }
    document = {"output": None if out is None else str(out), "unet": unet, "history": list(pipeline.history)}
    head = ("part", "parameters", "conv+linear GMAC", "attention GMAC")
    row = ("unet", f"{found.params:,}", f"{found.conv_linear_macs / 1e9:.1f}", f"{found.attention_macs / 1e9:.1f}")
    place = "nothing is written (--dry-run)" if out is None else f"diffusers folder in {out}"
    return Result(document, f"{table(head, [row])}\n{place}")
