"""Job: cache, resume, progress and cancellation of long work; and checks of disk and memory before it starts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffship.core.atomic import sync_folder, sync_tree
from diffship.core.errors import Cancelled, ConfigError, SourceError, UnsupportedError
from diffship.core.leftovers import claim_folder, remove_leftovers, temporary_name
from diffship.core.limits import GIB, MIB

Progress = Callable[[str, int, int], None]
T = TypeVar("T")
REMEDY = "Remove it, and the same command makes it anew"
_DIGEST = re.compile(r"[0-9a-z][0-9a-z._-]{7,127}\Z")


def digest_of(facts: object) -> str:
    """A digest (64 hex digits) for `Job.once` of what a result depends on.

    Raises:
        TypeError: `facts` holds something else than plain data and paths; the text of an array, say, leaves values out.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain_fact).encode()).hexdigest()


def _plain_fact(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be told apart by its text; give plain data")


class Bytes(int):
    """A `total` that counts bytes, so that a progress bar shows MB and GB."""


class Job:
    """Long work. `folder` keeps what is done, so that the next run finds it; None takes a temporary folder of this
    process, and `lasting` is False then. `progress(label, done, total)` is called with how far the work is; the work
    stops once `cancel()` is true."""

    def __init__(
        self,
        folder: str | Path | None = None,
        progress: Progress | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        self.lasting = folder is not None
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"{self._folder} is a file; name a folder for what is kept")
        self._progress = progress
        self._cancel = cancel

    @property
    def started(self) -> bool:
        """Whether there is a folder already: an earlier process may have left something in it."""
        return self._folder is not None and self._folder.is_dir()

    def inside(self, folder: str | Path) -> bool:
        """Whether what is kept lies in `folder`."""
        return self._folder is not None and self._folder.resolve().is_relative_to(Path(folder).resolve())

    @property
    def folder(self) -> Path:
        """The folder, created on first use."""
        if self._folder is None:
            self._folder = temporary_name("job")
            weakref.finalize(self, shutil.rmtree, self._folder, True)  # before it is made: a signal may fall between
            self._folder.mkdir(0o700)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def once(self, digest: str, make: Callable[[Path], object]) -> Path:
        """The file or folder that `make(path)` wrote for `digest`, made only if it is not there yet.

        `digest` names everything the result depends on (hex, at least 8 characters). `make` gets a path that does not
        exist; a crash inside leaves nothing that counts as done, so that the next run makes it again.

        Raises:
            ConfigError: `digest` is not one, or `make` wrote nothing.
        """
        if not _DIGEST.match(digest):
            raise ConfigError(f"{digest[:80]!a} is not a digest: 8 to 128 of 0-9, a-z, '.', '_' and '-'")
        place = self.folder / digest
        if place.exists():
            return place
        self.check()
        remove_leftovers(place)
        with claim_folder(place) as folder:
            self._make(place, folder / "result", make)
        return place

    def progress(self, label: str, done: int, total: int) -> None:
        """Report, and stop here if asked to: raises Cancelled."""
        if self._progress is not None:
            self._progress(label, done, total)
        self.check()

    def check(self) -> None:
        """Raises Cancelled once `cancel()` is true."""
        if self._cancel is not None and self._cancel():
            raise Cancelled("stopped on request; what is done is kept, run the same command again to go on")

    def _make(self, place: Path, result: Path, make: Callable[[Path], object]) -> None:
        make(result)
        if not result.exists():
            raise ConfigError(f"nothing was written for {place.name}")
        sync_tree(result.parent)
        try:
            os.replace(result, place)
        except OSError:
            if not place.exists():  # else another writer of the same content was first
                raise
        sync_folder(place.parent)


def kept_json(path: Path, load: Callable[[Any], T]) -> T:
    """What `load` makes of the JSON in a file that `Job.once` kept.

    Raises:
        SourceError: the file is damaged, as by a full disk or a copy that was stopped.
    """
    try:
        return load(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as fault:
        raise SourceError(f"{path}: is damaged ({str(fault)[:80]}). {REMEDY}") from None


def require_disk(path: str | Path, needed: int, what: str = "this") -> None:
    """Raises UnsupportedError unless the disk that holds (or will hold) `path` has `needed` bytes free."""
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UnsupportedError(
            f"{what} needs {_size(needed)} of disk at {folder}; {_size(free)} are free. Free some, or choose another"
        )


def require_memory(needed: int, what: str = "this") -> None:
    """Raises UnsupportedError unless `needed` bytes of memory are available; if that cannot be told, it passes."""
    free = available_memory()
    if free is not None and needed > free:
        raise UnsupportedError(
            f"{what} needs {_size(needed)} of memory, {_size(free)} are available. Close other programs, or choose less"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within the control group's limit; None if it cannot be told."""
    known = [value for value in (_meminfo(), _group_free()) if value is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


def _group_free() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no limit ("max"), or another kind of system
    reclaimable = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return max(limit - used + reclaimable, 0)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
