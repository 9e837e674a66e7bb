"""Time and peak memory of whole exports, gate included, against `optimum-cli export onnx` on the same weights.

python -m diffship.benchmarks export-sd15
python -m diffship.benchmarks export-sdxl-fp16
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffship.benchmarks.entry import enter
from diffship.benchmarks.process import Measured, measure
from diffship.benchmarks.record import write_result
from diffship.benchmarks.workbench import add_work, optimum_cli
from diffship.core.quiet import timing
from diffship.core.row import Row
from diffship.models.saving import save

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
        from diffship.models.sources import open_source

        save(open_source(source), folder)


def export_rows(run: ExportRun, model: str, precision: str, timeout: float, keep: bool = False) -> list[Row]:
    """Run one export into its folder, emptied before, and removed after unless `keep`."""
    shutil.rmtree(run.target, ignore_errors=True)
    measured = measure(run.command, timeout=timeout)
    size = sum(file.stat().st_size for file in run.target.rglob("*") if file.is_file()) if run.target.exists() else 0
    if not keep:
        shutil.rmtree(run.target, ignore_errors=True)
    return rows_of(run.subject, measured, size, model, precision)


def run(arguments: argparse.Namespace, say: Callable[[str], object] = lambda text: None) -> list[Row]:
    folder = arguments.work / arguments.source.replace(":", "-")
    save_source(arguments.source, folder)
    peer = None if arguments.no_optimum else arguments.optimum_cli or str(optimum_cli())
    rows = []
    with timing(SUITE):
        for entry in runs_of(folder, arguments.work, arguments.precision, peer):
            found = export_rows(entry, arguments.source, arguments.precision, arguments.timeout, arguments.keep)
            say(f"{entry.subject}: " + ", ".join(f"{row.value} {row.unit} {row.reason}".strip() for row in found))
            rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="arch:sd15")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--optimum-cli", metavar="PATH", help="of .venv-optimum, which is made if need be")
    parser.add_argument("--no-optimum", action="store_true", help="ours alone")
    parser.add_argument("--keep", action="store_true", help="leave the exports in the work folder")
    parser.add_argument("--timeout", type=float, default=3000)
    add_work(parser)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = run(arguments, lambda text: print(text, file=sys.stderr))
    if arguments.out:
        command = f"python -m diffship.benchmarks {arguments.out.stem}"
        write_result(arguments.out, SUITE, command, rows, {"source": arguments.source})
    for row in rows:
        print(f"{row.subject:22} {row.metric:28} {row.value} {row.unit} {row.status}")


if __name__ == "__main__":
    enter(main)
