"""Outcomes of a session as Rows: percentiles, throughput, memory, sizes, shares of the ceiling, and paired ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffship.benchmarks.measure.case import IMAGE, Case, engine_of
from diffship.benchmarks.measure.intervals import ratio, spread, supports
from diffship.benchmarks.measure.materials import Materials
from diffship.benchmarks.measure.peers.table import PEERS
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.measure.session import Measurement, Outcome
from diffship.core.kind import DECODER, DENOISER, ENCODER, TEXT

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_WORST = ("OOM", "failed", "unsupported", "missing")  # which status a case has whose rounds ended differently


def rows_of(measurement: Measurement, suite: str) -> list[Row]:
    """All rows of a measurement, in the order of its cases; ratios of compared cases follow at the end."""
    rows = [
        Row(suite, "this machine", name, value, "bytes/s" if "bytes" in name else "FLOP/s", kind="load")
        for name, value in measurement.ceilings.items()
    ]
    for case, outcomes in measurement.outcomes.items():
        rows += _case_rows(suite, case, outcomes, measurement)
    return rows + _ratios(suite, measurement)


def _case_rows(suite: str, case: Case, outcomes: Sequence[Outcome], measurement: Measurement) -> list[Row]:
    materials = measurement.materials[case]
    shared: dict[str, Any] = {"conditions": {**case.conditions(materials.weights), "size": materials.size}}
    metric = _metric(case)
    good = [outcome for outcome in outcomes if outcome.status == "ok"]
    if not good:
        status = next(status for status in _WORST if any(outcome.status == status for outcome in outcomes))
        first = next(outcome for outcome in outcomes if outcome.status == status)
        return [Row(suite, case.subject, f"{metric}_p50", None, "s", status, reason=first.reason, **shared)]
    reason = "" if len(good) == len(outcomes) else f"{len(outcomes) - len(good)} of {len(outcomes)} rounds did not end"
    found = [*_times(metric, case, good), *_memory(good), *_facts(case, good, materials, measurement.ceilings)]
    return [Row(suite, case.subject, reason=reason, **{**shared, **entry}) for entry in found]


def _metric(case: Case) -> str:
    return "image_seconds" if case.part == IMAGE else "call_seconds"


def _times(metric: str, case: Case, good: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Percentiles over the calls of all rounds, their spread over the rounds; medians of what happens once a round.

    A percentile that so few calls do not have is left out.
    """
    every = [value for outcome in good for value in outcome.figures["seconds"]]
    found = []
    for name, share in QUANTILES.items():
        if supports(len(every), share):
            by_round = [float(np.quantile(outcome.figures["seconds"], share)) for outcome in good]
            value = float(np.quantile(every, share))
            found.append(_entry(f"{metric}_{name}", value, "s", by_round, n=len(every)))
    throughput = [case.batch / statistics.median(outcome.figures["seconds"]) for outcome in good]
    unit = "images/s" if case.part == IMAGE else "calls/s"
    found.append(_entry("throughput", statistics.median(throughput), unit, throughput))
    for name, key in (("load_seconds", "load"), ("warm_up_seconds", "first"), ("cold_start_seconds", "cold")):
        values = [float(outcome.figures[key]) for outcome in good]
        found.append(_entry(name, statistics.median(values), "s", values))
    return found


def _memory(good: Sequence[Outcome]) -> list[dict[str, Any]]:
    peaks = [float(outcome.peak_bytes) for outcome in good]
    found = [_entry("peak_host_bytes", max(peaks), "bytes", peaks, kind="memory")]
    device = [float(peak) for outcome in good if (peak := outcome.figures.get("device_peak")) is not None]
    return [*found, _entry("peak_device_bytes", max(device), "bytes", device, kind="memory")] if device else found


