"""Results as tables: one line per case, in text, Markdown and CSV. Nothing here measures or rounds a stored value."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffship.benchmarks.intervals import ROUNDS, ratio_verdict, supports
from diffship.benchmarks.record import Results
from diffship.core.row import Row

KEYS = ("model", "runner", "part", "batch", "steps", "size", "precision", "device")
DASH = "-"
OLD = "to be measured again"  # what is said of an interval of the earlier method
OLD_NOTE = (
    "These intervals are of an earlier method (a bootstrap over rounds or seeds), which was wrong up to one time in "
    "four: no verdict is drawn from them until the file is measured again."
)
COLUMNS = ("p50", "rounds", "p90", "p99", "throughput", "load", "warm-up", "cold start", "peak memory", "file")
HEAD = ("model", "part", "runner", *COLUMNS, "GFLOP/s", "of ceiling")


@dataclass(frozen=True)
class Table:
    """A head and rows of text cells; `notes` stand below it."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [_line(self.head), _line("---" for _ in self.head), *(_line(row) for row in self.rows)]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def text(self) -> str:
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.head, *self.rows)
        ]
        return "\n".join([*lines, *self.notes])


def csv_text(results: Sequence[Results]) -> str:
    """Every row of every file with all its digits: what a spreadsheet reads."""
    names = ("hardware", "suite", "subject", "kind", "metric", "value", "unit", "status", "low", "high", "n", "reason")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow((*names, *KEYS, "weights"))
    for found in results:
        for row in found.rows:
            plain = [getattr(row, name) for name in names[1:]]
            conditions = [row.conditions.get(name) for name in (*KEYS, "weights")]
            writer.writerow(["" if cell is None else cell for cell in (found.hardware, *plain, *conditions)])
    return stream.getvalue()


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """conditions -> metric -> row, in the order of the file; ratios and the machine's own rows are left out."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.conditions and "against" not in row.conditions:
            found.setdefault(tuple(row.conditions.get(key) for key in KEYS), {})[row.metric] = row
    return found


def parts_table(results: Results) -> Table:
    """One line per case: the times of a call (or image), memory, size, and what share of the ceiling it reached."""
    rows = tuple(_case_line(key, metrics) for key, metrics in cases(results.rows).items())
    return Table(HEAD, rows, tuple(_notes(results)))


def ratios_table(results: Results) -> Table:
    """Our engines against everything else of the same case, each pair once, with the interval and what may be said."""
    rows, seen = [], set[tuple[str, ...]]()
    for row in results.rows:
        if "against" in row.conditions and row.value is not None and row.metric.endswith("_ratio"):
            ours, theirs = str(row.conditions["runner"]), str(row.conditions["against"])
            names = (str(row.conditions["model"]), _part(row.conditions))
            if (*names, theirs, ours) not in seen:
                seen.add((*names, ours, theirs))
                rows.append((*names, ours, theirs, f"{row.value:.3f}", *_said(row)))
    head = ("model", "part", "ours", "against", "time ratio", "95 % interval", "rounds", "verdict")
    return Table(head, tuple(rows), _short_notes(results))


def _said(row: Row) -> tuple[str, str, str]:
    """Interval, rounds and verdict of a ratio."""
    rounds = row.n or 0
    if row.low is None or row.high is None:
        return DASH, str(rounds), f"{rounds} round{'s' * (rounds != 1)}: no interval"
    said = f"{rounds} rounds: too few" if rounds < ROUNDS else ratio_verdict(row.low, row.high, rounds)
    return f"{row.low:.3f} to {row.high:.3f}", str(rounds), OLD if _old(row) else said


def best(results: Results) -> list[str]:
    """A line per case that several runners ran: the fastest of them, and who needed the least memory."""
    groups: dict[tuple[Any, ...], list[dict[str, Row]]] = {}
    for key, metrics in cases(results.rows).items():
        groups.setdefault((key[0], *key[2:]), []).append(metrics)
    return [line for group in groups.values() if (line := _best(group))]


def _best(group: Sequence[Mapping[str, Row]]) -> str:
    words = []
    for word, names in (("fastest", ("image_seconds_p50", "call_seconds_p50")), ("smallest", ("peak_host_bytes",))):
        rows = [metrics[name] for metrics in group for name in names if name in metrics]
        known = sorted((row for row in rows if row.value is not None), key=lambda row: row.value or 0)
        if len(known) > 1:
            words.append(f"{word} {known[0].conditions['runner']} ({value(known[0])})")
    conditions = next(iter(group[0].values())).conditions
    return f"{conditions['model']}, {_part(conditions)}: {', '.join(words)}" if words else ""


def figures_table(results: Results) -> Table:
    """Any other suite: every row with its spread."""
    rows = tuple(
        (row.subject, row.metric.replace("_", " "), value(row), _span(row), status(row)) for row in results.rows
    )
    return Table(("subject", "figure", "value", "spread", "status"), rows, tuple(_notes(results)))


def matrix_table(results: Results) -> Table:
    """A line per subject and a column per figure, comparisons left out; quality with its interval where it has one."""
    rows = [row for row in results.rows if "against" not in row.conditions]
    columns = {row.metric: row for row in rows}
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row.subject, {})[row.metric] = _cell(row)
    head = ("subject", *(_column(row) for row in columns.values()))
    lines = tuple((name, *(found.get(metric, DASH) for metric in columns)) for name, found in cells.items())
    return Table(head, lines, tuple(_notes(results)))


def differences_table(results: Results) -> Table:
    """Every comparison of quality: ours minus theirs, its interval, and what may be said of it."""
    head = ("ours against", "figure", "difference", "95 % interval", "seeds", "pictures", "verdict")
    lines = []
    for metric, row, (mean, low, high) in comparisons(results):
        said = OLD if _old(row) else str(row.conditions["verdict"])
        facts = (str(row.conditions["seeds"]), f"{row.n or 0:,}", said)
        lines.append((row.subject, metric, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", *facts))
    return Table(head, tuple(lines), _short_notes(results))


def _old(row: Row) -> bool:
    """Whether its interval was made before `interval` said how."""
    return "interval" not in row.conditions


def _short_notes(results: Results) -> tuple[str, ...]:
    old = any(_old(row) for row in results.rows if _has_interval(row))
    return (f"Measured on {results.hardware}{_when(results)}.", *([OLD_NOTE] if old else []))


def _has_interval(row: Row) -> bool:
    """Whether `low` and `high` are a 95 % interval; of other rows they are the least and the largest value."""
    timed = row.kind == "latency" and "against" in row.conditions and row.metric.endswith("_ratio")
    judged = row.kind == "quality" and row.metric != "frechet_distance"
    return (timed or judged) and row.low is not None


def _when(results: Results) -> str:
    """Commit and date of a file; files from before dates were recorded have none."""
    env = results.environment
    return f"; commit {env.get('commit')}, {env.get('date') or 'date not recorded'}"


def comparisons(results: Results) -> Iterator[tuple[str, Row, tuple[float, float, float]]]:
    """(the figure that is compared, its row, (difference, low, high)) of every comparison of quality."""
    for row in results.rows:
        if "verdict" in row.conditions and row.value is not None and row.low is not None and row.high is not None:
            yield row.metric.removesuffix("_difference").replace("_", " "), row, (row.value, row.low, row.high)


def _column(row: Row) -> str:
    name = row.metric.replace("_", " ")
    return f"{name}, {row.unit}" if row.kind == "quality" and row.unit else name


def _cell(row: Row) -> str:
    if row.value is None or row.kind != "quality":
        return value(row)
    known = row.low is not None and row.high is not None and row.low < row.high
    return digits(row.value) + (f" ({row.low:.3f} to {row.high:.3f})" if known else "")


def value(row: Row | None) -> str:
    """A row's value with its unit, in three digits; its status where it has none."""
    if row is None:
        return DASH
    return row.status if row.value is None else figure(row.value, row.unit)


