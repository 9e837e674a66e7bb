"""serve: answer requests over HTTP, several bundles at once; requests share model calls step by step."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from diffship.cli.flags import add_engine, add_fields, engine_options, given_fields
from diffship.cli.output import Result
from diffship.cli.progress import note
from diffship.core.errors import ConfigError
from diffship.runtimes.serve.options import ServeOptions

EXAMPLES = """examples:
  diffship serve out/emoji
  diffship serve out/emoji small=out/emoji-small --port 8080 --queue 16 --batch 4
  DIFFSHIP_TOKEN=... diffship serve out/emoji --host 0.0.0.0
"""
FLAGS = ("queue", "batch", "deadline", "grace", "restarts", "keep_alive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundles", metavar="[NAME=]DIR", nargs="+", help="bundles; requests name them by folder or NAME"
    )
    door = parser.add_argument_group("door")
    door.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    door.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: 8765)")
    door.add_argument("--token", help="what clients must send as a bearer token (better: DIFFSHIP_TOKEN, unseen by ps)")
    door.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a name that Host headers may hold; repeat"
    )
    add_fields(
        parser, ServeOptions, "limits", skip=[field.name for field in fields(ServeOptions) if field.name not in FLAGS]
    )
    add_engine(parser)


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading an engine."""


def run(options: argparse.Namespace) -> Result:
    from diffship.cli.drawing import require_something
    from diffship.core.lazy import need
    from diffship.runtimes.serve.connections import bind
    from diffship.runtimes.serve.log import log_to_stderr
    from diffship.runtimes.serve.opened import named, open_served
    from diffship.runtimes.serve.server import check_exposure, serve_until_asked
    from diffship.runtimes.serve.service import Service

    limits, token = settings(options), options.token or os.environ.get("DIFFSHIP_TOKEN") or None
    sources = named(options.bundles)
    check_exposure(options.host, token)
    for package in ("fastapi", "uvicorn"):
        need(package)
    log_to_stderr(options.quiet)
    with bind(options.host, options.port) as doors:
        for source in sources.values():
            require_something(source)
        with open_served(sources, options.engine, engine_options(options)) as models:
            service = Service(models, limits)
            serve_until_asked(service, doors, token, said=note)
            return _result(service)


def settings(options: argparse.Namespace) -> ServeOptions:
    """The limits that the command line set.

    Raises:
        ConfigError: one that is out of range.
    """
    from diffship.core.strict import load

    given: dict[str, Any] = given_fields(options, ServeOptions)
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}; legal is a whole number from 0 to 65535")
    return load(ServeOptions, {**given, "allow_hosts": tuple(options.allow_host)}, "serve")


def _result(service: Any) -> Result:
    outcomes = ("done", "failed", "cancelled", "expired")
    counted = {
        name: {
            outcome: int(service.metrics.value("diffship_generations_total", model=name, outcome=outcome))
            for outcome in outcomes
        }
        for name in service.workers
    }
    text = "\n".join(
        f"{name}: " + ", ".join(f"{n} {word}" for word, n in found.items()) for name, found in counted.items()
    )
    return Result({"models": counted}, text)
