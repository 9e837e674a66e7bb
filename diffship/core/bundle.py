"""Bundle: a folder for one target. It opens only if it is what its manifest says, and appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from diffship.core import bundle_check as check
from diffship.core.atomic import exchange, sync_folder, sync_tree, write_file
from diffship.core.brief import brief
from diffship.core.errors import BundleError, ConfigError, SourceError
from diffship.core.leftovers import claim_folder, held, refuse_fixed, remove_leftovers, usual_mode
from diffship.core.limits import LIMITS
from diffship.core.manifest import (
    MANIFEST_NAME,
    Binding,
    FileRecord,
    Golden,
    Manifest,
    Part,
    listed_files,
)
from diffship.core.sniff import describe, foreign, missing, near, part_of
from diffship.core.travel import only_read_by_people, repository, rewrapped

__all__ = ["Binding", "Bundle", "Draft", "FileRecord", "Golden", "Manifest", "Part", "write_bundle"]


_WHAT = f"a bundle is a folder with {MANIFEST_NAME} in it"


@brief
@dataclass(frozen=True)
class Bundle:
    """An opened bundle: names, sizes, paths, links, headers and limits are checked; hashes only by `verify`."""

    path: Path
    manifest: Manifest
    hard_links: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, hard_links: bool = False) -> Bundle:
        """Open and check a bundle. `hard_links` allows them: installers such as uv share package data with their cache.

        Raises:
            ConfigError: there is no such folder.
            SourceError: it is a folder without a manifest.
            BundleError: naming the file, for anything that is not as the manifest says.
        """
        root = _existing_folder(path)
        if not os.path.lexists(root / MANIFEST_NAME):
            raise SourceError(
                f"{root} is not a bundle: it has no {MANIFEST_NAME}; "
                f"{part_of(root) or foreign(root, 'make one with: diffship export')}"
            )
        data = check.read_small(root / MANIFEST_NAME, LIMITS.manifest_bytes, hard_links)
        if told := describe(root / MANIFEST_NAME, text=True):
            raise BundleError(f"{root / MANIFEST_NAME}: {told}")
        return cls(root, check.open_manifest(root, data, hard_links), hard_links)

    def verify(self, on_file: Callable[[str, int], None] | None = None) -> tuple[str, ...]:
        """Hash every file; `on_file(name, size)` follows each.

        Returns notes for the user: which files of operating systems and downloads were passed over, and whether git
        changed the line ends of the README.

        Raises:
            BundleError: a changed or unlisted file.
        """
        note = check.check_unlisted(self.path, self.manifest.files, check.scan(self.path, self.hard_links))
        notes = [note] if note else []
        for name, record in self.manifest.files.items():
            actual = check.digest_file(self.path / name)
            if actual != record.sha256 and only_read_by_people(name) and rewrapped(self.path / name, record):
                notes.append(f"{name}: its line ends were changed, and nothing else")
            elif actual != record.sha256:
                raise BundleError(
                    f"{self.path}: {name} was changed: its sha256 is {actual[:12]}..., expected {record.sha256[:12]}..."
                )
            if on_file is not None:
                on_file(name, record.size)
        return tuple(notes)

    def file(self, name: str) -> Path:
        """The path of a listed file; raises BundleError for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the bundle does not list {name[:100]!a}")
        return self.path / name

    def part(self, name: str) -> Part:
        """The part called `name`. Raises BundleError, naming the parts there are."""
        return self.manifest.part(name)

    def part_bytes(self, name: str) -> int:
        """Bytes of the files that the part called `name` is opened from: its graph and its weights."""
        return sum(self.file(file).stat().st_size for file in self.part(name).files)


class Draft:
    """A bundle that is being written. `folder` is a private sibling of the final place."""

    def __init__(self, path: Path, folder: Path, overwrite: bool) -> None:
        self.path = path
        self.folder = folder
        self._overwrite = overwrite
        self.finished = False

    def finish(self, manifest: Manifest) -> Bundle:
        """Hash and list every file in `folder`, fsync, and move it into place; what was there is replaced whole.

        The manifest is read back and checked as `Bundle.open` does, so that what appears can be opened.

        Raises:
            BundleError: a file or fact that a bundle may not hold, or the place was taken meanwhile. Nothing has
                changed then.
        """
        data = replace(manifest, files=check.record(self.folder)).to_bytes()
        complete = check.open_manifest(self.folder, data)
        write_file(self.folder / MANIFEST_NAME, data)
        self.folder.chmod(usual_mode(self.folder))
        sync_tree(self.folder)
        self._move_into_place()
        self.finished = True
        return Bundle(self.path, complete)

    def _move_into_place(self) -> None:
        _refuse_target(self.path, self._overwrite)
        if _is_free(self.path):
            self._move_to_free_place()
        elif exchange(self.folder, self.path):
            pass  # the old bundle now has the draft's name and goes with it
        else:
            self._replace_in_two_steps()
        sync_folder(self.path.parent)

    def _move_to_free_place(self) -> None:
        if os.name == "nt" and self.path.exists():
            self.path.rmdir()
        try:
            os.replace(self.folder, self.path)
        except OSError as fault:
            if fault.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise BundleError(f"{self.path} was written by someone else meanwhile; theirs is kept") from None
            raise

    def _replace_in_two_steps(self) -> None:
        # the old bundle keeps a name from which `write_bundle` brings it back, should this process die in between
        aside = self.folder.with_name(self.folder.name.replace(".partial-", ".old-"))
        with held(self.path):
            os.replace(self.path, aside)
            try:
                os.replace(self.folder, self.path)
            except BaseException:
                os.replace(aside, self.path)
                raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def write_bundle(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Draft]:
    """A Draft to fill and `finish`; without `finish`, or on an error, nothing appears and the draft is removed.

    `overwrite` replaces a bundle that holds nothing but the files it lists, also one that no longer opens; any other
    folder is never touched.

    Raises:
        ConfigError: the place is taken, or its parent does not exist.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder; create it first: mkdir -p {path.parent}")
    remove_leftovers(path)
    require_place(path, overwrite)
    with claim_folder(path) as folder:
        yield Draft(path, folder, overwrite)


def require_place(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raises ConfigError unless a bundle can be put at `path`."""
    path = Path(os.path.abspath(path))
    refuse_fixed(path)
    _refuse_target(path, overwrite)


def _existing_folder(path: str | os.PathLike[str]) -> Path:
    try:
        root = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError):
        gone = missing(str(path)) or f"{str(path)[:200]!r} does not exist"
        raise ConfigError(f"{gone}; {_WHAT}, which diffship export makes{near(str(path))}") from None
    if not root.is_dir():
        told = describe(root)
        raise ConfigError(f"{path} is not a folder; {f'{told}; ' if told else ''}{_WHAT}")
    return root


def _refuse_target(path: Path, overwrite: bool) -> None:
    if _is_free(path):
        return
    if not overwrite:
        raise ConfigError(f"{path} exists already; choose another folder, or pass --overwrite to replace a bundle")
    if path.is_symlink() or not path.is_dir():
        raise ConfigError(f"{path} is not a bundle, so it is never replaced; choose another folder")
    try:
        data = check.read_small(path / MANIFEST_NAME, LIMITS.manifest_bytes)
        check.check_unlisted(path, listed_files(data), check.scan(path))
    except BundleError as fault:
        raise ConfigError(f"{path} is not a clean bundle, so it is never replaced: {fault}") from None
    if clone := repository(path):
        raise ConfigError(f"{path} is a clone with its {clone}, so it is never replaced; choose another folder")


def _is_free(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode) and not os.listdir(path)
    except FileNotFoundError:
        return True
