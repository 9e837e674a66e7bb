"""Problem: why a pass or an exporter cannot do what is asked; all are found before the first part starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from diffship.core.errors import ConfigError, DiffshipError, SourceError, UnsupportedError

_LISTED = 3
_ROOM = 600  # characters, within which other problems are told beside the first


@dataclass(frozen=True)
class Problem:
    """One reason to refuse. `part` is empty if the whole pipeline is meant; `refuse` raises the `kind` of the first
    one."""

    part: str
    text: str
    kind: type[DiffshipError] = UnsupportedError

    @classmethod
    def of(cls, part: str, fault: DiffshipError, before: str = "") -> Problem:
        """The problem that an error stands for; a wrong option and an unreadable file keep their kind (exit code 2)."""
        kinds: tuple[type[DiffshipError], ...] = (ConfigError, SourceError)
        return cls(
            part, f"{before}{fault}", next((kind for kind in kinds if isinstance(fault, kind)), UnsupportedError)
        )

    def __str__(self) -> str:
        return f"{self.part}: {self.text}" if self.part else self.text


def met(looks: Iterable[tuple[str, Callable[[], object]]]) -> Iterator[Problem]:
    """Call every function in `looks`, pairs of (part, function); gives a Problem for each one that raises."""
    for part, look in looks:
        try:
            look()
        except DiffshipError as fault:
            yield Problem.of(part, fault)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise the first problem as an error of its `kind`; does nothing if there is none.

    The message has the first problem whole, counts the others, and adds those of them for which there is room.
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
