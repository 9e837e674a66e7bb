"""Fleets on the command line: `export --recipe`, and `inspect` of the folder that it fills."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.cli.flags import SOURCES, existing_file, flag_of, load_fields
from diffship.cli.output import Result, size_text, table
from diffship.cli.progress import note
from diffship.core.errors import ConfigError
from diffship.core.load_options import LoadOptions
from diffship.core.outcome import outcome
from diffship.core.registry import EXPORTERS, load
from diffship.core.strict import plain

if TYPE_CHECKING:
    from diffship.core.job import Job
    from diffship.fleet.build import FleetReport, Outcome
    from diffship.fleet.overview import FleetRow
    from diffship.fleet.recipe import Fleet


def export_recipe(options: argparse.Namespace, job: Job) -> FleetReport:
    """Every target of `--recipe`, from one source.

    Raises:
        ConfigError: a flag that belongs into the recipe, no source, or passes that `compress` is to run first.
    """
    from diffship.fleet.build import export_fleet
    from diffship.fleet.recipe import read_fleet

    _refuse_flags(options)
    fleet = read_fleet(existing_file(options.recipe, "--recipe"))
    return export_fleet(
        _source(options, fleet),
        fleet.targets,
        options.output,
        parts=options.parts,
        verify=not options.no_verify,
        trajectory=options.trajectory,
        base=options.base or fleet.base,
        revision=options.revision,
        loading=LoadOptions(**load_fields(options)),
        overwrite=options.overwrite,
        clip_skip=options.clip_skip,
        embeddings=options.embedding,
        controlnets=dict(options.controlnet) or None,
        job=job,
    )


def _refuse_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError for flags of one target: the recipe says them for each of its own."""
    import dataclasses

    fields = dataclasses.fields(load(EXPORTERS, options.to or "onnx", "target"))
    given = [flag_of(field) for field in fields if getattr(options, field.name, None) is not None]
    told = [*(["--to"] if options.to else []), *given]
    if told:
        raise ConfigError(f"--recipe says what each target is: write {', '.join(told)} as keys of its [[target]]")
    if options.stages is not None or options.cut is not None:
        raise ConfigError(
            "--stages and --cut do not go with --recipe: export a model in stages for one target at a time"
        )


def _source(options: argparse.Namespace, fleet: Fleet) -> str:
    if fleet.passes and not options.source:
        raise ConfigError(
            f"{options.recipe} has passes; run them first: diffship compress --recipe {options.recipe} -o MODEL, then "
            f"diffship export MODEL --recipe {options.recipe} -o {options.output}"
        )
    source = options.source or fleet.source
    if not source:
        raise ConfigError(f"no source is given, and {options.recipe} names none; legal: {SOURCES}")
    if fleet.passes:
        passes = f"diffship compress --recipe {options.recipe}"
        note(f"note: {source} is exported as it is; the passes of the recipe are run by: {passes}")
    return str(source)


def describe_report(report: FleetReport) -> Result:
    """A line for each target; the exit code is that of the first failure."""
    targets = [_told(one) for one in report.outcomes]
    document = {"fleet": str(report.folder), "source_digests": dict(report.digests), "targets": targets}
    head = ("name", "target", "outcome", "parts", "bytes", "proof")
    rows = [
        (one["name"], one["target"], one["outcome"], _count(one["parts"]), _size(one["bytes"]), one["proof"])
        for one in targets
    ]
    faults = [f"{one['name']} {one['outcome']}: {one['problem']['message']}" for one in targets if one["problem"]]
    failed = sum(one["outcome"] == "failed" for one in targets)
    last = f"fleet of {len(targets)} targets in {report.folder}"
    if all(one["outcome"] == "skipped" for one in targets):
        last = f"nothing was written: all targets are optional, and what they need is not installed ({report.folder})"
    if failed:
        last = f"{failed} of {len(targets)} targets failed, and the same command goes on with them: {report.folder}"
    return Result(document, "\n".join([table(head, rows), *faults, last]), report.exit_code)


def _told(one: Outcome) -> dict[str, Any]:
    from diffship.fleet.overview import FleetRow

    row = FleetRow(one.target.name, one.bundle.manifest if one.bundle else None)
    problem = None
    if one.fault is not None:
        kind, message, code = outcome(one.fault)
        problem = {"type": kind, "message": message, "exit_code": code if one.state == "failed" else 0}
    return {
        "name": one.target.name,
        "target": one.target.exporter.name,
        "options": plain(one.target.exporter),
        "optional": one.target.optional,
        "outcome": one.state,
        "bundle": str(one.bundle.path) if one.bundle else None,
        "parts": row.to_json()["parts"],
        "bytes": row.bytes,
        "proof": row.proof,
        "problem": problem,
    }


def inspect_fleet(folder: Path) -> Result:
    """A line for each bundle in the folder; exit code 1 if one does not open."""
    from diffship.fleet.overview import read_rows, repeated_bytes

    rows = read_rows(folder)
    same = all(row.manifest is not None and not row.odd for row in rows)
    total, again = sum(row.bytes for row in rows), repeated_bytes(rows)
    document = {
        "kind": "fleet",
        "name": str(folder),
        "bundles": [row.to_json() for row in rows],
        "same_source": same,
        "bytes": total,
        "repeated_bytes": again,
    }
    head = ("name", "target", "precision", "parts", "bytes", "proof", "source digest")
    lines = [table(head, map(_cells, rows)), *(f"{row.name}: {row.fault}" for row in rows if row.fault)]
    sizes = f"{size_text(total)}, of which {size_text(again)} are copies of files in another one"
    lines.append(f"fleet of {len(rows)} bundles in {folder}: {sizes}")
    return Result(document, "\n".join(lines), 1 if any(row.fault for row in rows) else 0)


def _cells(row: FleetRow) -> Sequence[object]:
    said: Mapping[str, Any] = row.to_json()
    digest = f"differs: {', '.join(row.odd)}" if row.odd else "equal"
    if row.manifest is None:
        return (row.name, "-", "-", "-", "-", "does not open", "-")
    parts = str(len(row.manifest.parts))
    return (row.name, said["target"], ", ".join(said["precisions"]), parts, size_text(row.bytes), row.proof, digest)


def _count(parts: Mapping[str, str]) -> str:
    return str(len(parts)) if parts else "-"


def _size(size: int) -> str:
    return size_text(size) if size else "-"
