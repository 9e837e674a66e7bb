"""Help of a pass: each option with its default, its legal values and what its class says of it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

_WIDTH = 100  # at most: longer lines are hard to read


def options_text(name: str, cls: type[Any]) -> str:
    """What `compress --pass NAME --help` adds."""
    fields = dataclasses.fields(cls)
    about, summary = option_texts(cls)
    column = max(len(field.name) for field in fields) + 4
    width = min(shutil.get_terminal_size().columns, _WIDTH)
    lines = [f"pass {name}, --set KEY=VALUE:", *_wrapped(summary, 2, width), ""]
    for place, field in enumerate(fields):
        lines.append(f"  {field.name:<{column - 2}}{_default(field)}")
        following = about.get(fields[place + 1].name) if place + 1 < len(fields) else None
        if about.get(field.name) != following:  # what several share stands below the last of them
            lines += _wrapped(about.get(field.name, ""), column, width)
    return "\n".join(lines)


def option_texts(cls: type[Any]) -> tuple[Mapping[str, str], str]:
    """({option: what it is}, what the class does), from docstrings of `name, name: text` behind one paragraph.

    A class that inherits options takes what its parents say of them.
    """
    summary = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    parents = [inspect.getdoc(one) or "" for one in cls.__mro__ if dataclasses.is_dataclass(one)]
    rest = "\n".join(text.partition("\n\n")[2] for text in parents)
    names = "|".join(field.name for field in dataclasses.fields(cls))
    marks = list(re.finditer(rf"(?<![\w`])((?:{names})(?:,\s+(?:{names}))*):\s", rest))
    ends = [mark.start() for mark in marks[1:]] + [len(rest)]
    about: dict[str, str] = {}
    for mark, end in zip(marks, ends, strict=True):
        text = " ".join(rest[mark.end() : end].split())
        about |= dict.fromkeys(re.split(r",\s+", mark[1]), text)
    return about, " ".join(summary.split())


def _wrapped(text: str, column: int, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * column, subsequent_indent=" " * column)


def _default(field: dataclasses.Field[Any]) -> str:
    legal = field.metadata.get("choices")
    default = "needed" if field.default is dataclasses.MISSING else f"default: {_worded(field.default)}"
    return f"{default}{'; ' + ', '.join(map(str, legal)) if legal else ''}"


def _worded(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
