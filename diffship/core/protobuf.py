"""Protobuf's wire format, read field by field and written again; enough for ONNX files without the onnx package.

Numbers are field numbers of a message; wire types are those of the protobuf encoding (protobuf.dev/programming-guides/
encoding). A field that is not understood is carried over byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffship.core.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_CUT_OFF = "it is cut off, or no protobuf"

Field = tuple[int, int, "int | memoryview"]  # number, wire type, value


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of one message in order. Raises BundleError where the bytes end too early."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        length = _FIXED.get(wire, 0)
        if wire == BYTES:
            length, position = _varint(data, position)
        if wire not in (BYTES, *_FIXED) or length > end - position:
            raise BundleError(_CUT_OFF)
        yield number, wire, data[position : position + length]
        position += length


def message(value: int | memoryview) -> memoryview:
    """The bytes of a field that holds a message or a string; raises BundleError where it holds a number."""
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
        entry, position = _varint(value, position)
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


def _varint(data: Sequence[int], position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BundleError(_CUT_OFF)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
