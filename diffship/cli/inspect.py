"""inspect: list the parts of a bundle or source, their tensors, sizes, precision, proof and licence."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffship.cli import placement
from diffship.cli.flags import add_source, load_fields, size
from diffship.cli.fleet import inspect_fleet
from diffship.cli.output import Result, size_text, table
from diffship.core.errors import ConfigError
from diffship.core.load_options import LoadOptions
from diffship.core.staging import clients_text
from diffship.core.strict import plain

EXAMPLES = """examples:
  diffship inspect out/emoji
  diffship inspect arch:sd15 --size 512
  diffship inspect emoji --json
  diffship inspect out/emoji-coreml --lint swift
  diffship inspect arch:sdxl --placement --stages 2
  diffship inspect arch:sd15 --placement --stages 3 --cut speed --stride 2 --warm-up 9
  diffship inspect out/tiny-2 --placement --warm-up 3
  diffship inspect out/tiny-fleet
"""


_CLIENTS = "swift, mochi or diffusers-app"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="DIR|SOURCE",
        help="a bundle, a folder of bundles, a diffusers folder or .safetensors file, a hub id, emoji or arch:NAME",
    )
    add_source(parser)
    parser.add_argument("--size", metavar="N|WxH", type=size, help="count the cost at this size (sources only)")
    parser.add_argument("--lint", metavar="CLIENT", help=f"what a client makes of a Core ML folder: {_CLIENTS}")
    placement.add_arguments(parser)


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known."""


def run(options: argparse.Namespace) -> Result:
    placement.check(options)
    if options.lint:
        if options.size or options.base or options.revision or options.placement:
            raise ConfigError("--size, --base, --revision and --placement are for sources; --lint is for folders")
        return lint_folder(Path(options.what), options.lint)
    from diffship.fleet.overview import bundles_in

    if is_bundle(options.what):
        if any([options.size, options.base, options.revision, *load_fields(options).values()]):
            flags = "--size, --base, --revision, --vae, --ema and --prediction"
            raise ConfigError(f"{flags} are for sources; this is a bundle")
        return placement.inspect_staged(options) if options.placement else inspect_bundle(Path(options.what))
    if bundles_in(options.what):
        if any([options.size, options.base, options.revision, options.placement, *load_fields(options).values()]):
            raise ConfigError(f"{options.what} is a folder of bundles, which takes no flags; name one of them")
        return inspect_fleet(Path(options.what))
    from diffship.models.sources.opening import open_source

    loading = LoadOptions(**load_fields(options))
    pipeline = open_source(options.what, base=options.base, revision=options.revision, loading=loading)
    return placement.inspect_placement(pipeline, options) if options.placement else inspect_source(pipeline, options)


def is_bundle(text: str) -> bool:
    return (Path(text) / "diffship.json").exists()


def inspect_bundle(folder: Path) -> Result:
    """From the manifest alone: nothing is hashed and no engine is opened."""
    from diffship.core.bundle import Bundle
    from diffship.runtimes.proof.verify import weakness

    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    weak = {part.name: weakness(bundle, part) for part in manifest.parts}
    parts = [_bundle_part(part, manifest.files) for part in manifest.parts]
    document = {
        "kind": "bundle",
        "name": str(folder),
        "target": manifest.target,
        "family": manifest.family.to_json(),
        "parts": parts,
        "sampler": manifest.sampler.get("_class_name"),
        "source": manifest.source,
        "licence": manifest.licence,
        "tools": manifest.tools,
        "staging": None if manifest.staging is None else plain(manifest.staging),
        "bytes": sum(record.size for record in manifest.files.values()),
    }
    head = ("part", "precision", "proof", "parameters", "bytes", "source digest")
    keys = ("name", "precision", "status", "parameters", "bytes", "source_digest")
    rows = [[_short(key, part[key]) for key in keys] for part in parts]
    facts = [
        f"{manifest.target} bundle of {_told(manifest.source)} ({manifest.family.name})",
        f"scheduler {document['sampler']}, {size_text(sum(r.size for r in manifest.files.values()))} in "
        f"{len(manifest.files)} files",
        *([] if manifest.staging is None else [clients_text(manifest.staging)]),
        *manifest.source.get("notes", ()),
        *(f"{', '.join(n for n in weak if weak[n] == text)}: {text}" for text in dict.fromkeys(weak.values()) if text),
    ]
    return Result(document, _join(facts, table(head, rows), parts, manifest.licence))


