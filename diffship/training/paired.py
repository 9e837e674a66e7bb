"""Pictures with captions, read from what people have: an image folder, webdataset shards, or `emoji`'s own data.

Whatever the source, a picture is a stretch of bytes in a file, read and decoded when it is asked for. Names inside
archives only pair a picture with its caption: they are never used as paths, and nothing is unpacked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS
from diffship.sampling.picture import eight_bits
from diffship.training.diffusion import caption_variants

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LEGAL = (
    "legal: pictures with metadata.jsonl or metadata.csv (file_name, text), NAME.txt beside NAME.png, .jpg or .webp, "
    "or webdataset .tar shards"
)
_FORMATS = ("PNG", "JPEG", "WEBP")
_PICTURE_BYTES = 64 << 20
_CAPTION_BYTES = 64 << 10
_LINE_BYTES = 1 << 20
_COUNT = 20_000_000
_EMOJI_KEYS = {"style", "split", "domain", "tags"}


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


@dataclass(frozen=True)
class PairedPictures:
    """Captioned pictures, cropped to `size` x `size` when they are read."""

    size: int
    samples: tuple[Sample, ...] = field(repr=False)
    digest: str

    @classmethod
    def open(cls, folder: str | Path, size: int) -> PairedPictures:
        """The pictures of `folder`. Every file is read once: headers are checked, `digest` is the sha256 (hex) over
        pictures and captions in their order. Pixels are decoded later.

        Of the folder that `diffship train emoji-data` writes, the training pictures of the stated domain are taken.

        Raises:
            SourceError: no folder, no pictures, pictures without captions, damaged or too large files; the first one
                is named.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise SourceError(f"{folder} is not a folder of pictures with captions; {LEGAL}")
        samples, total = tuple(_samples(folder)), hashlib.sha256()
        for sample in samples:
            line = [hashlib.sha256(_checked(sample)).hexdigest(), *sample.captions]
            total.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        return cls(size, samples, total.hexdigest())

    def __len__(self) -> int:
        return len(self.samples)

    def captions(self, row: int) -> list[str]:
        """Ways to describe a picture, the plain caption first."""
        return list(self.samples[row].captions)

    def pixels(self, rows: Sequence[int], flips: Sequence[bool] | None = None) -> NDArray[np.uint8]:
        """(n, size, size, 3) uint8 RGB: the short side scaled to `size`, the middle cut out, mirrored where `flips`.

        Raises:
            SourceError: a picture is damaged; it is named.
        """
        made = np.stack([self._decoded(self.samples[row]) for row in rows])
        if flips is not None:
            made[list(flips)] = made[list(flips)][:, :, ::-1]
        return made

    def _decoded(self, sample: Sample) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(sample.read()), formats=_FORMATS) as image:
                square = ImageOps.fit(_flat(image), (self.size, self.size), Image.Resampling.LANCZOS)
        except Exception as fault:  # Pillow's decoders raise many kinds
            raise SourceError(f"{sample.name}: is damaged: {str(fault)[:120]}") from None
        return np.asarray(square, np.uint8)


def _flat(image: Image.Image) -> Image.Image:
    """Upright RGB; what is transparent lies on white."""
    upright = eight_bits(ImageOps.exif_transpose(image))
    if "A" not in upright.getbands() and "transparency" not in upright.info:
        return upright.convert("RGB")
    layered = upright.convert("RGBA")
    ground = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(ground, layered).convert("RGB")


def _checked(sample: Sample) -> bytes:
    """The bytes of a picture whose header is legal; no pixel is decoded. Raises SourceError, naming it, otherwise."""
    if sample.count > _PICTURE_BYTES:
        raise SourceError(f"{sample.name}: has {sample.count} bytes; at most {_PICTURE_BYTES} are read")
    data = sample.read()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as fault:  # Pillow's decoders raise many kinds
        raise SourceError(f"{sample.name}: is no PNG, JPEG or WebP picture: {str(fault)[:120]}") from None
    if width * height > LIMITS.decoded_pixels:
        raise SourceError(f"{sample.name}: is {width}x{height}; at most {LIMITS.decoded_pixels} pixels are decoded")
    return data


