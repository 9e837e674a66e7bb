"""Short texts of large objects, for a prompt or a notebook: arrays by type and shape, collections by their number."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_VALUE, _WHOLE = 60, 300  # characters
_ENTRIES = 3


def brief(cls: type[T]) -> type[T]:
    """Give a dataclass a `repr` of one line, at most 300 characters; goes above `@dataclass`."""

    def text(self: Any) -> str:
        return brief_text(self, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    cls.__repr__ = text  # type: ignore[method-assign]
    return cls


def brief_text(owner: object, **values: object) -> str:
    """`Class(key=value, ...)` with every value, and the whole, cut if it grows long."""
    inside = ", ".join(f"{key}={_value(value)}" for key, value in values.items())
    return f"{type(owner).__name__}({inside if len(inside) <= _WHOLE else inside[: _WHOLE - 3] + '...'})"


def _value(value: object) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    if isinstance(value, Collection) and not isinstance(value, str) and len(value) > _ENTRIES:
        return f"{{{len(value)} keys}}" if isinstance(value, Mapping) else f"[{len(value)} entries]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(str(key)[:_VALUE] for key in value)}}}"
    if isinstance(value, Collection) and not isinstance(value, str):
        return f"[{', '.join(_short(type(entry).__name__ if _is_large(entry) else repr(entry)) for entry in value)}]"
    return _short(f"{type(value).__name__}(...)" if _is_large(value) else repr(value))


def _is_large(value: object) -> bool:
    return dataclasses.is_dataclass(value) or hasattr(value, "shape")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _VALUE else f"{line[: _VALUE - 3]}..."
