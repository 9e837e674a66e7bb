"""What a bundle meets on its way: files that systems and downloads leave beside it, line ends that git changes.

None of it is ever opened by an engine; it is passed over within bounds, and told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from diffship.core.limits import LIMITS

_FILES = {
    *(".ds_store", "thumbs.db", "desktop.ini", "icon\r", ".directory", ".localized"),
    *(".git", ".gitattributes", ".gitignore", ".gitkeep"),
}
_BEGINNINGS = ("._", ".nfs", ".fuse_hidden")  # of files that are removed while another program holds them, the last two
_FOLDERS = {
    *("__macosx", ".spotlight-v100", ".fseventsd", ".trashes", ".temporaryitems", "$recycle.bin", "lost+found"),
    *("system volume information", "@eadir", ".ipynb_checkpoints"),
}
_DOWNLOADS = (".cache/huggingface/", ".huggingface/")
_REPOSITORIES = (".git", ".hg", ".svn")
_PROSE = (".md", ".txt")
_TEXT = (*_PROSE, ".json")
_TEXT_BYTES = 64 << 20


class _Recorded(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...


def left_by_systems(name: str) -> bool:
    """Whether a file (relative, `/` between folders) is one that a file manager, an archiver or a download leaves."""
    *folders, own = name.lower().split("/")
    return (
        own in _FILES
        or own.startswith(_BEGINNINGS)
        or not _FOLDERS.isdisjoint(folders)
        or name.lower().startswith(_DOWNLOADS)
    )


def repository(root: Path) -> str:
    """The folder at the top of a bundle that makes it a clone (`.git`), or `""`."""
    return next((name for name in _REPOSITORIES if (root / name).is_dir()), "")


def beside(names: Iterable[str], sizes: Mapping[str, int]) -> tuple[str, str]:
    """(note, fault) about such files in a bundle: one of them is `""`, and both if there are none."""
    found = sorted(names)
    size = sum(sizes[name] for name in found)
    shown = ", ".join(ascii(name[:60]) for name in found[:3]) + (", ..." if len(found) > 3 else "")
    what = f"{len(found)} file{'s' if len(found) > 1 else ''} of systems and downloads"
    if len(found) > LIMITS.beside_files or size > LIMITS.beside_bytes:
        return "", f"{what}, {size} bytes ({shown}): too many. Move them away"
    return (f"passed over: {what} ({shown})" if found else ""), ""


def rewrapped(path: Path, record: _Recorded) -> bool:
    """Whether a text file is the recorded one but for its line ends, which git's core.autocrlf changes."""
    if not path.name.lower().endswith(_TEXT) or record.size > _TEXT_BYTES or path.stat().st_size > 2 * _TEXT_BYTES:
        return False
    data = path.read_bytes().replace(b"\r\n", b"\n")
    return len(data) == record.size and hashlib.sha256(data).hexdigest() == record.sha256


def only_read_by_people(name: str) -> bool:
    """Whether line ends mean nothing in this file: a text at the top of a bundle, which no program reads."""
    return "/" not in name and name.lower().endswith(_PROSE)
