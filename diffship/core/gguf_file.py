"""GGUF files, read as if an enemy wrote them: plain floats, and the blocks Q8_0 and Q4_0 as the float32 they stand for.

The format (github.com/ggml-org/ggml, docs/gguf.md), all little-endian: "GGUF", u32 version, u64 tensors, u64 notes;
the notes as (name, type, value); per tensor its name, u32 rank, u64 sides (the innermost first), u32 type, u64 offset;
then, from the next multiple of the alignment on, the tensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from diffship.core.described import Described, find
from diffship.core.dtype import TensorMeta
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS
from diffship.core.safetensors_file import open_regular, read_into
from diffship.core.sniff import foreign

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_BLOCK = 32  # values of one block
_ALIGNMENT, _ALIGN_KEY, _SHAPE_KEY = 32, "general.alignment", "comfy.gguf.orig_shape."
_STRING, _LIST = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_NOTES, _DEPTH = 100_000, 4


@dataclass(frozen=True)
class Layout:
    """How a type lies in a file: `block_bytes` bytes stand for `values` values, which a tensor of `dtype` holds."""

    name: str
    block_bytes: int
    values: int
    dtype: str


LAYOUTS = {
    0: Layout("F32", 4, 1, "float32"),
    1: Layout("F16", 2, 1, "float16"),
    2: Layout("Q4_0", 2 + _BLOCK // 2, _BLOCK, "float32"),
    8: Layout("Q8_0", 2 + _BLOCK, _BLOCK, "float32"),
    28: Layout("F64", 8, 1, "float64"),
    30: Layout("BF16", 2, 1, "bfloat16"),
}
# of which the message for another type says the name
_OTHERS = (
    {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 20: "IQ4_NL", 23: "IQ4_XS"}
    | dict(enumerate(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 10))
)  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    layout: Layout
    offset: int  # from the start of the file
    nbytes: int


class GgufWeights(Described):
    """The tensors of one GGUF file. The header is checked now; tensors are read, and made floats of, one by one.

    Raises SourceError for a damaged file, UnsupportedError for blocks that are not read, which the message names.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                header = _Header(file, self._path, status.st_size)
                metas, self._entries = _tensors(header)
        except OSError as fault:
            raise SourceError(f"{path}: cannot be read: {foreign(path, fault.strerror or str(fault))}") from None
        self._state = (status.st_size, status.st_mtime_ns)
        super().__init__(metas)

    def read(self, name: str) -> NDArray[np.generic]:
        entry, meta = find(self._entries, name), self.meta(name)
        raw = np.empty(entry.nbytes, np.uint8)
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != self._state:
                    raise SourceError(f"{self._path}: was changed since it was opened; start again")
                file.seek(entry.offset)
                read_into(file, raw, self._path)
        except OSError as fault:
            raise SourceError(f"{self._path}: cannot be read: {fault.strerror or fault}") from None
        if entry.layout.values == 1:
            return raw.view(meta.storage).reshape(meta.shape)
        return _dequantised(entry.layout, raw).reshape(meta.shape)


def is_gguf(path: Path) -> bool:
    """Whether the first bytes of a file say that it is GGUF."""
    try:
        with open_regular(path) as file:
            return file.read(4) == _MAGIC
    except (OSError, SourceError):
        return False


