"""Whether the files of a bundle are those that its server was started with: names and digests were read only once."""

from __future__ import annotations

import os
from pathlib import Path

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError
from diffship.core.manifest import MANIFEST_NAME

Identity = tuple[int, int, int, int]
MISSING, REPLACED = "missing", "replaced"


class ReplacedError(BundleError):
    """Other files lie where those of the bundle were, or none."""


def identity(path: Path) -> Identity:
    """What a file that takes another's place, or is written anew, does not have in common with it.

    Raises:
        OSError: there is no such file.
    """
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Files:
    """The manifest and the parts' files of an opened bundle; `manifest` is what its identity was before it was read."""

    def __init__(self, bundle: Bundle, manifest: Identity) -> None:
        self._path = bundle.path
        names = [name for part in bundle.manifest.parts for name in part.files]
        self._known = {bundle.path / name: identity(bundle.path / name) for name in names}
        self._known[bundle.path / MANIFEST_NAME] = manifest
        self.require_same()

    def lost(self) -> str:
        """`missing` or `replaced`, empty while all of them are as they were."""
        try:
            now = {path: identity(path) for path in self._known}
        except OSError:
            return MISSING
        return "" if now == self._known else REPLACED

    def require_same(self) -> None:
        """Raises ReplacedError: files are missing, or others."""
        state = self.lost()
        if state:
            raise ReplacedError(
                f"{self._path}: files of the bundle are {state} since the server opened it; start the server anew"
            )
