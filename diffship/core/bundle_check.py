"""What a bundle folder really holds, told without opening, following or trusting any of it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from diffship.core.errors import BundleError, SourceError
from diffship.core.limits import LIMITS
from diffship.core.manifest import MANIFEST_NAME, FileRecord, Manifest, check_path, parse_manifest
from diffship.core.onnx_wire import ExternalData, external_data
from diffship.core.registry import MODEL_FILES
from diffship.core.safetensors_file import read_header
from diffship.core.sniff import PICKLE_SUFFIXES, classify_head, describe
from diffship.core.travel import beside, left_by_systems, only_read_by_people, repository, rewrapped

_COPY = "Copy it with: cp -rL"


def scan(root: Path, hard_links: bool = False) -> dict[str, os.stat_result]:
    """Every file below `root` by relative path, `/` between folders; the manifest and a clone's `.git` left out.

    Raises:
        BundleError: a link, hard link, FIFO, socket or device anywhere, or more entries than the limits allow.
    """
    found: dict[str, os.stat_result] = {}
    passed = 0
    for name, status in _walk(root):
        _refuse_special(root, name, status, hard_links)
        found[name] = status
        passed += left_by_systems(name)
        if len(found) - passed > LIMITS.bundle_files + 1 or passed > LIMITS.beside_files:
            raise BundleError(f"{root} holds more than {LIMITS.bundle_files} files")
    found.pop(MANIFEST_NAME, None)
    return found


def check_files(root: Path, manifest: Manifest, found: Mapping[str, os.stat_result]) -> None:
    """Every listed file exists with its size, every file of a part is listed, no pickle among them."""
    for name, record in manifest.files.items():
        if name not in found:
            raise BundleError(f"{root}: the file {name} is missing")
        if found[name].st_size != record.size and not (only_read_by_people(name) and rewrapped(root / name, record)):
            raise BundleError(f"{root}: the file {name} {_other_size(root / name, record)}")
        if Path(name).suffix.lower() in _CODE_SUFFIXES:
            raise BundleError(f"{root}: the file {name} is of a kind that can run code; a bundle never holds one")
    for name, who in manifest.named_files().items():
        if name not in manifest.files:
            raise BundleError(f"{root}: {who} names the file {name}, which is not listed")
    for part in manifest.parts:
        # engines open files[0] whatever its name, so a model under another name would escape `check_formats`
        suffix = MODEL_FILES.get(manifest.target, "")
        if not part.files[0].endswith(suffix):
            raise BundleError(f"{root}: part {part.name} opens {part.files[0]}, which is not named *{suffix}")


def check_formats(root: Path, manifest: Manifest) -> None:
    """Headers of safetensors files and external data of ONNX files, before any library sees them."""
    for name in manifest.files:
        if name.lower().endswith(".safetensors"):
            _check_safetensors(root / name)
        elif name.lower().endswith(".bin") and classify_head(root / name) == "pickle":
            raise BundleError(f"{root}: the file {name} holds a pickle; a bundle never holds one")
        elif name.lower().endswith(".onnx"):
            for claim in external_data(root / name):
                _check_external(root, name, claim, manifest.files)


def open_manifest(root: Path, data: bytes, hard_links: bool = False) -> Manifest:
    """The manifest in `data`, after `root` was checked against it: all that opening a bundle asks.

    Raises:
        BundleError: naming the file, for anything that is not as the manifest says.
    """
    manifest = parse_manifest(data)
    check_files(root, manifest, scan(root, hard_links))
    check_formats(root, manifest)
    return manifest


def _other_size(path: Path, record: FileRecord) -> str:
    sizes = f"has {path.stat().st_size} bytes; it had {record.size}"
    if rewrapped(path, record):
        return f"{sizes}: its line ends were changed. Check it out again with: git -c core.autocrlf=false clone"
    told = describe(path, text=path.suffix in (".json", ".txt", ".md"))
    return f"{sizes}; {told}" if told else sizes


def check_unlisted(root: Path, listed: Collection[str], found: Mapping[str, os.stat_result]) -> str:
    """What to tell of files that systems and downloads leave in a bundle; `""` if there are none.

    Raises:
        BundleError: naming the first few other files that the manifest does not list.
    """
    unlisted = set(found) - set(listed)
    passed = {name for name in unlisted if left_by_systems(name)}
    extra = sorted(unlisted - passed)
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        shown = ", ".join(ascii(name[:100]) for name in extra[:3])
        raise BundleError(f"{root} holds files that its manifest does not list: {shown}{more}. Move them away")
    note, fault = beside(passed, {name: found[name].st_size for name in passed})
    if fault:
        raise BundleError(f"{root}: {fault}")
    clone = repository(root)
    return "; ".join([*([note] if note else []), *([f"passed over: {clone}, as it is a clone"] if clone else [])])


def digest_file(path: Path) -> str:
    """sha256 (hex) of a regular file; a link is refused, also when it appeared a moment ago."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BundleError(f"{path}: not a regular file")
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        raise BundleError(f"{path}: cannot be read: {fault.strerror}") from None


