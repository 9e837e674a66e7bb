"""Safetensors files, read as if an enemy wrote them and written without holding more than one tensor.

The format (github.com/huggingface/safetensors): u64 little-endian header length, JSON header, then the tensors' bytes,
contiguous, in the order of their offsets, up to the end of the file.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from diffship.core.atomic import replacing
from diffship.core.brief import brief
from diffship.core.dtype import CODES, NAMES, TensorMeta, as_bytes, stored
from diffship.core.errors import ConfigError, SourceError
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS
from diffship.core.sniff import foreign

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

_ALIGN = 8


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` bytes from the start of the file."""

    meta: TensorMeta
    offset: int


@brief
@dataclass(frozen=True)
class Header:
    """A checked header; `entries` keeps the order of the offsets."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    identity: tuple[int, ...] = ()  # of the file when its header was read: device, inode, size, time of change


class _Refused(Exception):
    pass


def read_header(path: str | Path) -> Header:
    """The header, after every claim in it was checked against the real file; nothing is allocated on its word.

    Raises:
        SourceError: naming the file and the reason.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            raw = _read_raw_header(file, size, path)
            entries, metadata = _check(_parse(raw), 8 + len(raw), size)
    except _Refused as reason:
        raise SourceError(f"{path}: not a valid safetensors file: {reason}") from None
    except OSError as fault:
        raise SourceError(f"{path}: cannot be read: {foreign(path, fault.strerror or str(fault))}") from None
    return Header(path, entries, metadata, _identity(status))


def read_tensor(header: Header, name: str) -> NDArray[np.generic]:
    """One tensor, in the storage type of its meta (raw bits for bfloat16 and float8).

    Raises:
        SourceError: no such tensor, or the file was changed or replaced since its header was read.
    """
    entry = header.entries.get(name)
    if entry is None:
        raise SourceError(f"{header.path}: there is no tensor {name!r}")
    array = np.empty(entry.meta.shape, entry.meta.storage)
    try:
        with open_regular(header.path) as file:
            if _changed(file, header):
                raise SourceError(f"{header.path}: was changed since it was opened; start again")
            file.seek(entry.offset)
            read_into(file, array, header.path)
            if _changed(file, header):
                raise SourceError(f"{header.path}: was changed while it was read; start again")
    except OSError as fault:
        raise SourceError(f"{header.path}: cannot be read: {fault.strerror or fault}") from None
    return array


def write_safetensors(
    path: str | Path,
    metas: Mapping[str, TensorMeta],
    read: Callable[[str], NDArray[np.generic]],
    metadata: Mapping[str, str] | None = None,
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Write the header from `metas`, then each `read(name)` in turn; the file appears whole or not at all.

    Raises:
        ConfigError: a tensor is not what its meta says.
    """
    # widest types first, as safetensors itself writes, so that every tensor stays aligned
    names = sorted(metas, key=lambda name: (-metas[name].storage.itemsize, name))
    with replacing(path) as file:
        file.write(_encode_header(names, metas, metadata or {}))
        for name in names:
            try:
                array = stored(read(name), metas[name])
            except ConfigError as fault:
                raise ConfigError(f"tensor {name}: {fault}") from None
            file.write(as_bytes(array))
            if on_tensor is not None:
                on_tensor(name)


def _changed(file: IO[bytes], header: Header) -> bool:
    """Whether size or time of change are others than when the header was read. Inodes have no say here: some network
    file systems give a file another one each time it is opened."""
    return _identity(os.fstat(file.fileno()))[2:] != header.identity[2:]


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_regular(path: Path) -> IO[bytes]:
    """A file opened for reading without a buffer. Raises SourceError for anything but a regular file."""
    # O_NONBLOCK: opening a FIFO must not hang. Links are followed: a hub cache consists of them.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_into(file: IO[bytes], array: NDArray[np.generic], path: Path) -> None:
    """Fill `array` with the next bytes of `file`. Raises SourceError if it ends before."""
    view = as_bytes(array)
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not count:
            raise SourceError(f"{path}: was cut short while it was read")
        done += count


def _read_raw_header(file: IO[bytes], size: int, path: Path) -> bytes:
    head = file.read(8)
    if len(head) < 8:
        raise _Refused(foreign(path, f"it has {size} bytes, a header length alone takes 8"))
    (length,) = struct.unpack("<Q", head[:8])
    if length > min(LIMITS.safetensors_header_bytes, size - 8):
        limit = LIMITS.safetensors_header_bytes
        claim = f"its header claims {length} bytes; the file has {size - 8} after it, the limit is {limit}"
        raise _Refused(foreign(path, claim))
    raw = bytearray(length)
    if file.readinto(raw) != length:  # type: ignore[attr-defined]
        raise _Refused("it was cut short while it was read")
    if not raw.startswith(b"{"):
        raise _Refused(foreign(path, "its header does not start with '{'"))
    return bytes(raw)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_refuse_constant,
        )
    except (ValueError, RecursionError) as fault:
        raise _Refused(f"its header is not JSON ({str(fault)[:80]})") from None
    if len(header) > LIMITS.tensors:
        raise _Refused(f"it claims {len(header)} tensors; the limit is {LIMITS.tensors}")
    return dict(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {twice[:80]!a} stands twice in its header")
    return table


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(f"its header holds {text[:20]!r} where only whole numbers are legal")


def _check(table: dict[str, Any], start: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused("its __metadata__ is not a table of strings")
    spans = sorted((_span(name, claim), name) for name, claim in table.items())
    entries: dict[str, Entry] = {}
    end = 0
    for (begin, stop, dtype, shape), name in spans:
        if begin != end:
            what = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise _Refused(f"tensor {name[:80]!a} at bytes {begin}..{stop} {what}")
        entries[name] = Entry(TensorMeta(dtype, shape), start + begin)
        end = stop
    if start + end != size:
        raise _Refused(
            f"its tensors take {end} bytes, the file holds {size - start} (cut short, or something is appended)"
        )
    return entries, metadata


def _span(name: str, claim: object) -> tuple[int, int, str, tuple[int, ...]]:
    label = f"tensor {name[:80]!a}"
    if not name or len(name) > LIMITS.tensor_name_chars or "\0" in name:
        raise _Refused(f"{label} has a name that is empty, too long, or holds NUL")
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"{label} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NAMES:
        raise _Refused(f"{label} has the unknown dtype {str(dtype)[:20]!a}")
    if not _whole(shape) or len(shape) > LIMITS.tensor_rank or not _whole(offsets) or len(offsets) != 2:
        raise _Refused(f"{label} has a shape or offsets that are not short lists of whole numbers")
    begin, stop = offsets
    meta = TensorMeta(NAMES[dtype], tuple(shape))
    if stop - begin != meta.nbytes:
        raise _Refused(f"{label} spans {stop - begin} bytes; {dtype} {list(shape)} takes {meta.nbytes}"[:300])
    return begin, stop, meta.dtype, meta.shape


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _encode_header(names: Iterable[str], metas: Mapping[str, TensorMeta], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        meta = metas[name]
        begin, end = end, end + meta.nbytes
        table[name] = {"dtype": CODES[meta.dtype], "shape": list(meta.shape), "data_offsets": [begin, end]}
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGN)
    if len(raw) > LIMITS.safetensors_header_bytes:
        raise ConfigError(f"the header takes {len(raw)} bytes; the limit is {LIMITS.safetensors_header_bytes}")
    return struct.pack("<Q", len(raw)) + raw
