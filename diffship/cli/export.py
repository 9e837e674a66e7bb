"""export: compile a model for one target and prove that every part still computes the same thing."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffship.cli.flags import SOURCES, add_fields, add_source, flag_of, given_fields, load_fields, names, worded
from diffship.cli.fleet import describe_report, export_recipe
from diffship.cli.output import Result, figure, size_text, table
from diffship.cli.placement import CUTS
from diffship.cli.progress import Stages, note, warn_of
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.load_options import LoadOptions
from diffship.core.registry import EXPORTERS, load
from diffship.core.staging import clients_text

EXAMPLES = """examples:
  diffship export emoji --to onnx -o out/emoji
  diffship export path/to/diffusers-folder --to onnx -o out/model
  diffship export path/to/model.safetensors --to onnx -o out/model
  diffship export path/to/diffusers-folder --to onnx --precision fp16 -o out/model-for-gpus
  diffship export arch:sd15 --to onnx --parts unet --no-verify -o out/sd15-unet
  diffship export arch:tiny-sd --to onnx --stages 2 -o out/tiny-2
  diffship export --recipe recipes/tiny-fleet.toml -o out/tiny-fleet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="?", help=SOURCES)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="where the bundle goes")
    parser.add_argument("--to", choices=tuple(EXPORTERS), help="target (default: onnx)")
    parser.add_argument(
        "--recipe", metavar="FILE", type=Path, help="every [[target]] of a TOML file, each into DIR/NAME"
    )
    add_source(parser)
    parser.add_argument("--parts", metavar="A,B", type=names, help="only these parts")
    parser.add_argument(
        "--controlnet", metavar="NAME=SOURCE", type=worded, action="append", default=[],
        help="a ControlNet (folder or hub id) that run --control NAME draws with; repeat for several",
    )  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="skip the proof; the bundle says 'unproven'")
    parser.add_argument(
        "--trajectory", metavar="N", type=int, help="steps that lie in the bundle for verify to draw again"
    )
    parser.add_argument(
        "--clip-skip", metavar="N", type=int, help="let run skip up to N layers of CLIP (SDXL and SD3 always can)"
    )
    parser.add_argument(
        "--embedding",
        metavar="[WORD=]FILE",
        action="append",
        default=[],
        help="a textual inversion; repeat",
    )
    parser.add_argument("--stages", metavar="N", type=int, help="cut the denoiser for N devices, a part for each stage")
    parser.add_argument("--cut", choices=CUTS, help="where (default: AsyncDiff's if there is one, else speed)")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keep graphs here: the next export only adds weights")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the flags of the exporter that `--to` names: the fields of its class."""
    target = _target(words)
    if target in EXPORTERS:
        add_fields(parser, load(EXPORTERS, target, "target"), f"target {target}")
        _refuse_others(parser, words, target)


def _refuse_others(parser: argparse.ArgumentParser, words: Sequence[str], target: str) -> None:
    """Raises ConfigError for a flag that only another target has: a near name of this one would mislead."""
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    foreign = [flag for flag in given if flag not in parser._option_string_actions]
    for name in EXPORTERS if foreign else ():  # --help and the usual call load their own target alone
        flags = {flag_of(field) for field in dataclasses.fields(load(EXPORTERS, name, "target"))}
        for flag in foreign:
            if flag in flags:
                raise ConfigError(
                    f"{flag} is of --to {name}, and the target is {target}; see diffship export --to {name} --help"
                )


def _target(words: Sequence[str]) -> str:
    for first, second in pairwise([*words, ""]):
        if first == "--to":
            return second
        if first.startswith("--to="):
            return first[5:]
    return "onnx"


