"""A timetable as a Gantt chart: text for a terminal, SVG for a page. Cells hold the step whose timestep is embedded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from diffship.runtimes.partition.timetable import Task, Timetable

_CELL, _ROW, _LABEL = 30, 26, 84  # pixels
_COLOURS = ("#cfe3f7", "#f9dfc4", "#d6ecd0", "#ead6ee", "#f6d4d4", "#e4e4cf", "#d2ecec", "#e2e2e2")


@dataclass(frozen=True)
class Column:
    """What the devices do at one time; `predicts` are the steps that are ready at its end."""

    round: int
    synchronous: bool
    times: dict[int, int]  # device -> step whose timestep it embeds
    predicts: tuple[int, ...]


def columns(table: Timetable) -> list[Column]:
    """Time from left to right; in a synchronous round the devices work one after another."""
    return [column for i in range(len(table.rounds)) for column in _of_round(table, i)]


def text(table: Timetable, width: int = 110) -> str:
    """Rows of devices, `.` if a device waits; bands of at most `width` characters."""
    cells = [_cells(table, column) for column in columns(table)]
    labels = [f"device {device}" for device in range(table.devices)] + ["predicts"]
    margin, bands, used = max(map(len, labels)), [[]], 0  # type: ignore[var-annotated]
    for column in cells:
        size = max(map(len, column)) + 1
        if bands[-1] and margin + used + size > width:
            bands.append([])
            used = 0
        bands[-1].append(column)
        used += size
    return "\n\n".join(_band(labels, margin, band) for band in bands)


def svg(table: Timetable) -> str:
    """One drawing; warm-up is grey-bordered, a device has a colour, the bottom row tells the predictions."""
    found = columns(table)
    wide, high = _LABEL + _CELL * len(found) + 8, _ROW * (table.devices + 1) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="sans-serif" '
        f'font-size="11" role="img"><title>{escape(title(table))}</title>'
    ]
    names = [f"device {device}" for device in range(table.devices)] + ["predicts"]
    lines += [f'<text x="4" y="{_ROW * row + 18}">{escape(name)}</text>' for row, name in enumerate(names)]
    for place, column in enumerate(found):
        lines += _svg_column(_LABEL + _CELL * place, column, table.devices)
    return "\n".join([*lines, "</svg>", ""])


def title(table: Timetable) -> str:
    """`3 stages, stride 2: 4 devices, 50 steps, warm-up 9`."""
    shift = ", time shift" if table.scheme.time_shift else ""
    stages, devices, calls = (
        f"{count} {word}{'s' if count > 1 else ''}"
        for count, word in ((table.placement.devices, "stage"), (table.devices, "device"), (table.calls, "step"))
    )
    warm_up = sum(each.synchronous for each in table.rounds)
    return f"{stages}, stride {table.scheme.stride}: {devices}, {calls}, warm-up {warm_up}{shift}"


def _of_round(table: Timetable, index: int) -> Iterator[Column]:
    each = table.rounds[index]
    groups: Sequence[Sequence[Task]] = [each.tasks]
    if each.synchronous:
        groups = [list(group) for _, group in groupby(each.tasks, key=lambda task: task.device)]
    for group in groups:
        ready = each.predicts if group is groups[-1] else ()
        yield Column(index, each.synchronous, {task.device: task.time for task in group}, ready)


def _cells(table: Timetable, column: Column) -> list[str]:
    times = [str(column.times.get(device, ".")) for device in range(table.devices)]
    return [*times, ",".join(map(str, column.predicts))]


def _band(labels: Sequence[str], margin: int, band: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in band]
    rows = []
    for row, label in enumerate(labels):
        cells = (column[row].rjust(wide) for column, wide in zip(band, widths, strict=True))
        rows.append(f"{label.ljust(margin)} {' '.join(cells)}".rstrip())
    return "\n".join(rows)


def _svg_column(x: int, column: Column, devices: int) -> list[str]:
    lines = []
    for device, time in sorted(column.times.items()):
        border = "#777" if column.synchronous else "#fff"
        fill = _COLOURS[device % len(_COLOURS)]
        y = _ROW * device + 4
        lines.append(f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_ROW - 4}" fill="{fill}" stroke="{border}"/>')
        lines.append(f'<text x="{x + _CELL // 2}" y="{y + 14}" text-anchor="middle">{time}</text>')
    if column.predicts:
        steps = ",".join(map(str, column.predicts))
        lines.append(f'<text x="{x + _CELL // 2}" y="{_ROW * devices + 18}" text-anchor="middle">{steps}</text>')
    return lines
