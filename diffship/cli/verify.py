"""verify: hash every file of a bundle, then compute its golden vectors again on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffship.cli.flags import add_engine, engine_options, names
from diffship.cli.output import Result, size_text
from diffship.cli.progress import Stages
from diffship.core.errors import ConfigError

EXAMPLES = """examples:
  diffship verify out/emoji
  diffship verify out/emoji --engine openvino --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle")
    add_engine(parser)
    parser.add_argument("--parts", metavar="A,B", type=names, help="only these parts")
    parser.add_argument("--reduce", action="store_true", help="on a failure, name the first nodes that differ")
    parser.add_argument("--hashes-only", action="store_true", help="leave the golden vectors out; needs no engine")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading an engine."""


def run(options: argparse.Namespace) -> Result:
    if options.hashes_only:
        return _hashes(options)
    from diffship.runtimes.verify import verify

    with Stages(options.quiet) as stages:
        report = verify(
            options.bundle,
            options.engine,
            parts=options.parts,
            reduce=options.reduce,
            progress=stages,
            **engine_options(options),
        )
    return Result(report.to_json(), report.text(), 0 if report.passed else 1)


def _hashes(options: argparse.Namespace) -> Result:
    from diffship.core.bundle import Bundle

    if options.parts or options.engine or options.reduce:
        raise ConfigError("--hashes-only opens no engine; leave --parts, --engine and --reduce out")
    bundle = Bundle.open(options.bundle)
    bundle.verify()
    files = bundle.manifest.files
    size = sum(record.size for record in files.values())
    document = {
        "passed": True,
        "bundle": str(options.bundle),
        "engine": None,
        "version": None,
        "files": len(files),
        "bytes": size,
        "damage": "",
        "parts": [],
        "trajectory": None,
    }
    return Result(document, f"{len(files)} files, {size_text(size)}: hashes match; nothing was computed")
