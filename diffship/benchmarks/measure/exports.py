"""Time and peak memory of one whole export, ours or the peer's, as rows."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from diffship.benchmarks.measure.process import Measured, measure
from diffship.benchmarks.measure.row import Row

OURS = "diffship"
GRAPH_ONLY = "diffship --no-verify"
PEER = "optimum-cli"
SUITE = "export"
UNITS = {
    "export_seconds": ("s", "latency"),
    "export_peak_resident_bytes": ("bytes", "memory"),
    "export_bytes_on_disk": ("bytes", "size"),
}


@dataclass(frozen=True)
class ExportRun:
    """One export to measure: the command and the folder that it writes."""

    subject: str
    command: list[str]
    target: Path


def runs_of(source: Path, work: Path, precision: str, optimum_cli: str | None) -> list[ExportRun]:
    """Ours with and without the gate, and the peer's with its own validation."""
    export = [sys.executable, "-m", "diffship", "export", str(source), "--to", "onnx", "--precision", precision]
    ours, bare, theirs = (work / name for name in ("ours", "ours-unproven", "optimum"))
    runs = [
        ExportRun(OURS, [*export, "-o", str(ours)], ours),
        ExportRun(GRAPH_ONLY, [*export, "-o", str(bare), "--no-verify"], bare),
    ]
    if optimum_cli:
        peer = [optimum_cli, "export", "onnx", "--model", str(source), "--task", "text-to-image", str(theirs)]
        runs.append(ExportRun(PEER, peer, theirs))
    return runs


def rows_of(subject: str, measured: Measured, size: int, model: str, precision: str) -> list[Row]:
    """Seconds, peak memory and size on disk; a failed export is one row that says why."""
    conditions = {"model": model, "runner": subject, "part": "export", "precision": precision}
    if measured.code:
        reason = measured.reason
        return [Row(SUITE, subject, "export_seconds", None, "s", measured.status, reason=reason, conditions=conditions)]
    values = (measured.seconds, measured.peak_bytes, size)
    return [
        Row(SUITE, subject, metric, value, unit, kind=kind, conditions=conditions)
        for (metric, (unit, kind)), value in zip(UNITS.items(), values, strict=True)
    ]


def save_source(source: str, folder: Path) -> None:
    """Write the weights that every subject exports, as a diffusers folder."""
    if not folder.exists():
        from diffship.models.saving import save
        from diffship.models.sources.opening import open_source

        save(open_source(source), folder)


def export_rows(run: ExportRun, model: str, precision: str, timeout: float, keep: bool = False) -> list[Row]:
    """Run one export into its folder, emptied before, and removed after unless `keep`."""
    shutil.rmtree(run.target, ignore_errors=True)
    measured = measure(run.command, timeout=timeout)
    size = sum(file.stat().st_size for file in run.target.rglob("*") if file.is_file()) if run.target.exists() else 0
    if not keep:
        shutil.rmtree(run.target, ignore_errors=True)
    return rows_of(run.subject, measured, size, model, precision)
