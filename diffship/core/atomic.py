"""Files and folders that appear whole or not at all, also when the power goes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PLACES = 1000
_NAME_CHARS = 80  # of a name that a temporary one is made of; file systems take 255 bytes


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that a crash leaves the old file or the new one."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Give a binary file to write to, for a `with` block. If the block ends well, the file is fsynced and replaces
    `path`; if not, it is removed and `path` stays as it was.

    Raises:
        FileExistsError: `path` is a device, pipe, socket or folder. (Renaming as root would replace /dev/null.)
    """
    path = Path(path)
    if special(path):
        raise FileExistsError(errno.EEXIST, "is no plain file, and never replaced", str(path))
    temporary = partial_name(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def special(path: str | Path) -> bool:
    """Whether something is there that is neither a plain file nor a link."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISLNK(mode)


def write_new(path: str | Path, data: bytes) -> Path:
    """Write `data` whole to `path`, or, if another writer put something there meanwhile, to `NAME-2.SUFFIX` beside it,
    `NAME-3.SUFFIX` and so on. Returns the path; nothing that exists is replaced, and nothing is lost."""
    path = Path(path)
    temporary = partial_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for place in (path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, _PLACES))):
            if _take(temporary, place):
                sync_folder(place.parent)
                return place
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    finally:
        with suppress(OSError):
            temporary.unlink()


def _take(temporary: Path, place: Path) -> bool:
    """Give `temporary` the name `place`; returns False, and replaces nothing, if something has that name already."""
    try:
        os.link(temporary, place)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, such as FAT: between these two lines another may come first
        if os.path.lexists(place):
            return False
        os.replace(temporary, place)
    return True


def sync_folder(folder: str | Path) -> None:
    """fsync a folder, so that the names in it survive a crash; a no-op if the system cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to fsync a folder
    finally:
        os.close(descriptor)


def sync_tree(folder: str | Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY if os.name != "nt" else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(parent)


def exchange(first: str | Path, second: str | Path) -> bool:
    """Swap two paths in one step; False if the system or the file system has no such call."""
    call = _exchange_call()
    return call is not None and call(os.fsencode(first), os.fsencode(second)) == 0


def partial_name(path: Path) -> Path:
    """`.NAME.partial-XXXXXXXX` beside `path`: hidden, recognisable, and unlike any other writer's."""
    return path.parent / f"{partial_prefix(path)}{secrets.token_hex(4)}"


def partial_prefix(path: Path) -> str:
    """`.NAME.partial-`; a long name is cut, and a digest of the whole tells it from others that begin alike."""
    name = path.name
    if len(name) > _NAME_CHARS:
        name = f"{name[:_NAME_CHARS]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return f".{name}.partial-"


def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    if os.name == "nt":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return lambda a, b: int(library.renamex_np(a, b, ctypes.c_uint(2)))  # RENAME_SWAP
    if sys.platform.startswith("linux") and hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return lambda a, b: int(library.renameat2(here, a, here, b, ctypes.c_uint(2)))  # RENAME_EXCHANGE
    return None