def run(options: argparse.Namespace) -> Result:
    from diffship.core.job import Job
    from diffship.export import export

    if options.parts is not None and not options.parts:
        raise ConfigError("--parts names no part; give for example --parts unet,vae_decoder")
    if len(names := [name for name, _ in options.controlnet]) != len(set(names)):
        raise ConfigError(f"--controlnet gives one name twice: {', '.join(names)}")
    if options.recipe is not None:
        return _run_fleet(options)
    if not options.source:
        raise ConfigError(f"no source is given; legal: {SOURCES}; or name a recipe with --recipe FILE")
    to = options.to or "onnx"
    chosen = given_fields(options, load(EXPORTERS, to, "target"))
    with made_parents(options.output), Stages(options.quiet) as stages:
        bundle = export(
            options.source,
            to=to,
            out=options.output,
            base=options.base,
            revision=options.revision,
            loading=LoadOptions(**load_fields(options)),
            parts=options.parts,
            verify=not options.no_verify,
            trajectory=options.trajectory,
            stages=options.stages,
            cut=options.cut,
            overwrite=options.overwrite,
            clip_skip=options.clip_skip,
            embeddings=options.embedding,
            controlnets=dict(options.controlnet) or None,
            job=Job(options.cache, progress=stages),
            **chosen,
        )
    _warn_of_all(bundle.manifest)
    return describe(bundle.path, bundle.manifest)


def _run_fleet(options: argparse.Namespace) -> Result:
    from diffship.core.job import Job

    with made_parents(options.output), Stages(options.quiet) as stages:
        report = export_recipe(options, Job(options.cache, progress=stages))
    made = next((one.bundle for one in report.outcomes if one.bundle is not None), None)
    if made is not None:  # what a source lacks, all its bundles lack
        _warn_of_all(made.manifest)
    for one in report.outcomes:
        if one.state == "skipped":
            note(f"warning: {one.target.name} is left out, as it is optional: {one.fault}")
    return describe_report(report)


def _warn_of_all(manifest: Any) -> None:
    warn_of(manifest.source)
    if manifest.staging is not None:
        note(f"note: {clients_text(manifest.staging)}")
    _warn_of_sampler(manifest.sampler)
    _warn_of_unused(manifest.parts)
    _warn_of_loose(manifest.parts)


def _warn_of_sampler(scheduler: Any) -> None:
    from diffship.sampling.samplers import make_sampler

    try:
        make_sampler(scheduler)
    except DiffshipError as fault:
        note(f"warning: it draws with --sampler NAME only: {fault}")


def _warn_of_unused(parts: Iterable[Any]) -> None:
    from diffship.models.parts.component import unused_text

    for part in parts:
        unused = part.extra.get("unused_tensors")
        if unused:
            note(f"warning: {unused_text(part.name, unused['count'], unused['first'])}")


def _warn_of_loose(parts: Iterable[Any]) -> None:
    """Of float32 parts whose tolerance was measured, because they enlarge rounding errors: it is looser than usual."""
    for part in parts:
        method = {} if part.golden is None else part.golden.method
        if "measured" in method and "psnr_db" in method:
            least = f"{part.golden.tolerance.psnr_db:g} dB, and not the usual {method['psnr_db']:g}"
            note(f"warning: {part.name} enlarges rounding errors: as a whole it is held to {least}")


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """The folders above `path`, made if they are missing, and removed again if the block fails."""
    made = []
    for folder in reversed(path.absolute().parents):
        if not folder.exists():
            folder.mkdir()
            made.append(folder)
    try:
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise


def describe(folder: Path, manifest: Any) -> Result:
    parts = [_part(part, manifest.files) for part in manifest.parts]
    document = {"bundle": str(folder), "target": manifest.target, "parts": parts}
    head = ("part", "precision", "proof", "max abs", "PSNR dB", "bytes", "export s", "proof s")
    rows = [
        (
            part["name"],
            part["precision"],
            part["proof"] if part["graph"] is None else f"graph {part['graph']}, engine {part['proof']}",
            figure(part["max_abs"]),
            figure(part["psnr_db"], ".1f"),
            size_text(part["bytes"]),
            figure(part["export_seconds"], ".1f"),
            figure(part["proof_seconds"], ".1f"),
        )
        for part in parts
    ]
    return Result(document, f"{table(head, rows)}\n{manifest.target} bundle in {folder}")


def _part(part: Any, files: Any) -> dict[str, Any]:
    proof = {**part.proof.get("graph", {}), **part.proof}  # an engine that cannot run here has its graph's figures
    return {
        "name": part.name,
        "precision": part.precision,
        "proof": proof["status"],
        "graph": part.proof.get("graph", {}).get("status"),
        "max_abs": proof.get("max_abs"),
        "psnr_db": proof.get("psnr_db"),
        "export_seconds": proof.get("export_seconds"),
        "proof_seconds": proof.get("seconds"),
        "bytes": sum(files[name].size for name in part.files if name in files),
    }
