"""Protobuf's wire format, read field by field and written again; enough for ONNX files without the onnx package.

Numbers are field numbers of a message; wire types are those of the protobuf encoding (protobuf.dev/programming-guides/
encoding). A field that is not understood is carried over byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from diffship.core.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}

Field = tuple[int, int, "int | memoryview"]  # number, wire type, value


class Octets(Protocol):
    """Bytes by position: `bytes`, a memoryview or a mapped file."""

    def __getitem__(self, index: int, /) -> int: ...


class Span(NamedTuple):
    """Where one field lies: its content is the bytes from `start` to before `stop`; `value` is a varint's, or 0."""

    number: int
    wire: int
    start: int
    stop: int
    value: int


def spans(data: Octets, start: int, stop: int) -> Iterator[Span]:
    """The fields of the message at `start` to before `stop`, in order; contents are stepped over, not read.

    Raises:
        BundleError: the bytes end too early, or are no protobuf.
    """
    while start < stop:
        key, start = _varint(data, start, stop)
        number, wire = key >> 3, key & 7
        value, end = 0, start
        if wire == VARINT:
            value, end = _varint(data, start, stop)
        elif wire == BYTES:
            length, start = _varint(data, start, stop)
            end = start + length
        elif wire in _FIXED:
            end = start + _FIXED[wire]
        else:
            raise BundleError(f"wire type {wire} at byte {start} is not legal: it is cut off, or no protobuf")
        if number == 0 or end > stop:
            raise BundleError(f"the field at byte {start} reaches over the end of its message, or has no number")
        yield Span(number, wire, start, end, value)
        start = end


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of one message in order. Raises BundleError as `spans` does."""
    for number, wire, start, stop, value in spans(data, 0, len(data)):
        yield number, wire, value if wire == VARINT else data[start:stop]


def message(value: int | memoryview) -> memoryview:
    """The bytes of a field that holds a message or a string; raises BundleError if it holds a number."""
    if isinstance(value, int):
        raise BundleError("a message was expected, not a number")
    return value


def string(value: int | memoryview) -> str:
    """A field that holds UTF-8 text."""
    return str(message(value), "utf-8")


def first_text(data: memoryview, wanted: int) -> str:
    """The first text under the number `wanted` of a message, or an empty one."""
    return next((string(value) for number, _, value in fields(data) if number == wanted), "")


def numbers(value: int | memoryview) -> list[int]:
    """A repeated integer field, packed or not."""
    if isinstance(value, int):
        return [value]
    found, position = [], 0
    while position < len(value):
        entry, position = _varint(value, position, len(value))
        found.append(entry)
    return found


def signed(value: int) -> int:
    """A varint read as int64."""
    return value - (1 << 64) if value >> 63 else value


def encode_field(number: int, wire: int, value: int | memoryview) -> bytes:
    """A field as `fields` gave it."""
    if isinstance(value, int):
        return encode_number(number, value)
    if wire == BYTES:
        return encode_block(number, value)
    return _encoded(number << 3 | wire) + bytes(value)


def encode_number(number: int, value: int) -> bytes:
    """An integer field; negative values as int64."""
    return _encoded(number << 3 | VARINT) + _encoded(value & (1 << 64) - 1)


def encode_text(number: int, text: str) -> bytes:
    """A string field."""
    return encode_block(number, text.encode())


def encode_block(number: int, data: bytes | memoryview) -> bytes:
    """A field of bytes: a message, a string or raw data."""
    return b"".join([_encoded(number << 3 | BYTES), _encoded(len(data)), data])


def _varint(data: Octets, start: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if start >= stop:
            break
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise BundleError(f"the number that ends at byte {start} is cut off or too long, or this is no protobuf")


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
