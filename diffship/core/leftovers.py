"""Unfinished folders: recognisable, locked while their writer lives, and swept up by the next run."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffship.core.atomic import partial_name, partial_prefix
from diffship.core.errors import BusyError, ConfigError

try:
    import fcntl
except ImportError:  # Windows: a leftover is told by its age alone
    fcntl = None  # type: ignore[assignment]

_STALE_SECONDS = 24 * 3600


@contextmanager
def claim_folder(path: Path) -> Iterator[Path]:
    """Make a new, empty, private (0700) folder beside `path`, locked until the block ends or the process dies.

    If the folder is still in its place at the end, it is removed. A signal leaves nothing behind, also right after the
    folder is made: its name is chosen first, and it is made inside the `try` that removes it.
    """
    for _ in range(10):
        folder = partial_name(path)
        descriptor = None
        try:
            os.mkdir(folder, 0o700)
            descriptor = _lock(folder)
            if descriptor is None:
                continue  # swept away between its creation and its lock
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if descriptor is not None:
                _unlock(descriptor)
        return
    raise BusyError(f"{path}: other writers keep sweeping this one's folder away; try again")


@contextmanager
def temporary_folder(what: str, place: Path | None = None) -> Iterator[Path]:
    """Make a private folder, `diffship-WHAT-...` in `place` (the system's temporary folder), and remove it at the end.

    `tempfile.TemporaryDirectory` makes its folder before it notes the name, so a signal between the two leaves the
    folder for ever.
    """
    folder = temporary_name(what, place)
    try:
        os.mkdir(folder, 0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_name(what: str, place: Path | None = None) -> Path:
    """The path of a temporary folder that is still to be made, unlike any other's."""
    return Path(place or tempfile.gettempdir()) / f"diffship-{what}-{secrets.token_hex(8)}"


def usual_mode(private: Path) -> int:
    """The permissions that `mkdir` gives outside of a private folder."""
    probe = private / "probe"  # asking for the umask would change it for all threads
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    return mode


def refuse_fixed(path: Path) -> None:
    """Raises ConfigError if no folder can be moved to: a container's volume, a drive, the current folder."""
    if path in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"{path} is the current folder or holds it; name a folder that can be made")
    if os.path.ismount(path):
        raise ConfigError(
            f"{path} is a mount point, whose place nothing can take; name a folder in it: {path / 'NAME'}"
        )


def remove_leftovers(path: Path) -> list[Path]:
    """Remove what dead writers of `path` left beside it, bring back a bundle that one had moved aside; return both."""
    handled = [entry for entry in _named(path, ".old-") if _bring_back(entry, path)]
    for entry in [*_named(path, ".partial-"), *_named(path, ".old-")]:
        if _remove_if_dead(entry):
            handled.append(entry)
    return handled


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, also while it is renamed, so that no other writer takes it for a leftover."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            _unlock(descriptor)


def _bring_back(entry: Path, path: Path) -> bool:
    if os.path.lexists(path):
        return False
    descriptor = _lock(entry)
    if descriptor is None:
        return False  # its writer is about to put the new one in its place
    try:
        os.replace(entry, path)
        return True
    finally:
        _unlock(descriptor)


def _named(path: Path, mark: str) -> list[Path]:
    prefix = partial_prefix(path).replace(".partial-", mark)
    with suppress(OSError):
        return sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(prefix))
    return []


def _remove_if_dead(entry: Path) -> bool:
    if entry.is_symlink() or not entry.is_dir():
        return _remove_stale_file(entry)
    descriptor = _lock(entry)
    if descriptor is None:
        return False
    try:
        if descriptor < 0 and time.time() - entry.stat().st_mtime < _STALE_SECONDS:
            return False
        shutil.rmtree(entry, ignore_errors=True)
        return True
    finally:
        _unlock(descriptor)


def _remove_stale_file(entry: Path) -> bool:
    with suppress(OSError):
        if time.time() - entry.lstat().st_mtime > _STALE_SECONDS:
            entry.unlink()
            return True
    return False


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; -1 if the system or the file system has no locks; None if another process holds
    it or the folder is gone."""
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # some network file systems have none
        os.close(descriptor)
        return -1
    os.close(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
