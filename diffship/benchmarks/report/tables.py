"""Results as tables: one line per case, in text, Markdown and CSV. Nothing here measures or rounds a stored value."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffship.benchmarks.measure.intervals import ROUNDS, ratio_verdict, supports
from diffship.benchmarks.measure.record import Results
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.report.labels import SHARES, label, shared, subject
from diffship.benchmarks.report.table import DASH, Table

MEDIANS = ("image_seconds_p50", "call_seconds_p50")
KEYS = ("model", "runner", "part", "batch", "steps", "size", "precision", "device")
OLD = "to be measured again"  # what is said of an interval of the earlier method
OLD_NOTE = (
    "These intervals are of an earlier method (a bootstrap over rounds or seeds), which was wrong up to one time in "
    "four: no verdict is drawn from them until the file is measured again."
)
HEAD = (
    *("model", "part", "runner", "median", "between rounds", "90 % within", "99 % within"),
    *("images at once", "load", "first call", "peak memory", "weights", "of the peak"),
)


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
    """One line per case: the times of a call (or image), memory, size, and what share of the ceiling it reached.

    What a runner has no form of stands in the notes.
    """
    found = [(key, metrics) for key, metrics in cases(results.rows).items() if not _unsupported(metrics)]
    rows = tuple(_case_line(metrics) for _, metrics in found)
    return Table(HEAD, rows, (*_whys(results), *_ceiling(results)), origin(results))


def ratios_table(results: Results) -> Table:
    """Our engines against everything else of the same case, each pair once, with the interval and what may be said."""
    rows = []
    for row in unmirrored(results.rows):
        if "against" in row.conditions and row.value is not None and row.metric.endswith("_ratio"):
            ours, theirs = str(row.conditions["runner"]), str(row.conditions["against"])
            names = (str(row.conditions["model"]), part_text(row.conditions))
            rows.append((*names, ours, theirs, f"{row.value:.3f}", *said(row)))
    head = ("model", "part", "ours", "against", "time ratio", "95 % interval", "rounds", "verdict")
    return Table(head, tuple(rows), _old_note(results), origin(results))


def unmirrored(rows: Iterable[Row]) -> Iterator[Row]:
    """`rows` without those that say a comparison the other way round, when it was said before."""
    seen = set[tuple[Any, ...]]()
    for row in rows:
        ours, theirs = row.conditions.get("runner"), row.conditions.get("against")
        about = (row.metric, *(row.conditions.get(key) for key in KEYS if key != "runner"))
        if ours is None or theirs is None or (*about, theirs, ours) not in seen:
            seen.add((*about, ours, theirs))
            yield row


def said(row: Row) -> tuple[str, str, str]:
    """Interval, rounds and verdict of a ratio. A value that is its own interval, as in earlier files, has none."""
    rounds = row.n or 0
    if row.low is None or row.high is None or row.low == row.high:
        return DASH, str(rounds), f"{rounds} round{'s' * (rounds != 1)}: too few to say"
    verdict = f"{rounds} rounds: too few to say" if rounds < ROUNDS else ratio_verdict(row.low, row.high, rounds)
    return f"{row.low:.3f} to {row.high:.3f}", str(rounds), OLD if _old(row) else verdict


def best(results: Results) -> list[str]:
    """A line per case that several runners ran: the fastest of them, and who needed the least memory; and a last one
    if the rounds were too few to say which is faster."""
    groups: dict[tuple[Any, ...], list[dict[str, Row]]] = {}
    for key, metrics in cases(results.rows).items():
        groups.setdefault((key[0], *key[2:]), []).append(metrics)
    lines = [line for group in groups.values() if (line := _best(group))]
    rounds = results.settings.get("rounds", ROUNDS)
    few = f"{rounds} round{'s' * (rounds != 1)}: too few to say which is faster; measure with --rounds {ROUNDS}"
    return [*lines, few] if lines and rounds < ROUNDS else lines


def _best(group: Sequence[Mapping[str, Row]]) -> str:
    words = []
    for word, names in (("fastest", MEDIANS), ("smallest", ("peak_host_bytes",))):
        rows = [metrics[name] for metrics in group for name in names if name in metrics]
        known = sorted((row for row in rows if row.value is not None), key=lambda row: row.value or 0)
        if len(known) > 1:
            words.append(f"{word} {known[0].conditions['runner']} ({value(known[0])})")
    conditions = next(iter(group[0].values())).conditions
    return f"{conditions['model']}, {part_text(conditions)}: {', '.join(words)}" if words else ""


def figures_table(results: Results) -> Table:
    """Any other suite: every figure with its spread, comparisons once. What all subjects share stands in a note."""
    rows = list(unmirrored(results.rows))
    common = shared([row.subject for row in rows])
    lines = tuple((_within(row.subject, common), label(row.metric), shown(row), _span(row)) for row in rows)
    notes = (*([f"All of {subject(common)}."] if common else []), *_whys(results), *_old_note(results))
    return Table(("of", "figure", "value", "spread"), lines, notes, origin(results))


def _within(text: str, common: str) -> str:
    return subject(text.removeprefix(common).removeprefix(", ")) or DASH


def matrix_table(results: Results) -> Table:
    """A line per subject and a column per figure, comparisons left out; quality with its interval if it has one."""
    rows = [row for row in results.rows if "against" not in row.conditions]
    columns = {row.metric: row for row in rows}
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(subject(row.subject), {})[row.metric] = _cell(row)
    head = ("of", *(_column(row) for row in columns.values()))
    lines = tuple((name, *(found.get(metric, DASH) for metric in columns)) for name, found in cells.items())
    return Table(head, lines, (*_whys(results), *_old_note(results)), origin(results))


def differences_table(results: Results) -> Table:
    """Every comparison of quality: ours minus theirs, its interval, and what may be said of it.

    Shares differ by points, hundredths of all pictures.
    """
    head = ("ours against", "figure", "difference", "95 % interval", "seeds", "pictures", "verdict")
    lines = []
    for metric, row, span in comparisons(results):
        points = is_share(metric, results)
        mean, low, high = (f"{100 * edge:+.1f}" if points else f"{edge:+.3f}" for edge in span)
        verdict = OLD if _old(row) else str(row.conditions["verdict"])
        facts = (str(row.conditions["seeds"]), f"{row.n or 0:,}", verdict)
        lines.append((row.subject, label(metric), f"{mean} points" if points else mean, f"{low} to {high}", *facts))
    return Table(head, tuple(lines), _old_note(results), origin(results))


def is_share(metric: str, results: Results) -> bool:
    """Whether `metric` is a share of pictures in this file."""
    return any(row.metric == metric and row.unit == "share" for row in results.rows)


def _old(row: Row) -> bool:
    """Whether its interval was made before `interval` said how."""
    return "interval" not in row.conditions


def _old_note(results: Results) -> tuple[str, ...]:
    return (OLD_NOTE,) if any(_old(row) for row in results.rows if _has_interval(row)) else ()


def _has_interval(row: Row) -> bool:
    """Whether `low` and `high` are a 95 % interval; of other rows they are the least and the largest value."""
    timed = row.kind == "latency" and "against" in row.conditions and row.metric.endswith("_ratio")
    judged = row.kind == "quality" and row.metric != "frechet_distance"
    return (timed or judged) and row.low is not None


def origin(results: Results) -> tuple[str, ...]:
    """On what a file was measured, with which versions, when, and how to do it again."""
    env = results.environment
    when = f"commit {env.get('commit') or 'not known'}, {env.get('date') or 'date not recorded'}"
    return f"Measured on {results.hardware}; {versions(results)}; {when}.", f"Command: `{results.command}`"


def versions(results: Results) -> str:
    return ", ".join(f"{name} {version}" for name, version in results.environment.get("packages", {}).items())


def comparisons(results: Results) -> Iterator[tuple[str, Row, tuple[float, float, float]]]:
    """(the figure that is compared, its row, (difference, low, high)) of every comparison of quality."""
    for row in results.rows:
        if "verdict" in row.conditions and row.value is not None and row.low is not None and row.high is not None:
            yield row.metric.removesuffix("_difference"), row, (row.value, row.low, row.high)


def _column(row: Row) -> str:
    bare = row.kind != "quality" or row.unit in ("", "share", "dB")
    return label(row.metric) if bare else f"{label(row.metric)}, {row.unit}"


def _cell(row: Row) -> str:
    if row.value is None or row.kind != "quality" or row.unit == "dB":
        return shown(row)
    known = row.low is not None and row.high is not None and row.low < row.high
    scale, unit = (100, " %") if row.unit == "share" else (1, "")
    ends = [f"{100 * edge:.1f}" if row.unit == "share" else digits(edge) for edge in (row.low or 0, row.high or 0)]
    span = f" ({ends[0]} to {ends[1]})" if known else ""
    return f"{digits(scale * row.value)}{unit}{span}"


def shown(row: Row) -> str:
    """A row's value as tables have it: shares in per cent, whatever unit their files give them."""
    if row.value is not None and row.metric in SHARES:
        return figure(row.value, "share")
    return value(row)


