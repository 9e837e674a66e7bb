"""Which pictures of a folder have captions, in every form that people keep them in, and how many are left, and why.

Names inside archives only pair a picture with its caption: they are never used as paths, and nothing is unpacked.
"""

from __future__ import annotations

import csv
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS
from diffship.core.lines import lines_of
from diffship.core.sniff import ARCHIVE_SUFFIXES
from diffship.training.diffusion import caption_variants

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp")
LEGAL = (
    "legal: pictures with metadata.jsonl or metadata.csv (file_name, text), NAME.txt beside NAME.png, .jpg or .webp, "
    "or webdataset .tar shards"
)
MOST_LEFT = 0.1  # the share of pictures that may be left before the whole is refused; one of them always may
_UNREAD = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".ico", ".ppm", ".psd", ".svg", ".tga")
_TABLES = ("metadata.jsonl", "metadata.csv")
_SHARD = ".tar"
_BLOCK = 512  # bytes of a header in a tar archive, and of the zeros that end it
_SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
_NO_CAPTIONS = ("readme", "license", "licence", "notice", "copying")  # .txt files that belong to no picture
_CAPTION_BYTES = 64 << 10
_LINE_BYTES = 1 << 20
_COUNT = 20_000_000
_EMOJI_KEYS = {"style", "split", "domain", "tags"}
_KEYS = ("text", "caption")


@dataclass(frozen=True)
class Sample:
    """One picture: `count` bytes at `offset` of `file`; `name` is what messages call it."""

    name: str
    captions: tuple[str, ...]
    file: Path
    offset: int
    count: int

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.count)


@dataclass
class Left:
    """What is not used: counts by reason; those of `lost` are pictures and captions that someone meant to be used."""

    lost: Counter[str] = field(default_factory=Counter)
    chosen: Counter[str] = field(default_factory=Counter)

    def text(self, used: int) -> str:
        """How many pictures were found and used, and why the others are left."""
        reasons = [f"{count} {reason}" for counts in (self.lost, self.chosen) for reason, count in counts.items()]
        return f"{used} pictures are used{'; left: ' if reasons else ''}{', '.join(reasons)}"


def gathered(folder: Path) -> tuple[list[Sample], Left]:
    """The captioned pictures of `folder`, and what is left of it.

    Raises:
        SourceError: there are none, some have no caption, more than one and more than MOST_LEFT are left, or a file
            cannot be read.
    """
    left = Left()
    files = list(_visible(folder, left))
    shards = [path for path in files if path.suffix.lower() == _SHARD]
    archives = [path for path in files if path not in shards and path.suffix.lower() in ARCHIVE_SUFFIXES]
    tables = [folder / name for name in _TABLES if (folder / name).is_file()]
    if tables:
        found = list(_listed(folder, tables[0], files, left))
        left.chosen.update({f"files beside {tables[0].name}, which alone is read": len(tables) - 1 + len(shards)})
    elif shards:
        _refuse_packed(archives)
        found = [sample for shard in shards for sample in _sharded(shard, left)]
        beside = sum(path.suffix.lower() in SUFFIXES for path in files)
        left.lost.update({"pictures beside shards, which alone are read": beside})
    else:
        found = list(_beside(files, left))
    left.chosen["archives, which are not read"] += len(archives)
    for counts in (left.lost, left.chosen):
        for reason in [reason for reason, count in counts.items() if not count]:
            del counts[reason]
    _require(folder, found, left)
    return found, left


def _require(folder: Path, found: Sequence[Sample], left: Left) -> None:
    lost = sum(left.lost.values())
    if not found and not lost:
        raise SourceError(f"{folder} has no pictures with captions; {LEGAL}")
    silent = [sample.name for sample in found if not any(sample.captions)]
    if silent:
        raise SourceError(
            f"{folder}: {len(silent)} of {len(found)} pictures have no caption, first {silent[0]}; {LEGAL}"
        )
    if not found or lost > max(1.0, MOST_LEFT * (len(found) + lost)):
        raise SourceError(
            f"{folder}: {left.text(len(found))}. At most a tenth may be left: convert or remove them; {LEGAL}"
        )


def _refuse_packed(archives: Sequence[Path]) -> None:
    """Beside shards a packed archive is one more of them, of who knows how many pictures."""
    for path in archives:
        if _SHARD in (suffix.lower() for suffix in path.suffixes[-2:]) or path.suffix.lower() == ".tgz":
            raise SourceError(f"{path}: is packed; shards are read where they lie. Unpack it to {_SHARD}, or remove it")


