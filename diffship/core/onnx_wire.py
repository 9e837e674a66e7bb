"""Where an ONNX model keeps its tensors, seen before any ONNX library opens it.

Field numbers are those of onnx.proto3 (github.com/onnx/onnx). Tensor bytes are stepped over, never read.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from diffship.core.errors import BundleError
from diffship.core.limits import LIMITS
from diffship.core.protobuf import BYTES, Span, spans

# message -> field number -> message that the field holds
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_KEYS = ("location", "offset", "length", "checksum")
_TEXT_LIMIT = 4096


class ExternalData(NamedTuple):
    """A tensor that lies outside the model file: `length` bytes (None: to the end) at `offset` of `location`."""

    tensor: str
    location: str
    offset: int
    length: int | None


@dataclass
class _Scan:
    data: mmap.mmap
    messages: int = 0

    def walk(self, kind: str, start: int, stop: int, depth: int) -> Iterator[ExternalData]:
        self.messages += 1
        if self.messages > LIMITS.onnx_messages or depth > LIMITS.onnx_depth * 4:
            raise BundleError(f"more than {LIMITS.onnx_messages} messages, or nested too deeply")
        if kind == "tensor":
            yield from self._tensor(start, stop)
            return
        inside = _INSIDE[kind]
        for field in spans(self.data, start, stop):
            child = inside.get(field.number)
            if child is not None:
                _require_bytes(field)
                yield from self.walk(child, field.start, field.stop, depth + 1)

    def _tensor(self, start: int, stop: int) -> Iterator[ExternalData]:
        name, outside, entries = "", False, list[tuple[str, str]]()
        for field in spans(self.data, start, stop):
            if field.number == 8:
                name = self._text(field)
            elif field.number == 13:
                entries.append(self._entry(field))
            elif field.number == 14:
                outside = field.value == 1
        if outside or entries:
            yield _external(name, entries)

    def _entry(self, field: Span) -> tuple[str, str]:
        _require_bytes(field)
        key, value = "", ""
        for inner in spans(self.data, field.start, field.stop):
            if inner.number == 1:
                key = self._text(inner)
            elif inner.number == 2:
                value = self._text(inner)
        return key, value

    def _text(self, field: Span) -> str:
        _require_bytes(field)
        if field.stop - field.start > _TEXT_LIMIT:
            raise BundleError(f"a name of {field.stop - field.start} bytes is too long")
        try:
            return self.data[field.start : field.stop].decode("utf-8")
        except UnicodeDecodeError:
            raise BundleError(f"the name at byte {field.start} is not UTF-8") from None


def external_data(path: str | Path) -> list[ExternalData]:
    """Every tensor of the model at `path`, nested graphs and functions included, that claims to lie in another file.

    The claims are well-formed (known keys, no duplicates, offset and length not negative), but not checked against any
    file: that is the caller's. Raises BundleError if the file is not a model that this scan understands.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as fault:
        raise BundleError(f"{path}: cannot be read: {fault.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise BundleError("it is empty, or not a regular file")
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
            return list(_Scan(data).walk("model", 0, len(data), 0))
    except BundleError as fault:
        raise BundleError(f"{path}: not a sound ONNX model: {fault}") from None
    finally:
        os.close(descriptor)


def _require_bytes(field: Span) -> None:
    if field.wire != BYTES:
        raise BundleError(f"the field at byte {field.start} has the wrong wire type")


def _external(name: str, entries: list[tuple[str, str]]) -> ExternalData:
    table = dict(entries)
    label = f"tensor {name[:80]!a}"
    if len(table) != len(entries) or not set(table) <= set(_KEYS) or not table.get("location"):
        keys = ", ".join(ascii(key[:40]) for key, _ in entries) or "none"
        raise BundleError(f"{label} has the external data keys {keys}; legal: location once, {', '.join(_KEYS[1:])}")
    offset = _whole(label, "offset", table.get("offset", "0"))
    length = _whole(label, "length", table["length"]) if "length" in table else None
    return ExternalData(name, table["location"], offset, length)


def _whole(label: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise BundleError(f"{label} has the external data {key} {text[:40]!a}, which is not a whole number")
    return int(text)
