"""A table of text cells: as Markdown and as plain text, without columns that say nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

DASH = "-"


@dataclass(frozen=True)
class Table:
    """A head and rows of text cells. `notes` stand below it; `origin` says on what and how it was measured; `kept` are
    columns that are shown even if they are equal in every row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def condensed(self) -> Table:
        """Without columns that are empty, and with those that are equal in every row in a note instead."""
        columns = list(zip(self.head, zip(*self.rows, strict=True), strict=True)) if self.rows else []
        empty = {at for at, (_, cells) in enumerate(columns) if set(cells) <= {DASH, ""}}
        equal = {at for at, (_, cells) in enumerate(columns) if len(cells) > 1 and len(set(cells)) == 1} - empty
        equal = {at for at in equal if self.head[at] not in self.kept}
        kept = [at for at in range(len(self.head)) if at not in empty | equal]
        said = "; ".join(f"{self.head[at]}: {self.rows[0][at]}" for at in sorted(equal))
        rows = tuple(tuple(row[at] for at in kept) for row in self.rows)
        notes = (f"In every row: {said}.", *self.notes) if said else self.notes
        return replace(self, head=tuple(self.head[at] for at in kept), rows=rows, notes=notes)

    def markdown(self, origin: bool = True) -> str:
        """`origin` False: where it comes from is said elsewhere on the page."""
        table = self.condensed()
        lines = [_line(table.head), _line("---" for _ in table.head), *(_line(row) for row in table.rows)]
        return "\n".join([*lines, *(f"\n{note}" for note in (*table.notes, *(table.origin if origin else ())))])

    def text(self, origin: bool = True) -> str:
        table = self.condensed()
        every = (table.head, *table.rows)
        widths = [max(len(row[at]) for row in every) for at in range(len(table.head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in every]
        return "\n".join([*lines, *table.notes, *(table.origin if origin else ())])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