def lint_folder(folder: Path, client: str) -> Result:
    """What a client of Core ML refuses or leaves out in `folder`, a bundle or a Resources folder."""
    from diffship.targets.coreml.clients import lint

    findings = lint(folder, client)
    errors = sum(finding.level == "error" for finding in findings)
    document = {
        "kind": "lint",
        "name": str(folder),
        "client": client,
        "passed": not errors,
        "findings": [finding.to_json() for finding in findings],
    }
    lines = [f"{finding.level}: {finding.file}: {finding.text}" for finding in findings]
    verdict = f"{errors} errors" if errors else "no errors"
    return Result(document, "\n".join([*lines, f"{folder} for {client}: {verdict}"]), 1 if errors else 0)


def inspect_source(pipeline: Any, options: argparse.Namespace) -> Result:
    """Tensors are listed, not read: works on a source that memory cannot hold."""
    from diffship.models.walks.cost import cost

    family = pipeline.family
    width, height = options.size or family.default_sides
    family.check_size(width, height)
    sizes = {**family.kind.axis_sizes(family, width, height), "image_height": height, "image_width": width}
    parts = [_source_part(component, cost, sizes) for component in pipeline.components.values()]
    document = {
        "kind": "source",
        "name": options.what,
        "family": family.to_json(),
        "size": [width, height],
        "parts": parts,
        "sampler": pipeline.scheduler.get("_class_name"),
        "source": pipeline.source,
        "licence": pipeline.licence,
        "bytes": sum(part["bytes"] for part in parts),
    }
    head = ("part", "class", "parameters", "bytes", "conv+linear GMAC", "attention GMAC")
    keys = ("name", "class", "parameters", "bytes", "conv_linear_macs", "attention_macs")
    rows = [[_short(key, part[key]) for key in keys] for part in parts]
    facts = [f"source {options.what} ({family.name}), cost of one call at {width}x{height}"]
    facts += pipeline.source.get("notes", ())
    return Result(document, _join(facts, table(head, rows), parts, pipeline.licence))


def _told(source: Any) -> str:
    """`owner/name@commit`, or what there is of it."""
    revision = source.get("revision")
    return f"{source.get('id', 'an unknown source')}{f'@{revision}' if revision else ''}"


def _bundle_part(part: Any, files: Any) -> dict[str, Any]:
    return {
        "name": part.name,
        "files": list(part.files),
        "inputs": [spec.to_json() for spec in part.inputs],
        "outputs": [spec.to_json() for spec in part.outputs],
        "precision": part.precision,
        "parameters": part.extra.get("parameters"),
        "bytes": sum(files[name].size for name in part.files if name in files),
        "status": part.proof["status"],
        "proof": part.proof,
        "source_digest": part.source_digest,
    }


def _source_part(component: Any, cost: Any, sizes: dict[str, int]) -> dict[str, Any]:
    figures = cost(component, sizes)
    return {
        "name": component.name,
        "class": component.class_name,
        "inputs": [spec.to_json() for spec in component.inputs],
        "outputs": [spec.to_json() for spec in component.outputs],
        "parameters": figures.params,
        "bytes": component.weights.nbytes,
        "conv_linear_macs": figures.conv_linear_macs,
        "attention_macs": figures.attention_macs,
    }


def _short(key: str, value: Any) -> object:
    """A figure as the table shows it."""
    if key.endswith("_macs"):
        return f"{value / 1e9:.2f}"
    if key == "bytes":
        return size_text(value)
    return str(value)[:12] if key == "source_digest" else value


def _join(facts: list[str], listing: str, parts: list[dict[str, Any]], licence: dict[str, Any]) -> str:
    lines = [*facts, "", listing, ""]
    for part in parts:
        lines += [f"{part['name']}"]
        lines += [f"  in   {spec_text(spec)}" for spec in part["inputs"]]
        lines += [f"  out  {spec_text(spec)}" for spec in part["outputs"]]
    lines += ["", f"licence: {licence.get('name') or licence.get('id') or 'not stated by the source'}"]
    if licence.get("restrictions"):
        lines.append(f"restrictions: {licence['restrictions']}")
    return "\n".join(lines)


def spec_text(spec: dict[str, Any]) -> str:
    return f"{spec['name']}: {spec['dtype']} ({', '.join(map(str, spec['shape']))})"