def figure(number: float, unit: str) -> str:
    """`1.23 s`, `45.6 ms`, `3.21 GB`, `12.3 GFLOP/s`, `45.6 %` of a share: three digits; a count is whole, `1,234`."""
    if unit == "s":
        scaled = ((1, "s"), (1e-3, "ms")) if number >= 1 else ((1e-3, "ms"), (1e-6, "us"))
        scale, name = scaled[0] if number >= scaled[0][0] or number == 0 else scaled[1]
        return f"{digits(number / scale)} {name}"
    if unit.startswith(("bytes", "FLOP", "MAC")):
        word = unit.replace("bytes", "B")
        for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if number >= scale:
                return f"{digits(number / scale)} {prefix}{word}"
        return f"{digits(number)} {word}"
    if unit == "share":
        return f"{digits(100 * number)} %"
    if unit == "count":
        return f"{number:,.0f}"
    return f"{digits(number)} {unit}".strip()


def digits(number: float) -> str:
    """Three digits, never in exponents; larger numbers are whole, with commas between their thousands."""
    if number == 0 or not math.isfinite(number):
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(places, 6)}f}"


def status(row: Row) -> str:
    return row.status if not row.reason else f"{row.status}: {row.reason}"


def labelled(conditions: Mapping[str, Any]) -> str:
    """The model's name; "random weights" where it has no others, so that no one reads quality into it."""
    weights = str(conditions.get("weights", ""))
    return f"{conditions['model']} ({weights})" if weights.startswith("random") else str(conditions["model"])


