"""verify: hash every file of a bundle, then compute its golden vectors again on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.cli.flags import add_engine, engine_options, names
from diffship.cli.output import Result, size_text
from diffship.cli.progress import Stages
from diffship.core.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from diffship.core.bundle import Bundle
    from diffship.runtimes.proof.suspects import Look

EXAMPLES = """examples:
  diffship verify out/emoji
  diffship verify out/emoji --engine openvino --json
  diffship verify out/emoji-rtx --reduce --graphs out/emoji-fp16
  diffship verify out/emoji --polygraphy out/emoji-polygraphy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle")
    add_engine(parser)
    parser.add_argument("--parts", metavar="A,B", type=names, help="only these parts")
    parser.add_argument("--reduce", action="store_true", help="on a failure, name the first node that differs")
    parser.add_argument(
        "--graphs", metavar="DIR", type=Path, help="with --reduce: the --to onnx bundle that an engine was built from"
    )
    parser.add_argument(
        "--polygraphy", metavar="OUT", type=Path, help="write the golden vectors for Polygraphy; needs no engine"
    )
    parser.add_argument("--hashes-only", action="store_true", help="leave the golden vectors out; needs no engine")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading an engine."""


def run(options: argparse.Namespace) -> Result:
    if options.hashes_only:
        return _hashes(options)
    if options.polygraphy:
        return _polygraphy(options)
    from diffship.runtimes.proof.verify import verify

    if options.engine:
        _require_engine(options.engine)
    with Stages(options.quiet) as stages:
        report = verify(
            options.bundle,
            options.engine,
            parts=options.parts,
            look=_look(options),
            progress=stages,
            **engine_options(options),
        )
    return Result(report.to_json(), report.text(), 0 if report.passed else 1)


def _require_engine(name: str) -> None:
    """Raises MissingExtra if an engine that was asked for is not installed: that says nothing about the bundle."""
    from diffship.runtimes.engines.engine import engine_class

    engine = engine_class(name)
    probe = engine.probe()
    if not probe.available and not probe.version:
        raise MissingExtra(name, engine.extra)


def _look(options: argparse.Namespace) -> Look | None:
    if options.graphs and not options.reduce:
        raise ConfigError("--graphs is for --reduce: give both")
    if not options.reduce:
        return None
    if options.graphs:
        from diffship.reduce import through_graphs

        return through_graphs(options.graphs)
    from diffship.runtimes.proof.suspects import look_into

    return look_into


def _hashes(options: argparse.Namespace) -> Result:
    from diffship.core.bundle import Bundle

    if options.parts is not None or options.engine or options.reduce or options.graphs or options.polygraphy:
        raise ConfigError(
            "--hashes-only opens no engine; leave --parts, --engine, --reduce, --graphs and --polygraphy out"
        )
    bundle = Bundle.open(options.bundle)
    document, text = _intact(bundle)
    return Result(document, f"{text}; nothing was computed")


def _polygraphy(options: argparse.Namespace) -> Result:
    """Golden vectors in Polygraphy's form, and its commands; the hashes are checked, and nothing is computed."""
    from diffship.core.bundle import Bundle
    from diffship.runtimes.proof.polygraphy_files import write_polygraphy

    if options.engine or options.reduce or options.graphs:
        raise ConfigError("--polygraphy opens no engine; leave --engine, --reduce and --graphs out")
    bundle = Bundle.open(options.bundle)
    intact = _intact(bundle)
    written = write_polygraphy(bundle, options.polygraphy, options.parts)
    document, text = intact
    lines = [f"{entry.part}: {entry.reason}" if entry.reason else entry.command for entry in written]
    return Result({**document, "polygraphy": [entry.to_json() for entry in written]}, "\n".join([text, *lines]))


def _intact(bundle: Bundle) -> tuple[dict[str, object], str]:
    """Document and text of a bundle whose hashes match. Raises BundleError if they do not."""
    notes = bundle.verify()
    files = bundle.manifest.files
    size = sum(record.size for record in files.values())
    document: dict[str, object] = {
        "passed": True,
        "bundle": str(bundle.path),
        "engine": None,
        "version": None,
        "files": len(files),
        "bytes": size,
        "damage": "",
        "notes": list(notes),
        "parts": [],
        "trajectory": None,
    }
    return document, "\n".join([f"{len(files)} files, {size_text(size)}: hashes match", *notes])