def _listed(folder: Path, table: Path, files: Iterable[Path], left: Left) -> Iterator[Sample]:
    """Pictures that metadata.jsonl or metadata.csv names; of `emoji`'s data those that its U-Net is trained on."""
    named = set()
    for number, record in _records(table):
        name = record.get("file_name")
        if not isinstance(name, str) or not _inside(name):
            raise SourceError(f"{table}: line {number}: file_name is {str(name)[:80]!r}; legal is a path in the folder")
        named.add((folder / name).absolute())
        if not record.keys() >= _EMOJI_KEYS:
            yield _of_file(folder / name, _captions(record, f"{table}: line {number}"))
        elif record["style"] == "fluent" and record["split"] == "train" and record["domain"]:
            text = "".join(_captions(record, f"{table}: line {number}")[:1])
            yield _of_file(folder / name, caption_variants(text, [str(tag) for tag in record["tags"]]))
        else:
            left.chosen["of another style, split or domain"] += 1
    others = (path for path in files if path.suffix.lower() in SUFFIXES)
    left.chosen[f"that {table.name} does not name"] += sum(path.absolute() not in named for path in others)


def _records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, record); empty lines, and the mark that spreadsheets put before the first one, are nothing."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                yield from _rows(table, file)
                return
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), ""), 1):
                if line.strip():
                    yield number, _json(line, f"{table}: line {number}")
    except UnicodeDecodeError as fault:
        raise SourceError(f"{table}: cannot be read: {str(fault)[:120]}") from None


def _rows(table: Path, file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows that have as many fields as the first one: a comma or quote that is not written as CSV wants it is told."""
    reader = csv.reader(file, strict=True)
    how = 'a caption with commas or quotes is written "in quotes, and ""its own"" are doubled"'
    try:
        head = next((row for row in reader if row), [])
        _require_columns(table, head)
        for row in reader:
            if row and len(row) != len(head):
                raise SourceError(
                    f"{table}: line {reader.line_num}: has {len(row)} fields for the {len(head)} columns "
                    f"{', '.join(head)[:80]}; {how}"
                )
            if row:
                yield reader.line_num, dict(zip(head, row, strict=True))
    except csv.Error as fault:
        raise SourceError(f"{table}: line {reader.line_num}: {str(fault)[:120]}; {how}") from None


def _require_columns(table: Path, head: Sequence[str]) -> None:
    """Raises SourceError unless the first row has the names that are read, each once."""
    if head and ("file_name" not in head or not set(_KEYS) & set(head)):
        raise SourceError(
            f"{table}: its columns are {', '.join(map(repr, head))[:200]}; legal are file_name and text, with commas "
            "between them, as they are written here"
        )
    if len(set(head)) != len(head):
        raise SourceError(f"{table}: two of its columns have one name: {', '.join(head)[:200]}")


def _json(text: str | bytes, where: str) -> Mapping[str, Any]:
    try:
        if len(text) > _LINE_BYTES:
            raise ValueError(f"it has more than {_LINE_BYTES} bytes")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("it is no table")
    except (ValueError, RecursionError) as fault:
        raise SourceError(f"{where} is not JSON: {str(fault)[:120]}") from None
    return record


def _inside(name: str) -> bool:
    paths = PurePosixPath(name), PureWindowsPath(name)
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths) and "\0" not in name


def _captions(record: Mapping[str, Any], where: str) -> list[str]:
    """Those under the first of _KEYS that has any: one, or a list of which each is one way to describe the picture."""
    for key in _KEYS:
        value = record.get(key)
        given = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        if not all(isinstance(text, str) for text in given):
            raise SourceError(f"{where}: {key} is a list of {str(given)[:80]}; legal is text, or a list of texts")
        cut = [text for text in map(_cut, given) if text]
        if cut:
            return cut
    return [""]


def _cut(caption: str) -> str:
    # far more than the 77 tokens that a text encoder sees
    return " ".join(caption.split())[: LIMITS.prompt_chars]


def _of_file(path: Path, captions: Iterable[str]) -> Sample:
    try:
        there = path.is_file()
    except OSError as fault:  # a name that is longer than the file system's
        raise SourceError(f"{str(path)[:200]}: {fault.strerror}") from None
    if not there:
        raise SourceError(f"{path}: there is no such picture")
    return Sample(str(path), tuple(captions), path, 0, path.stat().st_size)


def _beside(files: Sequence[Path], left: Left) -> Iterator[Sample]:
    """The pictures among `files`, with captions in the text file of the same name, one a line."""
    described = {path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES}
    for path in files:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            yield _of_file(path, _text_beside(path.with_suffix(".txt")))
        elif suffix in _UNREAD:
            left.lost[f"{suffix} files, which are not read"] += 1
            described.add(path.with_suffix(""))
    for path in files:
        if path.suffix == ".txt" and path.with_suffix("") not in described and not _is_notice(path.name):
            left.lost["captions without a picture"] += 1


def _text_beside(text: Path) -> list[str]:
    if not text.is_file():
        return [""]
    if text.stat().st_size > _CAPTION_BYTES:
        raise SourceError(f"{text}: has {text.stat().st_size} bytes; a caption has at most {_CAPTION_BYTES}")
    return _lines(_text(text.read_bytes(), str(text)))


def _lines(text: str) -> list[str]:
    """The captions of a text, one a line, as sd-scripts has them."""
    return [line for line in map(_cut, lines_of(text)) if line] or [""]


def _is_notice(name: str) -> bool:
    return name.lower().startswith(_NO_CAPTIONS)


def _visible(folder: Path, left: Left) -> Iterator[Path]:
    """Files below `folder`, links followed; what systems and editors leave there, and what is no file though it is
    called like a picture, is counted and passed over."""
    for path in sorted(_below(folder, left)):
        if any(map(_hidden, path.relative_to(folder).parts)):
            left.chosen["hidden or system files"] += 1
        elif _is_file(path):
            yield path
        elif path.suffix.lower() in (*SUFFIXES, *_UNREAD, _SHARD):
            left.lost["links that lead nowhere, or no plain files"] += 1


def _below(folder: Path, left: Left) -> Iterator[Path]:
    """All that is in a folder and the folders in it, each folder once, by however many links it is reached."""
    seen = set()
    for above, folders, names in os.walk(folder, followlinks=True, onerror=_unread):
        status = os.stat(above)
        if (status.st_dev, status.st_ino) in seen:
            left.chosen["folders that are read under another name"] += 1
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(above, name) for name in names)


def _unread(fault: OSError) -> None:
    raise SourceError(f"{fault.filename}: cannot be read: {fault.strerror}") from None


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # it leads nowhere, or in a circle
        return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _text(raw: bytes, where: str) -> str:
    """The text of a UTF-8 file, without the byte-order mark that some editors put first. Raises SourceError if it is
    none."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise SourceError(f"{where}: its caption is not UTF-8: {fault.reason} at byte {fault.start}") from None


def _sharded(shard: Path, left: Left) -> Iterator[Sample]:
    """Samples of a webdataset shard: members that share a name up to its last dot."""
    pictures: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, list[str]] = {}
    unread = set()
    for key, suffix, member in _members(shard, left):
        if suffix in SUFFIXES:
            if key in pictures:
                raise SourceError(f"{shard}: has two pictures called {key[:80]!r}")
            pictures[key] = member
        elif suffix in _UNREAD:
            left.lost[f"{suffix} files, which are not read"] += 1
            unread.add(key)
        elif suffix in (".txt", ".json") and not _is_notice(PurePosixPath(member.name).name):
            texts[key] = _member_captions(shard, key, suffix, member, texts.get(key, [""]))
    left.lost["captions without a picture"] += len(texts.keys() - pictures.keys() - unread)
    for key, member in pictures.items():
        captions = tuple(texts.get(key, [""]))
        yield Sample(f"{shard}: {key[:80]}", captions, shard, member.offset_data, member.size)


