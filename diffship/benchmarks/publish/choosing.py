"""Which engine, when: our engines on each measured case, and what their time, memory and load say of the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffship.benchmarks.measure.record import Results
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.report.table import DASH, Table
from diffship.benchmarks.report.tables import KEYS, MEDIANS, OLD, OLD_NOTE, cases, labelled, part_text, said, value
from diffship.core.registry import RUNNERS

FASTER, SLOWER = "faster", "slower"
HEAD = ("to compute", "take", "it needs", "others", "how sure the times are")
Engines = dict[str, Mapping[str, Row]]


def engines_table(results: Sequence[Results]) -> Table:
    """A line for each case that at least two of our engines ran: the one to take, and what the others need.

    It is the fastest, unless the rounds show no difference in time: then it is the one that needs least memory.
    """
    lines = [_line(found, engines) for found in results for engines in _groups(found)]
    notes = (OLD_NOTE,) if any(OLD in line[-1] for line in lines) else ()
    return Table(HEAD, tuple(lines), notes, kept=("take",))


def _groups(results: Results) -> Iterator[Engines]:
    """Our engines by name, with their rows, of each case."""
    groups: dict[tuple[Any, ...], Engines] = {}
    at = KEYS.index("runner")
    for key, metrics in cases(results.rows).items():
        median = _median(metrics)
        if key[at] in RUNNERS and median is not None and median.value is not None:
            groups.setdefault((*key[:at], *key[at + 1 :]), {})[str(key[at])] = metrics
    return (engines for engines in groups.values() if len(engines) > 1)


def _line(results: Results, engines: Engines) -> tuple[str, ...]:
    fastest, *slower = sorted(engines, key=lambda name: _number(_median(engines[name])))
    verdicts = {name: _verdict(results, engines, fastest, name) for name in slower}
    equals = [fastest, *(name for name, text in verdicts.items() if text != FASTER)]
    take = min(equals, key=lambda name: _number(engines[name].get("peak_host_bytes")))
    conditions = next(iter(engines[take].values())).conditions
    others = [f"{name}: {_needs(engines[name])}" for name in (fastest, *slower) if name != take]
    sure = [f"{fastest} against {name}: {text}" for name, text in verdicts.items()]
    what = f"{labelled(conditions)}, {part_text(conditions)}, {conditions.get('device', 'cpu')}"
    return what, f"**{take}**", _needs(engines[take]), "; ".join(others), "; ".join(sure)


def _verdict(results: Results, engines: Engines, ours: str, theirs: str) -> str:
    """What the rounds say of `ours` against `theirs`, whichever way round it was measured."""
    conditions = next(iter(engines[ours].values())).conditions
    turned = {FASTER: SLOWER, SLOWER: FASTER}
    for row in results.rows:
        same = all(row.conditions.get(key) == conditions.get(key) for key in KEYS if key != "runner")
        pair = (row.conditions.get("runner"), row.conditions.get("against"))
        if same and row.value is not None and row.metric.endswith("_ratio") and set(pair) == {ours, theirs}:
            text = said(row)[2]
            return text if pair[0] == ours else turned.get(text, text)
    return "not compared"


def _needs(metrics: Mapping[str, Row]) -> str:
    """`652 ms, 184 MB, loads in 1.55 s`."""
    memory = metrics.get("peak_device_bytes") or metrics.get("peak_host_bytes")
    words = [value(_median(metrics)), value(memory), f"loads in {value(metrics.get('load_seconds'))}"]
    return ", ".join(word for word in words if not word.endswith(DASH))


def _median(metrics: Mapping[str, Row]) -> Row | None:
    return next((metrics[name] for name in MEDIANS if name in metrics), None)


def _number(row: Row | None) -> float:
    return float("inf") if row is None or row.value is None else row.value
