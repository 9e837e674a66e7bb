"""Problem: why a pass or an exporter cannot do what is asked; all are found before the first part starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffship.core.errors import UnsupportedError


@dataclass(frozen=True)
class Problem:
    """`part` is empty where the whole pipeline is meant."""

    part: str
    text: str

    def __str__(self) -> str:
        return f"{self.part}: {self.text}" if self.part else self.text


def refuse(problems: Sequence[Problem]) -> None:
    """Raises UnsupportedError, naming the first problem and counting the others, unless there are none."""
    if problems:
        more = f" (and {len(problems) - 1} more: {'; '.join(str(p) for p in problems[1:4])})" if problems[1:] else ""
        raise UnsupportedError(f"{problems[0]}{more}"[:600])
