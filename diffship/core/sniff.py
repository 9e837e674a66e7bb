"""What a path holds, from its name and first bytes: a folder, weights, or a form that is never read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from diffship.core.errors import SourceError

Kind = Literal["folder", "safetensors", "pickle", "archive", "unknown"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".nemo", ".mar")
CONVERT = (
    "On a machine where you trust the file, load it and save_pretrained(DIR, safe_serialization=True) with diffusers, "
    "or use https://huggingface.co/spaces/safetensors/convert"
)
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
}


def classify(path: str | Path) -> Kind:
    """The kind of thing at `path`, without unpacking or executing any of it; links are followed, FIFOs never opened."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "unknown"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "unknown"
    head = _head(path)
    if path.suffix.lower() in PICKLE_SUFFIXES or _is_pickle(head):
        return "pickle"
    if path.suffix.lower() in ARCHIVE_SUFFIXES or _archive(head):
        return "archive"
    return "safetensors" if path.suffix.lower() == ".safetensors" else "unknown"


def classify_head(path: str | Path) -> Kind:
    """The kind that the first bytes of a regular file tell, whatever its name."""
    head = _head(Path(path))
    return "pickle" if _is_pickle(head) else "archive" if _archive(head) else "unknown"


def refuse_unsafe(path: str | Path) -> None:
    """Raises SourceError where `path` is a pickle, numpy or archive file: such input is never opened here."""
    kind = classify(path)
    if kind == "pickle":
        raise SourceError(
            f"{path}: pickle and numpy files can run code when they are read, so they never are. {CONVERT}"
        )
    if kind == "archive":
        raise SourceError(f"{path}: archives are not read. Unpack it yourself, look at it, and pass the folder")


def describe_bytes(head: bytes) -> str:
    """`""` or what foreign format starts with these bytes, with the way out."""
    if _is_pickle(head):
        return f"it holds a pickle or numpy file, which is never read. {CONVERT}"
    archive = _archive(head)
    return f"it is {archive}; unpack it yourself and pass the folder" if archive else ""


def _head(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        return os.read(descriptor, 512)
    finally:
        os.close(descriptor)


def _is_pickle(head: bytes) -> bool:
    binary = len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5
    text = head.startswith((b"cos\n", b"cposix\n", b"c__builtin__", b"cbuiltins", b"(lp", b"(dp", b"(i"))
    return binary or text or head.startswith(b"\x93NUMPY") or b"/data.pkl" in head or b"archive/data" in head


def _archive(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), "")