def value(row: Row | None) -> str:
    """A row's value with its unit, in three digits; its status if it has none."""
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


def labelled(conditions: Mapping[str, Any]) -> str:
    """The model's name; "random weights" if it has no others, so that no one reads quality into it."""
    weights = str(conditions.get("weights", ""))
    return f"{conditions['model']} ({weights})" if weights.startswith("random") else str(conditions["model"])


def _unsupported(metrics: Mapping[str, Row]) -> bool:
    return all(row.status == "unsupported" for row in metrics.values())


def _case_line(metrics: Mapping[str, Row]) -> tuple[str, ...]:
    first = next(iter(metrics.values()))
    stem = {"image": "image_seconds", "export": "export_seconds"}.get(str(first.conditions["part"]), "call_seconds")
    median = metrics.get(f"{stem}_p50") or metrics.get(stem)
    names = (labelled(first.conditions), part_text(first.conditions), str(first.conditions["runner"]))
    if median is None or median.value is None:
        return (*names, value(median), *[DASH] * (len(HEAD) - 4))
    tails = [_tail(metrics.get(f"{stem}_{name}"), share) for name, share in (("p90", 0.9), ("p99", 0.99))]
    several = value(metrics.get("throughput")) if first.conditions.get("batch", 1) != 1 else DASH
    memory = metrics.get("peak_device_bytes") or metrics.get("peak_host_bytes")
    wanted = (metrics.get("load_seconds"), metrics.get("warm_up_seconds"), memory, metrics.get("file_bytes"))
    share = metrics.get("share_of_ceiling")
    of = DASH if share is None or share.value is None else f"{share.value:.0%}".replace("%", " %")
    return (*names, value(median), _span(median), *tails, several, *map(value, wanted), of)


