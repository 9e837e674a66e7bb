"""Problem: why a pass or an exporter cannot do what is asked; all are found before the first part starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from diffship.core.errors import ConfigError, DiffshipError, SourceError, UnsupportedError

_LISTED = 3
_ROOM = 600  # characters, within which other problems are told beside the first


@dataclass(frozen=True)
class Problem:
    """`part` is empty where the whole pipeline is meant. `kind` is what `refuse` raises where this is the first one."""

    part: str
    text: str
    kind: type[DiffshipError] = UnsupportedError

    @classmethod
    def of(cls, part: str, fault: DiffshipError, before: str = "") -> Problem:
        """A fault that was met: a wrong option or a file that cannot be read stays one (exit code 2)."""
        kinds: tuple[type[DiffshipError], ...] = (ConfigError, SourceError)
        return cls(
            part, f"{before}{fault}", next((kind for kind in kinds if isinstance(fault, kind)), UnsupportedError)
        )

    def __str__(self) -> str:
        return f"{self.part}: {self.text}" if self.part else self.text


def met(looks: Iterable[tuple[str, Callable[[], object]]]) -> Iterator[Problem]:
    """What raises among `looks`, pairs of a part and what is tried of it; each is tried, whatever became of others."""
    for part, look in looks:
        try:
            look()
        except DiffshipError as fault:
            yield Problem.of(part, fault)


def refuse(problems: Sequence[Problem]) -> None:
    """Raises the kind of the first problem, told whole, and counts the others, unless there are none.

    The others are told, too, as far as whole ones find room.
    """
    if problems:
        first, *others = map(str, problems)
        raise problems[0].kind(first + _more(others, _ROOM - len(first)))


def _more(others: Sequence[str], room: int) -> str:
    if not others:
        return ""
    told: list[str] = []
    for text in others[:_LISTED]:
        if sum(map(len, told)) + len(text) <= room:
            told.append(text)
    return f" (and {len(others)} more{': ' if told else ''}{'; '.join(told)})"
