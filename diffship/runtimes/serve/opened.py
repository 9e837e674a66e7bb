"""Bundles (or, if torch is installed, other sources) opened under the names that requests use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.limits import MIB
from diffship.core.manifest import MANIFEST_NAME
from diffship.runtimes.engines.isolated.engine import IsolatedEngine
from diffship.runtimes.engines.model import BundleModel, open_model
from diffship.runtimes.serve.files import Files, identity
from diffship.runtimes.serve.worker import Served

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_TINY_BYTES = 16 * MIB  # TAESD's decoder has 5 MB in float32, that of a KL autoencoder 198


def named(words: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` or `DIR` to sources by name; a folder's own name is the default.

    Raises:
        ConfigError: a name that no request could use, or one twice.
    """
    found: dict[str, str] = {}
    for word in words:
        given, equals, source = word.partition("=")
        if not equals or "/" in given:
            given, source = _name_of(word), word
        if not NAME.match(given):
            raise ConfigError(f"name {given[:80]!a}: legal are 64 lower-case letters, digits, '.', '_' and '-'")
        if given in found:
            raise ConfigError(f"two models are called {given}; give one a name of its own: NAME=DIR")
        found[given] = source
    return found


@contextmanager
def open_served(sources: Mapping[str, str], engine: str | None, options: Mapping[str, Any]) -> Iterator[list[Served]]:
    """Every source as a model to serve, checked but not loaded, for a `with` block.

    Each bundle's engine gets a process of its own; other sources are drawn with in this one. Raises as `open_model`.
    """
    with ExitStack() as stack:
        yield [_served(stack, name, source, engine, options) for name, source in sources.items()]


def _served(stack: ExitStack, name: str, source: str, engine: str | None, options: Mapping[str, Any]) -> Served:
    if not (Path(source) / MANIFEST_NAME).is_file():
        return Served(name, stack.enter_context(open_model(source, engine, **options)), engine="torch")
    manifest = identity(Path(source) / MANIFEST_NAME)
    bundle = Bundle.open(source)
    files = Files(bundle, manifest)
    model = stack.enter_context(BundleModel(bundle, engine, make=IsolatedEngine, **options))
    process = cast(IsolatedEngine, model.opener)

    def restart() -> None:
        files.require_same()  # else other weights would draw under the old names
        process.restart()
        files.require_same()

    return Served(
        name,
        model,
        lost=files.lost,
        loaded=files.require_same,
        previews=0 < _decoder_bytes(bundle) <= _TINY_BYTES,
        engine=model.engine,
        alive=process.alive,
        restart=restart,
        kill=process.kill,
    )


def _decoder_bytes(bundle: Bundle) -> int:
    decoder = bundle.manifest.family.kind.decoder
    names = [name for part in bundle.manifest.parts if part.name == decoder for name in part.files]
    return sum(bundle.manifest.files[name].size for name in names)


def _name_of(source: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).strip("-._")[:64] or "model"
