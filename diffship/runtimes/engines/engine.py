"""What an engine must bring: a class whose fields are its options, and sessions that know native names only."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np

from diffship.core import registry
from diffship.core.errors import ConfigError, MissingExtra, UnsupportedError
from diffship.core.lazy import installed as installed
from diffship.core.strict import load as load_options
from diffship.core.strict import unknown


class Session(Protocol):
    """An opened model file. Several threads may be inside `run` at once.

    `inputs` and `outputs` map native names to dtype names ("float32") as the file itself declares them.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        """Arrays for `outputs`, in that order; a feed is a contiguous numpy array or what `keep` returned."""
        ...

    def keep(self, array: np.ndarray) -> Any:
        """`array` where the engine computes; on a CPU the array itself."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Probe:
    """What `doctor` prints of one engine; `conflict` is set if the installed packages shadow each other."""

    engine: str
    available: bool
    version: str = ""
    devices: tuple[str, ...] = ()
    reason: str = ""
    install: str = ""
    conflict: str = ""

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


class Opener(Protocol):
    """What opens the files of a part."""

    def open(self, files: Sequence[Path]) -> Session:
        """Raises RunnerError if the engine refuses the model, MissingExtra if it is not installed."""
        ...


class Engine(Opener, Protocol):
    """A frozen dataclass: its fields are the options, its instances open files."""

    name: ClassVar[str]
    extra: ClassVar[str]
    targets: ClassVar[frozenset[str]]

    def gate_bytes(self, file_bytes: int, precision: str) -> int:
        """Bytes of memory that opening a part of `file_bytes` takes, from measurements; verify runs larger parts in
        stretches."""
        ...

    @classmethod
    def probe(cls) -> Probe: ...


def make_engine(name: str, options: Mapping[str, object] | None = None) -> Engine:
    """The engine of that name with those options.

    Raises:
        ConfigError: unknown engine or option, or a value out of range.
    """
    cls = engine_class(name)
    return cast(Engine, load_options(cls, options or {}, f"engine {name}"))


def engine_class(name: str) -> type[Any]:
    if name not in registry.RUNNERS:
        raise ConfigError(unknown("engine", name, registry.RUNNERS))
    return cast("type[Any]", registry.load(registry.RUNNERS, name))


def engines_for(target: str) -> tuple[str, ...]:
    """Engines that read bundles of `target`, the preferred first."""
    return tuple(name for name in registry.RUNNERS if target in engine_class(name).targets)


def choose_engine(target: str, asked: str | None = None) -> str:
    """`asked`, or the first installed engine that reads `target`.

    Raises:
        MissingExtra: none of them is installed; the message holds the install command.
        UnsupportedError: it is installed, and this machine lacks what it runs on.
        UnsupportedError: `asked` does not read this target.
    """
    able = engines_for(target)
    if asked is not None:
        if engine_class(asked) and asked not in able:
            raise UnsupportedError(
                f"engine {asked} does not read {target} bundles; use --engine {' or '.join(able) or '(none yet)'}"
            )
        return asked
    for name in able:
        if engine_class(name).probe().available:
            return name
    if not able:
        raise UnsupportedError(f"no engine of this version reads {target!r} bundles")
    probe = engine_class(able[0]).probe()
    if probe.version:  # it is there, and has nothing to run on
        raise UnsupportedError(
            f"engine {able[0]} ({probe.version}) cannot run here: {probe.reason}. Run: diffship doctor"
        )
    raise MissingExtra(able[0], engine_class(able[0]).extra)


def probe_all() -> list[Probe]:
    """One row per engine, for `doctor`; imports an engine only if it is installed."""
    return [engine_class(name).probe() for name in registry.RUNNERS]


def package_version(*names: str) -> str:
    """Version of the first of these distributions that is installed, or ''."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def first_line(fault: BaseException, limit: int = 240) -> str:
    """An engine's complaint in one bounded, printable line."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