def _dequantised(layout: Layout, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of whole blocks: a float16 scale, then bytes, or pairs of half bytes, of which the low ones come
    first."""
    blocks = raw.reshape(-1, layout.block_bytes)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    packed = blocks[:, 2:]
    if layout.name == "Q8_0":
        return scales * packed.view(np.int8).astype(np.float32)
    halves = np.concatenate([packed & 15, packed >> 4], axis=1)
    return scales * (halves.astype(np.float32) - 8.0)


class _Header:
    """The header of a file, read piece by piece; no claim in it reads further than the file or the limit goes."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self._file, self.path, self.size = file, path, size
        self.place = 0
        self._limit = min(size, LIMITS.safetensors_header_bytes)
        self._ahead = file.read(self._limit)
        if self.bytes(4) != _MAGIC:
            raise self.refused(foreign(path, "it does not begin with GGUF"))
        version = self.number("I")
        if version not in _VERSIONS:
            raise self.refused(f"it has version {version}; legal: 2, 3, little-endian")

    def refused(self, reason: str) -> SourceError:
        return SourceError(f"{self.path}: not a valid GGUF file: {reason}")

    def bytes(self, count: int) -> bytes:
        if count > len(self._ahead) - self.place:
            raise self.refused(
                f"its header goes on for {count} bytes at {self.place}, where {len(self._ahead) - self.place} are left "
                f"(cut short, or over the limit of {LIMITS.safetensors_header_bytes})"
            )
        self.place += count
        return self._ahead[self.place - count : self.place]

    def number(self, code: str) -> int:
        form = struct.Struct(f"<{code}")
        value: int = form.unpack(self.bytes(form.size))[0]
        return value

    def text(self, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.refused(f"a name or note has {length} bytes; the limit is {limit}")
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> object:
        """The value of a note: a number, a text, or a list of them."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text(LIMITS.safetensors_header_bytes)
        if kind != _LIST or depth >= _DEPTH:
            raise self.refused(f"a note is of the unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        self._require(length, struct.calcsize(_NUMBERS.get(inner, "Q")))
        return [self.value(inner, depth + 1) for _ in range(length)]

    def _require(self, count: int, least: int) -> None:
        if count * least > len(self._ahead) - self.place:
            raise self.refused(f"a list claims {count} entries, for which no bytes are left")


def _tensors(header: _Header) -> tuple[dict[str, TensorMeta], dict[str, _Entry]]:
    count, notes = header.number("Q"), _counted(header, _MOST_NOTES, "notes")
    if count > LIMITS.tensors:
        raise header.refused(f"it claims {count} tensors; the limit is {LIMITS.tensors}")
    told = dict(_notes(header, notes))
    alignment = told.get(_ALIGN_KEY, _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise header.refused(f"{_ALIGN_KEY} is {str(alignment)[:40]}")
    claims = [_claim(header) for _ in range(count)]
    start = -(-header.place // alignment) * alignment
    metas: dict[str, TensorMeta] = {}
    entries: dict[str, _Entry] = {}
    for name, shape, layout, offset in claims:
        nbytes = math.prod(shape) // layout.values * layout.block_bytes
        if name in metas or start + offset + nbytes > header.size:
            why = (
                "stands twice" if name in metas else f"ends {start + offset + nbytes - header.size} bytes past the file"
            )
            raise header.refused(f"tensor {name[:80]!a} {why}")
        metas[name] = TensorMeta(layout.dtype, _own_shape(header, told, name, shape))
        entries[name] = _Entry(layout, start + offset, nbytes)
    return metas, entries


def _counted(header: _Header, limit: int, what: str) -> int:
    count = header.number("Q")
    if count > limit:
        raise header.refused(f"it claims {count} {what}; the limit is {limit}")
    return count


def _notes(header: _Header, count: int) -> Iterator[tuple[str, object]]:
    for _ in range(count):
        name = header.text(LIMITS.tensor_name_chars)
        yield name, header.value(header.number("I"))


def _claim(header: _Header) -> tuple[str, tuple[int, ...], Layout, int]:
    name, rank = header.text(LIMITS.tensor_name_chars), header.number("I")
    if not name or rank > LIMITS.tensor_rank:
        raise header.refused(f"tensor {name[:80]!a} has {rank} axes; the limit is {LIMITS.tensor_rank}")
    shape = tuple(header.number("Q") for _ in range(rank))[::-1]
    kind, offset = header.number("I"), header.number("Q")
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise UnsupportedError(
            f"{header.path}: tensor {name[:80]!a} is of {_OTHERS.get(kind, f'type {kind}')}, which is not read; "
            f"legal: {', '.join(one.name for one in LAYOUTS.values())}"
        )
    if math.prod(shape) > header.size * 2 or (shape and shape[-1] % layout.values):
        raise header.refused(f"tensor {name[:80]!a} of shape {list(shape)} is no whole number of {layout.name} blocks")
    return name, shape, layout, offset


def _own_shape(header: _Header, told: Mapping[str, object], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor had before it was made a matrix of, if a note says it."""
    found = told.get(f"{_SHAPE_KEY}{name}")
    if found is None:
        return shape
    if not isinstance(found, list) or not all(isinstance(side, int) and side >= 0 for side in found):
        raise header.refused(f"{_SHAPE_KEY}{name[:80]} is no shape")
    if math.prod(found) != math.prod(shape):
        raise header.refused(f"{_SHAPE_KEY}{name[:80]} says {found}, and the tensor has the shape {list(shape)}")
    return tuple(found)
