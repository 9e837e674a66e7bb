"""Rows of what ran, and the published figures beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.cli.output import size_text, table
from prove.catalogue import Checkpoint
from prove.published import SUITE, Page, figures_of
from prove.state import Outcome
from prove.steps import ORDER, Prover

# step -> (fact, metric, unit): what a step reports beside its own seconds and memory
FACTS = {
    "fetch": (("bytes", "download_bytes", "bytes"),),
    "export": (("bytes", "bundle_bytes", "bytes"),),
    "bench": (
        ("load_seconds", "load_seconds", "s"),
        ("unet_seconds", "unet_seconds", "s"),
        ("vae_decoder_seconds", "vae_decoder_seconds", "s"),
        ("image_seconds", "image_seconds", "s"),
        ("image_peak_bytes", "image_peak_bytes", "bytes"),
    ),
}
STATUS = {"ok": "ok", "failed": "failed", "OOM": "OOM", "blocked": "unsupported", "not yet": "unsupported"}


def rows_of(prover: Prover, entry: Checkpoint) -> list[Row]:
    """Figures of every step that ran, and one row `proved`: 1 only where all of them went well."""
    where = conditions(prover, entry)
    standing = prover.standing(entry)
    if standing is not None:
        return [_row(entry, "proved", None, "", STATUS[standing[0]], where, f"{standing[0]}: {standing[1]}")]
    outcomes = {step: outcome for step in ORDER if (outcome := prover.state.get(entry.name, step))}
    rows = [row for step, outcome in outcomes.items() for row in _step_rows(entry, step, outcome, where)]
    bad = next((outcome for outcome in outcomes.values() if outcome.result != "ok"), None)
    if bad is None and len(outcomes) == len(ORDER):
        return [*rows, _row(entry, "proved", 1.0, "", "ok", where)]
    status = STATUS[bad.result] if bad else "skipped"
    reason = f"{bad.result}: {bad.reason}" if bad else "not every step has run"
    return [*rows, _row(entry, "proved", None, "", status, where, reason)]


def conditions(prover: Prover, entry: Checkpoint) -> dict[str, Any]:
    """What a reader needs to compare: commit, licence, precision, engine, steps, pixels; no path of this machine."""
    fetched = prover.state.get(entry.name, "fetch")
    timed = prover.state.get(entry.name, "bench")
    box = prover.box
    found = {
        "repo": entry.repo,
        "commit": fetched.facts.get("commit") if fetched else entry.pinned,
        "revision_in_catalogue": entry.revision,
        "licence": (fetched.facts.get("licence") if fetched else "") or entry.licence,
        "target": box.target,
        "precision": box.precision,
        "engine": box.engine or (timed.facts.get("engine") if timed else None),
        "device": box.device,
        "steps": box.steps or entry.steps,
        "size": box.size or entry.size,
        "guidance": entry.guidance,
        "sampler": entry.sampler,
    }
    return {key: value for key, value in found.items() if value is not None}


def write_report(prover: Prover, entries: Sequence[Checkpoint], command: str) -> Path:
    """All rows into one result file; the file."""
    file = prover.box.out / "prove-real.json"
    rows = [row for entry in entries for row in rows_of(prover, entry)]
    settings = {"prompt": prover.catalogue.prompt, "seed": prover.catalogue.seed, "repeat": prover.box.repeat}
    write_result(file, SUITE, command, rows, settings)
    return file


def report_text(prover: Prover, entries: Iterable[Checkpoint], pages: Sequence[Page]) -> str:
    """A table of what was measured here, then the published figures of each checkpoint with their conditions."""
    lines, body = [], []
    for entry in entries:
        rows = {row.metric: row for row in rows_of(prover, entry)}
        body.append(_line(entry, rows))
        figures = figures_of(entry.name, pages)
        lines += [f"{entry.name}, published:", *(f"  {figure}" for figure in figures)] if figures else []
    head = ("checkpoint", "proved", "export s", "bundle", "load s", "image s", "peak", "conditions or reason")
    return "\n".join([table(head, body), *(["", *lines] if lines else [])])


def _line(entry: Checkpoint, rows: Mapping[str, Row]) -> tuple[object, ...]:
    proved = rows["proved"]
    where = proved.conditions
    said = proved.reason or ", ".join(
        f"{where[key]}{unit}" for key, unit in (("precision", ""), ("steps", " steps"), ("size", " px")) if key in where
    )
    values = [
        rows[name].value if name in rows else None for name in ("export_seconds", "load_seconds", "image_seconds")
    ]
    sizes = [rows[name].value if name in rows else None for name in ("bundle_bytes", "image_peak_bytes")]
    seconds = ["-" if value is None else f"{value:.1f}" for value in values]
    amounts = ["-" if value is None else size_text(int(value)) for value in sizes]
    answer = "yes" if proved.value else ("no" if proved.status == "failed" else "-")
    return entry.name, answer, seconds[0], amounts[0], seconds[1], seconds[2], amounts[1], said


def _step_rows(entry: Checkpoint, step: str, outcome: Outcome, where: Mapping[str, Any]) -> list[Row]:
    status = STATUS[outcome.result]
    value = outcome.seconds if outcome.result == "ok" else None
    rows = [_row(entry, f"{step}_seconds", value, "s", status, where, outcome.reason)]
    if outcome.result != "ok":
        return rows
    if outcome.peak_bytes:
        rows.append(_row(entry, f"{step}_peak_bytes", float(outcome.peak_bytes), "bytes", status, where))
    for fact, metric, unit in FACTS.get(step, ()):
        if isinstance(outcome.facts.get(fact), (int, float)):
            rows.append(_row(entry, metric, float(outcome.facts[fact]), unit, status, where))
    return rows + (_part_rows(entry, outcome, where) if step == "verify" else [])


def _part_rows(entry: Checkpoint, outcome: Outcome, where: Mapping[str, Any]) -> list[Row]:
    """The worst output of every part against its golden vectors; equal bits have no PSNR."""
    rows = []
    for part in outcome.facts.get("parts", ()):
        for fact, unit, worst in (("max_abs", "", max), ("psnr_db", "dB", min)):
            outputs = (part.get("report") or {}).get("outputs", ())
            values = [output[fact] for output in outputs if isinstance(output.get(fact), (int, float))]
            if values:
                rows.append(_row(entry, f"{part['part']}_{fact}", float(worst(values)), unit, "ok", where))
    return rows


def _row(
    entry: Checkpoint,
    metric: str,
    value: float | None,
    unit: str,
    status: str,
    where: Mapping[str, Any],
    reason: str = "",
) -> Row:
    return Row(
        suite=SUITE,
        subject=entry.name,
        metric=metric,
        value=None if value is None else float(f"{value:.6g}"),
        unit=unit,
        status=status,
        kind=_kind(metric, unit),
        reason=reason,
        conditions=dict(where),
    )


def _kind(metric: str, unit: str) -> str:
    if unit == "bytes":
        return "memory" if metric.endswith("peak_bytes") else "size"
    return "latency" if unit == "s" else "quality"