def _samples(folder: Path) -> Iterator[Sample]:
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file())
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if tables:
        found = list(_listed(folder, tables[0]))
    elif shards:
        found = [sample for shard in shards for sample in _sharded(shard)]
    else:
        found = list(_beside(folder))
    if not found:
        raise SourceError(f"{folder} has no pictures with captions; {LEGAL}")
    silent = [sample.name for sample in found if not any(sample.captions)]
    if silent:
        raise SourceError(
            f"{folder}: {len(silent)} of {len(found)} pictures have no caption, first {silent[0]}; {LEGAL}"
        )
    return iter(found)


def _listed(folder: Path, table: Path) -> Iterator[Sample]:
    """Pictures that metadata.jsonl or metadata.csv names; of `emoji`'s data those that its U-Net is trained on."""
    for number, record in _records(table):
        name = record.get("file_name")
        if not isinstance(name, str) or not _inside(name):
            raise SourceError(f"{table}: line {number}: file_name is {str(name)[:80]!r}; legal is a path in the folder")
        if not record.keys() >= _EMOJI_KEYS:
            yield _of_file(folder / name, [_caption(record)])
        elif record["style"] == "fluent" and record["split"] == "train" and record["domain"]:
            yield _of_file(folder / name, caption_variants(_caption(record), [str(tag) for tag in record["tags"]]))


def _records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, record); empty lines, and the mark that spreadsheets put before the first one, are nothing."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, record) for record in reader)
                return
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), ""), 1):
                if line.strip():
                    yield number, _json(line, f"{table}: line {number}")
    except (UnicodeDecodeError, csv.Error) as fault:
        raise SourceError(f"{table}: cannot be read: {str(fault)[:120]}") from None


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


def _caption(record: Mapping[str, Any]) -> str:
    for key in ("text", "caption"):
        if isinstance(record.get(key), str):
            return _cut(record[key])
    return ""


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


def _beside(folder: Path) -> Iterator[Sample]:
    """Pictures anywhere below `folder`, with the caption in the text file of the same name."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        text = path.with_suffix(".txt")
        if text.is_file() and text.stat().st_size > _CAPTION_BYTES:
            raise SourceError(f"{text}: has {text.stat().st_size} bytes; a caption has at most {_CAPTION_BYTES}")
        yield _of_file(path, [_cut(_text(text.read_bytes(), str(text))) if text.is_file() else ""])


def _text(raw: bytes, where: str) -> str:
    """Raises SourceError unless it is UTF-8; the mark that some editors put before it is no part of it."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise SourceError(f"{where}: its caption is not UTF-8: {fault.reason} at byte {fault.start}") from None


def _sharded(shard: Path) -> Iterator[Sample]:
    """Samples of a webdataset shard: members that share a name up to its first dot."""
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    for key, suffix, member in _members(shard):
        if suffix in SUFFIXES:
            if key in pictures:
                raise SourceError(f"{shard}: has two pictures called {key[:80]!r}")
            pictures[key] = member
        elif suffix in (".txt", ".json"):
            text = _member_text(shard, member, key)
            where = f"{shard}: {key}"
            if suffix == ".txt":  # wins over the .json, whichever comes first
                captions[key] = _cut(_text(text, where)) or captions.get(key, "")
            else:
                captions[key] = captions.get(key) or _caption(_json(text, where))
    for key, member in pictures.items():
        caption = captions.get(key, "")
        yield Sample(f"{shard}: {key[:80]}", (caption,), shard, member.offset_data, member.size)


def _members(shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix, member) of the regular files of an uncompressed tar."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for number, member in enumerate(tar):
                if number > _COUNT:
                    raise SourceError(f"{shard}: has more than {_COUNT} members")
                if member.issparse() or member.islnk() or member.issym():
                    raise SourceError(
                        f"{shard}: {member.name[:80]!r} is a link or a sparse file; legal are plain files"
                    )
                if member.isreg():
                    path = PurePosixPath(member.name)
                    stem, _, ending = path.name.partition(".")
                    yield str(path.parent / stem), f".{ending.lower()}", member
    except tarfile.TarError as fault:
        raise SourceError(f"{shard}: is no uncompressed tar archive: {str(fault)[:120]}") from None


def _member_text(shard: Path, member: tarfile.TarInfo, key: str) -> bytes:
    if member.size > _CAPTION_BYTES:
        raise SourceError(
            f"{shard}: {key[:80]}: its caption has {member.size} bytes; at most {_CAPTION_BYTES} are read"
        )
    return Sample(key, (), shard, member.offset_data, member.size).read()
