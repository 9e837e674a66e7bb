"""A bundle opened in an engine as a Model: everything that `generate` needs, loaded when first used."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from diffship.core.brief import brief_text
from diffship.core.bundle import Bundle
from diffship.core.bundle_check import read_small
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.core.manifest import MANIFEST_NAME, Manifest
from diffship.core.runner import Runner
from diffship.core.sniff import foreign, missing, near
from diffship.core.staging import Staging
from diffship.runtimes.engines.chain import ChainRunner
from diffship.runtimes.engines.engine import Opener, choose_engine, make_engine
from diffship.runtimes.engines.shell import PartRunner, steps_of
from diffship.runtimes.engines.torch import TorchRunner
from diffship.sampling.model import Model
from diffship.sampling.tokenizer import Tokenizer

TOKENIZER_BYTES = 32 << 20


class BundleModel:
    """A Model over a Bundle, whatever the engine. Threads may share it; a part is loaded once.

    A denoiser that the bundle holds in stages is a part like any other: its runner calls them one after the other.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str | None = None,
        *,
        make: Callable[[str, Mapping[str, object]], Opener] = make_engine,
        **options: Any,
    ) -> None:
        """Reads the tokenizers; parts are loaded when used. Options are the fields of the engine's class.

        `make` turns the engine's name and options into one that opens files.

        Raises:
            UnsupportedError: no engine for this bundle, or not this one.
            ConfigError: an unknown option.
        """
        manifest = bundle.manifest
        self.bundle = bundle
        self.engine = choose_engine(manifest.target, engine)
        self.opener: Opener = make(self.engine, options)
        if options.get("device", "cpu") == "cpu":
            _refuse_bfloat16(manifest)
        self.name: str = str(manifest.source.get("id") or bundle.path.name)
        self.family: Family = manifest.family
        self.scheduler: Mapping[str, Any] = dict(manifest.sampler)
        staging = manifest.staging
        whole = () if staging is None else (staging.part,)
        self.parts: frozenset[str] = frozenset([*(part.name for part in manifest.parts), *whole])
        self.digests: Mapping[str, str] = {part.name: part.source_digest for part in manifest.parts}
        self.digest: str = _digest(self.digests)
        self.tokenizers: Mapping[str, Tokenizer] = _tokenizers(bundle)
        self._runners: dict[str, PartRunner] = {}
        self._locks = {part: threading.Lock() for part in self.parts}
        self.load_seconds = 0.0  # spent so far on opening parts

    def __repr__(self) -> str:
        return brief_text(self, name=self.name, engine=self.engine, parts=self.parts, bundle=str(self.bundle.path))

    def use(self, part: str) -> Runner:
        """The runner of `part`, loaded on first use and kept until `release` or `close`."""
        staging = self.bundle.manifest.staging
        if staging is not None and part == staging.part:
            return self._chain(staging)
        if part not in self._locks:
            self.bundle.part(part)  # names the parts there are
        with self._locks[part]:
            runner = self._runners.get(part)
            if runner is None:
                begin = time.perf_counter()
                entry = self.bundle.part(part)
                session = self.opener.open([self.bundle.file(name) for name in entry.files])
                runner = self._runners[part] = PartRunner(entry, session, steps_of(self.bundle, entry))
                self.load_seconds += time.perf_counter() - begin
            return runner

    def release(self, part: str) -> None:
        """Free the part's memory; the next `use` loads it again."""
        staging = self.bundle.manifest.staging
        for stage in staging.stages if staging is not None and part == staging.part else ():
            self.release(stage)
        if part in self._locks:
            with self._locks[part]:
                runner = self._runners.pop(part, None)
            if runner is not None:
                runner.close()

    def close(self) -> None:
        for part in self.parts:
            self.release(part)

    def _chain(self, staging: Staging) -> ChainRunner:
        """The stages in this process, in order, as one runner."""
        ports = {part.name: (part.inputs, part.outputs) for part in self.bundle.manifest.parts}
        stages = [self.use(stage) for stage in staging.stages]
        release = partial(self.release, staging.part)
        return ChainRunner(staging.part, stages, staging.inputs(ports), staging.outputs(ports), release)

    def __enter__(self) -> BundleModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextmanager
def open_model(source: str | os.PathLike[str], engine: str | None = None, **options: Any) -> Iterator[Model]:
    """Open a bundle in an engine, or (with torch) a diffusers folder or any other source, for a `with` block.

    Options are those of the engine, `device` among them.

    Raises:
        BundleError: the bundle is damaged. UnsupportedError: no such engine here. SourceError: no such source.
    """
    with closing(_open(Path(source), str(source), engine, options)) as model:
        yield model


def _open(path: Path, source: str, engine: str | None, options: Mapping[str, Any]) -> Model:
    if (path / MANIFEST_NAME).is_file():
        return BundleModel(Bundle.open(path), engine, **options)
    known = ("model_index.json", "config.json", "*/config.json")  # of a pipeline, of one component, of several
    if path.exists() and not path.is_file() and not any(next(path.glob(name), None) for name in known):
        lacking = f"{path} holds neither {MANIFEST_NAME} nor model_index.json"
        raise SourceError(f"{lacking}; {foreign(path, 'it is no bundle and no model')}")
    if gone := missing(source):
        raise SourceError(f"{gone}; a bundle is a folder with {MANIFEST_NAME} in it{near(source)}")
    if engine not in (None, "torch"):
        raise UnsupportedError(
            f"engine {engine} runs bundles, and {source} is none. Run: diffship export {source} --to onnx -o DIR"
        )
    return cast(TorchRunner, make_engine("torch", options)).open_model(source)


def _refuse_bfloat16(manifest: Manifest) -> None:
    narrow = [part.name for part in manifest.parts if not part.format.on_cpu]
    if narrow and manifest.target == "onnx":
        raise UnsupportedError(
            f"{', '.join(narrow)} of this bundle compute in bfloat16, which no engine does on a CPU. "
            "Export with --precision fp32, or run it on a GPU (--device cuda); `diffship verify` works here"
        )


def _tokenizers(bundle: Bundle) -> dict[str, Tokenizer]:
    """By folder name; only files that the manifest lists are read."""
    found: dict[str, Tokenizer] = {}
    kind = bundle.manifest.family.kind
    for folder in [kind.tokenizer_of(part) for part in kind.text_parts]:
        names = [name for name in bundle.manifest.files if name.startswith(f"{folder}/")]
        files = {
            name.removeprefix(f"{folder}/"): read_small(bundle.file(name), TOKENIZER_BYTES, bundle.hard_links)
            for name in names
        }
        if files:
            found[folder] = kind.tokenizer(folder, files)
    return found


def _digest(parts: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {parts[name]}\n" for name in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()