def read_small(path: Path, limit: int, hard_links: bool = False) -> bytes:
    """A regular file of at most `limit` bytes, no link; raises BundleError for anything else, and never hangs."""
    try:
        status = path.lstat()
        _refuse_special(path.parent, path.name, status, hard_links)
        if status.st_size > limit:
            raise BundleError(f"{path} has {status.st_size} bytes; the limit is {limit}")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            return file.read(limit + 1)
    except OSError as fault:
        raise BundleError(f"{path}: cannot be read: {fault.strerror}") from None


def record(root: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file below `root`, sorted, but for those that a file manager leaves meanwhile.

    Raises:
        BundleError: a name that a bundle may not hold.
    """
    found = {name: status for name, status in scan(root).items() if not left_by_systems(name)}
    for name in found:
        check_path(name)
    return {name: FileRecord(found[name].st_size, digest_file(root / name)) for name in sorted(found)}


# ".bin" is left to the file's first bytes: Core ML keeps plain weights in such a file
_CODE_SUFFIXES = (*(set(PICKLE_SUFFIXES) - {".bin"}), ".py", ".so", ".dll", ".dylib")


def _walk(root: Path, inside: str = "", depth: int = 0) -> Iterator[tuple[str, os.stat_result]]:
    if depth > LIMITS.path_depth:
        raise BundleError(f"{root} is deeper than {LIMITS.path_depth} folders")
    try:
        with os.scandir(root / inside) as entries:
            listed = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
    except OSError as fault:
        raise BundleError(f"{root / inside}: cannot be listed: {fault.strerror}") from None
    clone = "" if inside else repository(root)
    for own_name, status in listed:
        if own_name == clone:
            continue
        name = f"{inside}{own_name}"
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(root, f"{name}/", depth + 1)
        else:
            yield name, status


def _refuse_special(root: Path, name: str, status: os.stat_result, hard_links: bool = False) -> None:
    shown = ascii(name[:100])
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(f"{root}: {shown} is a link; a bundle holds none. {_COPY}")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{root}: {shown} is a pipe, socket, device or folder, not a file")
    if status.st_nlink > 1 and not hard_links:
        raise BundleError(f"{root}: {shown} is a hard link, shared with another path. {_COPY}")


def _check_safetensors(path: Path) -> None:
    try:
        read_header(path)
    except SourceError as fault:
        raise BundleError(str(fault)) from None


def _check_external(root: Path, model: str, claim: ExternalData, files: Mapping[str, FileRecord]) -> None:
    folder, _, _ = model.rpartition("/")
    label = f"{root / model}: tensor {claim.tensor[:80]!a}"
    location = claim.location.removeprefix("./")
    try:
        check_path(location)
    except BundleError as fault:
        raise BundleError(f"{label} has the external data location {claim.location[:80]!a}: {fault}") from None
    target = f"{folder}/{location}" if folder else location
    if target not in files:
        raise BundleError(f"{label} lies in {target!a}, which the bundle does not list")
    end = claim.offset + (claim.length or 0)
    if end > files[target].size:
        raise BundleError(f"{label} claims bytes up to {end} of {target}, which has {files[target].size}")
