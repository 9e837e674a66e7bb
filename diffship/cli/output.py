"""What a verb hands back, and how it becomes text or one JSON document."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?( [kMGT]?B)?\Z")


@dataclass(frozen=True)
class Result:
    """`document` is what --json prints (docs/schema/VERB.json), `text` what a person reads."""

    document: Mapping[str, object]
    text: str
    exit_code: int = 0


def print_json(document: Mapping[str, object]) -> None:
    """One document on stdout, ASCII only, so that no terminal or pipe encoding can refuse it."""
    print(json.dumps(jsonable(document), indent=1, allow_nan=False))
    sys.stdout.flush()


def jsonable(value: object) -> object:
    """Plain JSON: tuples become lists, numbers that JSON cannot hold (NaN, inf) null, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def error_document(verb: str, kind: str, message: str, exit_code: int) -> dict[str, object]:
    error = {"type": kind, "message": message, "exit_code": exit_code}
    return {"schema": 1, "verb": verb or None, "ok": False, "error": error}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns by two spaces; numbers to the right."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(head))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        padded = [row[i].rjust(widths[i]) if numeric[i] else row[i].ljust(widths[i]) for i in range(len(head))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def size_text(size: int) -> str:
    """`3.4 MB`: decimal units, as file managers and model cards have them."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def figure(value: object, form: str = ".2e") -> str:
    """A figure, `exact` for an infinite PSNR, or a dash if there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        return "-"
    return "exact" if math.isinf(value) else format(value, form)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _is_number(text: str) -> bool:
    return text in ("-", "exact") or _NUMBER.match(text) is not None
