"""Where results go: refused before any work, with the flag that named it."""

from __future__ import annotations

import os
from pathlib import Path

from diffship.core.errors import ConfigError

_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def require_file_place(path: Path, flag: str) -> None:
    """Raises ConfigError unless a file can be written at `path`; folders above it may still be missing."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    _require_above(path, flag)


def require_picture_place(path: Path, flag: str) -> None:
    """Raises ConfigError unless pictures can be written there: to one .png, or into a folder."""
    if path.suffix.lower() == ".png":
        require_file_place(path, flag)
        return
    if path.suffix.lower() in _OTHER_PICTURES and not path.is_dir():
        raise ConfigError(f"{flag} {path}: pictures are written as PNG; name a .png file, or a folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {path} is a file; name a folder, or a .png file")
    _require_above(path / "picture.png", flag)


def _require_above(path: Path, flag: str) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag} {path}: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{flag} {path}: {above} may not be written to")
