"""Plain data (JSON, TOML) into frozen dataclasses and back: nothing unknown, nothing coerced, everything bounded."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from diffship.core.errors import ConfigError, DiffshipError

T = TypeVar("T")
_FEW = 4  # names that are listed beside the nearest one
_RULES = {"low", "high", "choices"}  # keys of a field's metadata that bound its value


def bounds(low: float, high: float) -> dict[str, Any]:
    """Metadata for a dataclass field: the value (or each item) lies in [low, high]."""
    return {"low": low, "high": high}


def key_text(text: str) -> tuple[str, str] | None:
    """`key-name=1` as ("key_name", "1"); None for anything else.

    Of `swap-vae.key-name` the name before the dot stays as it is, because names of passes have hyphens.
    """
    words, equals, value = text.partition("=")
    owner, dot, key = words.rpartition(".")
    return (f"{owner}{dot}{key.replace('-', '_')}", value) if equals and words else None


def key_value(text: str) -> tuple[str, Any] | None:
    """`key-name=1` as ("key_name", 1); None for anything else."""
    found = key_text(text)
    return found and (found[0], plain_value(found[1]))


def plain_value(text: str) -> Any:
    """What a word stands for: true or false, an integer, a number, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def choices(*legal: str) -> dict[str, Any]:
    """Metadata for a dataclass field: the value (or each item) is one of `legal`."""
    return {"choices": legal}


def bounded(cls: type[T]) -> type[T]:
    """Make the bounds and choices of a dataclass's fields hold in its constructor too; goes below `@dataclass`.

    A subclass inherits the check, and it then covers the fields of the subclass.

    Raises:
        ConfigError: (the constructor) a value of another type or out of its field's bounds.
    """
    inner: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)

    def check(self: Any) -> None:
        for field in dataclasses.fields(self):
            if field.metadata.keys() & _RULES:
                legal_value(type(self), field.name, getattr(self, field.name))
        if inner is not None:
            inner(self)

    setattr(cls, "__post_init__", check)  # noqa: B010  mypy knows no such attribute of a type
    return cls


def legal_value(
    cls: type[Any], name: str, value: object, where: str = "", error: type[DiffshipError] = ConfigError
) -> Any:
    """`value` as the field `name` of the dataclass `cls` takes it; `where` names it in messages.

    Raises:
        error: a value of another type, or out of the field's bounds.
    """
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return _value(_hints(typing.cast(Any, cls))[name], value, where or f"{cls.__name__}.{name}", field.metadata, error)


def load(cls: type[T], data: object, where: str, error: type[DiffshipError] = ConfigError) -> T:
    """A `cls` (a dataclass) made of `data`; `where` names it in messages.

    Raises:
        error: an unknown key (with the nearest legal name), a missing key, a wrong type (a bool is not an int),
            a value out of the field's bounds, or whatever the class itself refuses.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} is {_short(data)}; it must be a table")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in data:
        if key not in fields:
            raise error(f"{where}: {unknown('key', key, fields)}")
    hints = _hints(typing.cast(Any, cls))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}.{name}", field.metadata, error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where}: the key {name!r} is missing")
    try:
        return cls(**values)
    except DiffshipError as fault:
        raise error(f"{where}: {fault}") from None


def unknown(what: str, name: object, legal: typing.Iterable[str]) -> str:
    """`unknown key 'stepz'; did you mean 'steps'?`, and the legal names if none is near or they are few."""
    names = [str(entry) for entry in legal]
    near = difflib.get_close_matches(str(name)[:100], names, 1)
    hints = [f"did you mean {near[0]!r}?"] if near else []
    if not near or len(names) <= _FEW:  # 'gpu' is near 'cpu', and means 'cuda'
        hints.append(f"legal: {', '.join(names[:40]) or 'none'}")
    return f"unknown {what} {_short(name)}; {' '.join(hints)}"


def plain(value: object) -> Any:
    """JSON-ready form of dataclasses, tuples and dicts; what `load` reads back to an equal value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return value


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(kind: Any, value: object, where: str, meta: Mapping[str, Any], error: type[DiffshipError]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (types.UnionType, typing.Union):
        return _union(arguments, value, where, meta, error)
    if dataclasses.is_dataclass(kind):
        return load(typing.cast(type[Any], kind), value, where, error)
    if origin in (tuple, list):
        return _items(origin, arguments, value, where, meta, error)
    if origin is dict or kind is dict:
        return _table(arguments, value, where, meta, error)
    return _scalar(kind, value, where, meta, error)


def _union(kinds: Sequence[Any], value: object, where: str, meta: Mapping[str, Any], error: type[DiffshipError]) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    fitting = [kind for kind in kinds if type(value) is kind] or kinds[-1:]
    return _value(fitting[0], value, where, meta, error)


def _items(
    origin: Callable[..., Any],
    arguments: Sequence[Any],
    value: object,
    where: str,
    meta: Mapping[str, Any],
    error: type[DiffshipError],
) -> Any:
    if not isinstance(value, (list, tuple)):
        raise error(f"{where} is {_short(value)}; it must be a list")
    if (len(arguments) == 2 and arguments[1] is Ellipsis) or origin is list:
        kinds = [arguments[0] if arguments else Any] * len(value)
    else:
        kinds = list(arguments)
    if len(kinds) != len(value):
        raise error(f"{where} has {len(value)} entries; it must have {len(kinds)}")
    return origin(
        _value(kind, entry, f"{where}[{index}]", meta, error)
        for index, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _table(
    arguments: Sequence[Any], value: object, where: str, meta: Mapping[str, Any], error: type[DiffshipError]
) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise error(f"{where} is {_short(value)}; it must be a table")
    kind = arguments[1] if arguments else Any
    for key in value:
        if not isinstance(key, str):
            raise error(f"{where} has the key {_short(key)}; keys must be strings")
    return {key: _value(kind, entry, f"{where}.{key[:80]}", meta, error) for key, entry in value.items()}


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _scalar(kind: Any, value: object, where: str, meta: Mapping[str, Any], error: type[DiffshipError]) -> Any:
    widened = float(value) if kind is float and type(value) is int and abs(value) < 2**53 else value
    if kind not in _NAMES or type(widened) is not kind:
        raise error(f"{where} is {_short(value)}; it must be {_NAMES.get(kind, kind)}")
    legal = meta.get("choices")
    if legal is not None and widened not in legal:
        raise error(f"{where}: {unknown('value', widened, legal)}")
    if isinstance(widened, (int, float)) and not isinstance(widened, bool):
        low, high = meta.get("low", -math.inf), meta.get("high", math.inf)
        if not low <= widened <= high or widened in (math.inf, -math.inf):
            raise error(f"{where} is {_short(value)}; legal is from {low} to {high}")
    return widened


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (Mapping, list, tuple)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} entries"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