def _tail(row: Row | None, share: float) -> str:
    """A high percentile, if so many samples have one."""
    return value(row) if row is not None and supports(row.n or 0, share) else DASH


def part_text(conditions: Mapping[str, Any]) -> str:
    """`unet, batch 2, 512 px`, `image, 4 steps, 512 px`."""
    words = [str(conditions.get("part", ""))]
    if conditions.get("steps"):
        words.append(f"{conditions['steps']} steps")
    if conditions.get("batch", 1) != 1:
        words.append(f"batch {conditions['batch']}")
    if conditions.get("size"):
        words.append(f"{conditions['size']} px")
    return ", ".join(words)


def _span(row: Row) -> str:
    ends = spread_of(row)
    if ends is None:
        return DASH
    unit = "share" if row.metric in SHARES - {"ratio_deviation"} else row.unit  # that one's spread is of ratios
    return f"{figure(ends[0], unit)} to {figure(ends[1], unit)}"


def spread_of(row: Row) -> tuple[float, float] | None:
    """`low` and `high`; None for one value, which earlier files have as its own spread."""
    if row.low is None or row.high is None or row.low == row.high:
        return None
    return row.low, row.high


def _ceiling(results: Results) -> Iterator[str]:
    for row in results.rows:
        if row.subject == "this machine" and row.metric == "matrix_product_flops":
            yield f"The peak: {value(row)}, the best float32 matrix product of this machine."


def _whys(results: Results) -> list[str]:
    """Why there are no figures of what did not run."""
    return sorted(
        {f"{row.subject}: {row.status}, {row.reason}" for row in results.rows if row.value is None and row.reason}
    )