def _facts(
    case: Case, good: Sequence[Outcome], materials: Materials, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Sizes of the part, or of all parts for an image; if MACs are known, the rate that was achieved."""
    chosen = (
        [case.part] if case.part != IMAGE else [name for name in materials.parts if materials.roles[name] != ENCODER]
    )
    parts = [materials.parts[name] for name in chosen if name in materials.parts]
    found = [
        _plain("parameters", _sum(part["parameters"] for part in parts), ""),
        _plain("file_bytes", _sum(_file_bytes(case, part) for part in parts), "bytes"),
    ]
    for name in ("conv_linear_macs", "attention_macs"):
        found.append(_plain(name, _macs(case, materials, name), "MAC"))
    values = [entry["value"] for entry in found[-2:]]
    if None not in values:
        flops = 2 * sum(values) / statistics.median(v for outcome in good for v in outcome.figures["seconds"])
        found.append({"metric": "flops", "value": flops, "unit": "FLOP/s"})
        wide = "matrix_product_flops_fp16" if case.precision != "fp32" else "matrix_product_flops"
        ceiling = ceilings.get(wide) or ceilings.get("matrix_product_flops")
        if ceiling:
            found.append({"metric": "share_of_ceiling", "value": flops / ceiling, "unit": ""})
    return [entry for entry in found if entry["value"] is not None]


def _file_bytes(case: Case, part: Mapping[str, Any]) -> float | None:
    """Of an engine's own bundle; torch and peers read the source's folder."""
    sizes: Mapping[str, float] = part["file_bytes"]
    return sizes.get(engine_of(case.runner)[0], sizes.get("folder"))


def _macs(case: Case, materials: Materials, name: str) -> float | None:
    """Of one call, or of a whole image: denoiser calls times steps, the decoder once, the text encoders per prompt."""
    rows = materials.rows_per_image
    if case.part == IMAGE:
        calls = {DENOISER: case.steps * rows * case.batch, DECODER: case.batch, TEXT: rows}
        counts = {part: calls[role] for part, role in materials.roles.items() if role in calls}
    else:
        counts = {case.part: case.batch * (rows if materials.roles.get(case.part) == DENOISER else 1)}
    used = {part: count for part, count in counts.items() if part in materials.parts}
    return _sum(_times_or_none(materials.parts[part][name], count) for part, count in used.items())


def _times_or_none(value: float | None, count: int) -> float | None:
    return None if value is None else value * count


def _sum(values: Any) -> float | None:
    listed = list(values)
    return None if not listed or None in listed else float(sum(listed))


def _ratios(suite: str, measurement: Measurement) -> list[Row]:
    """Every one of our engines against every other runner of the same case, each pair once: time ratio over rounds."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in measurement.outcomes:
        groups.setdefault(case.group, []).append(case)
    rows = []
    for cases in groups.values():
        own = [case for case in cases if case.runner not in PEERS]
        others = [case for case in cases if case.runner in PEERS]
        pairs = [(ours, theirs) for place, ours in enumerate(own) for theirs in (*own[place + 1 :], *others)]
        rows += [row for pair in pairs if (row := _ratio(suite, *pair, measurement)) is not None]
    return rows


def _ratio(suite: str, ours: Case, theirs: Case, measurement: Measurement) -> Row | None:
    """Medians of a round's neighbouring calls if both took turns, else of the round; then over the rounds.

    `by_round` keeps each round's ratio, from which the interval can be computed again.
    """
    rounds = _side_by_side(measurement.outcomes[ours], measurement.outcomes[theirs])
    turns = min((len(outcome.figures.get("turns", ())) for pair in rounds for outcome in pair), default=0)
    if not rounds:
        return None
    a, b = ([_paired_values(pair[side], turns) for pair in rounds] for side in (0, 1))
    found = ratio(a, b)
    by_round = [round(ratio([x], [y]).mean, 6) for x, y in zip(a, b, strict=True)]
    materials = measurement.materials[ours]
    paired = "calls" if turns else "rounds"
    conditions = {**ours.conditions(materials.weights), "size": materials.size}
    return Row(
        suite,
        f"{ours.subject} against {theirs.runner}",
        f"{_metric(ours)}_ratio",
        found.mean,
        low=found.low,
        high=found.high,
        n=found.n,
        conditions={
            **conditions,
            "against": theirs.runner,
            "paired": paired,
            "pairs": sum(map(len, a)),
            "interval": found.how,
            "by_round": by_round,
        },
    )


def _side_by_side(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Pairs of one place, round by round; if neither shares its turns with anybody, pairs of one round."""
    by_place = {outcome.place: outcome for outcome in theirs}
    pairs = [(outcome, by_place[outcome.place]) for outcome in ours if outcome.place in by_place]
    if not pairs and len(ours) == len(theirs):
        pairs = [pair for pair in zip(ours, theirs, strict=True) if not any(o.figures.get("turns") for o in pair)]
    return [(a, b) for a, b in pairs if a.status == b.status == "ok"]


def _paired_values(outcome: Outcome, turns: int) -> list[float]:
    return outcome.figures.get("turns", [])[:turns] or [statistics.median(outcome.figures["seconds"])]


def _entry(
    metric: str, value: float, unit: str, by_round: Sequence[float], n: int | None = None, kind: str = "latency"
) -> dict[str, Any]:
    span = {**spread(by_round), "n": n or len(by_round)}
    return {"metric": metric, "value": value, "unit": unit, "kind": kind, **span}


def _plain(metric: str, value: float | None, unit: str) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": unit, "kind": "size"}