def _case_line(key: tuple[Any, ...], metrics: Mapping[str, Row]) -> tuple[str, ...]:
    first = next(iter(metrics.values()))
    stem = "image_seconds" if first.conditions["part"] == "image" else "call_seconds"
    if first.conditions["part"] == "export":
        stem = "export_seconds"
    median = metrics.get(f"{stem}_p50") or metrics.get(stem)
    names = (labelled(first.conditions), _part(first.conditions), str(first.conditions["runner"]))
    if median is None or median.value is None:
        said = value(median) if median else DASH
        return (*names, said, *[DASH] * (len(HEAD) - 4))
    wanted = ("throughput", "load_seconds", "warm_up_seconds", "cold_start_seconds")
    tails = [_tail(metrics.get(f"{stem}_{name}"), share) for name, share in (("p90", 0.9), ("p99", 0.99))]
    cells = [*tails, *(value(metrics.get(name)) for name in wanted)]
    memory = metrics.get("peak_device_bytes") or metrics.get("peak_host_bytes")
    flops, share = metrics.get("flops"), metrics.get("share_of_ceiling")
    rate = DASH if flops is None or flops.value is None else digits(flops.value / 1e9)
    of = DASH if share is None or share.value is None else f"{share.value:.0%}"
    return (*names, value(median), _span(median), *cells, value(memory), value(metrics.get("file_bytes")), rate, of)


def _tail(row: Row | None, share: float) -> str:
    """A high percentile, if so many samples have one."""
    return value(row) if row is not None and supports(row.n or 0, share) else DASH


def _part(conditions: Mapping[str, Any]) -> str:
    words = [str(conditions.get("part", ""))]
    if conditions.get("steps"):
        words.append(f"{conditions['steps']} steps")
    if conditions.get("batch", 1) != 1:
        words.append(f"batch {conditions['batch']}")
    if conditions.get("size"):
        words.append(f"{conditions['size']} px")
    return ", ".join(words)


def _span(row: Row) -> str:
    if row.low is None or row.high is None or row.low == row.high:  # earlier files have one value as its own spread
        return DASH
    return f"{figure(row.low, row.unit)} to {figure(row.high, row.unit)}"


def _notes(results: Results) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results.environment.get("packages", {}).items())
    ceilings = [row for row in results.rows if row.subject == "this machine" and row.metric.startswith("matrix")]
    notes = [f"Measured on {results.hardware}; {versions}{_when(results)}."]
    notes += _short_notes(results)[1:]
    notes += [f"Ceiling: {value(row)}, the best float32 matrix product of this machine." for row in ceilings[:1]]
    whys = {f"{row.subject}: {row.status}, {row.reason}" for row in results.rows if row.value is None and row.reason}
    return [*notes, *sorted(whys), f"Command: `{results.command}`"]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