def _member_captions(shard: Path, key: str, suffix: str, member: tarfile.TarInfo, held: list[str]) -> list[str]:
    """Captions of one member, beside those that the picture has: a .txt wins over the .json, whichever comes first."""
    raw, where = _member_text(shard, member, key), f"{shard}: {key}"
    if suffix == ".txt":
        found = _lines(_text(raw, where))
        return found if any(found) else held
    return held if any(held) else _captions(_json(raw, where), where)


def _members(shard: Path, left: Left) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix, member) of the regular files of an uncompressed tar."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for number, member in enumerate(tar):
                if number > _COUNT:
                    raise SourceError(f"{shard}: has more than {_COUNT} members")
                path = PurePosixPath(member.name)
                if any(_hidden(part) for part in path.parts if part not in (".", "..")):
                    left.chosen["hidden or system files"] += 1
                    continue
                if member.issparse() or member.islnk() or member.issym():
                    raise SourceError(
                        f"{shard}: {member.name[:80]!r} is a link or a sparse file; legal are plain files"
                    )
                if member.isreg():
                    yield str(path.with_suffix("")), path.suffix.lower(), member
            _require_end(shard, tar.offset)
    except tarfile.TarError as fault:
        raise SourceError(f"{shard}: is no uncompressed tar archive: {str(fault)[:120]}") from None


def _require_end(shard: Path, at: int) -> None:
    """Raises SourceError unless the archive ends at byte `at` as one does, with zeros alone: tarfile stops without a
    word at a header that is damaged or cut, and at the end of the first of several archives in one file."""
    with open(shard, "rb") as file:
        file.seek(at)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise SourceError(f"{shard}: is damaged or cut short at byte {at}; make it or get it again")
        while rest := file.read(_LINE_BYTES):
            if rest.strip(b"\0"):
                raise SourceError(
                    f"{shard}: something follows its end at byte {at}, as where archives are joined by cat; keep them "
                    "apart, or join them by tar --concatenate"
                )


def _member_text(shard: Path, member: tarfile.TarInfo, key: str) -> bytes:
    if member.size > _CAPTION_BYTES:
        raise SourceError(
            f"{shard}: {key[:80]}: its caption has {member.size} bytes; at most {_CAPTION_BYTES} are read"
        )
    return Sample(key, (), shard, member.offset_data, member.size).read()
