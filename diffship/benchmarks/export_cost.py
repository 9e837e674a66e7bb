"""Time and peak memory of whole exports, gate included, against `optimum-cli export onnx` on the same weights.

    python -m diffship.benchmarks.export_cost --source arch:sd15 --work FOLDER --out FILE \
        [--optimum-cli PATH]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from diffship.benchmarks.process import Measured, measure
from diffship.benchmarks.record import write_result
from diffship.core.row import Row

OURS = "diffship"
GRAPH_ONLY = "diffship --no-verify"


def commands(source: Path, work: Path, precision: str, optimum_cli: str | None) -> dict[str, list[str]]:
    """The exports to measure: ours with and without the gate, and the peer's with its own validation."""
    export = [sys.executable, "-m", "diffship", "export", str(source), "--to", "onnx", "--precision", precision]
    chosen = {
        OURS: [*export, "-o", str(work / "ours")],
        GRAPH_ONLY: [*export, "-o", str(work / "ours-unproven"), "--no-verify"],
    }
    if optimum_cli:
        peer = [optimum_cli, "export", "onnx", "--model", str(source), "--task", "text-to-image"]
        chosen["optimum-cli"] = [*peer, str(work / "optimum")]
    return chosen


def rows_of(subject: str, measured: Measured, size: int) -> list[Row]:
    """Seconds, peak memory and size on disk; a failed export is a row with its exit code."""
    status = "ok" if measured.code == 0 else "failed"
    figures = {
        "export_seconds": (measured.seconds, "s"),
        "export_peak_resident_bytes": (measured.peak_bytes, "bytes"),
        "export_bytes_on_disk": (size, "bytes"),
    }
    return [
        Row(suite="export", subject=subject, metric=metric, value=value, unit=unit, status=status, environment={})
        for metric, (value, unit) in figures.items()
    ]


def save_source(source: str, folder: Path) -> None:
    """Write the weights that every subject exports, as a diffusers folder."""
    if not folder.exists():
        from diffship.models.sources import open_source

        open_source(source).save(folder)


def run(arguments: argparse.Namespace) -> list[Row]:
    folder = arguments.work / arguments.source.replace(":", "-")
    save_source(arguments.source, folder)
    rows = []
    chosen = commands(folder, arguments.work, arguments.precision, arguments.optimum_cli)
    for subject in arguments.subjects or chosen:
        target = Path(
            chosen[subject][-1] if subject == "optimum-cli" else chosen[subject][chosen[subject].index("-o") + 1]
        )
        shutil.rmtree(target, ignore_errors=True)
        measured = measure(chosen[subject], timeout=arguments.timeout)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) if target.exists() else 0
        rows += rows_of(subject, measured, size)
        text = f"{subject}: {measured.seconds:.0f} s, peak {measured.peak_bytes / 2**30:.2f} GiB, exit {measured.code}"
        print(text, file=sys.stderr)
        if measured.code:
            print(measured.output[-2000:], file=sys.stderr)
        if not arguments.keep:
            shutil.rmtree(target, ignore_errors=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="arch:sd15")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--subjects", nargs="*")
    parser.add_argument("--optimum-cli")
    parser.add_argument("--keep", action="store_true", help="leave the exports in the work folder")
    parser.add_argument("--timeout", type=float, default=3000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = run(arguments)
    if arguments.out:
        command = (
            f"python -m diffship.benchmarks.export_cost --source {arguments.source} --precision {arguments.precision}"
        )
        write_result(arguments.out, "export", command, rows, {"source": arguments.source})
    for row in rows:
        print(f"{row.subject:22} {row.metric:28} {row.value} {row.unit} {row.status}")


if __name__ == "__main__":
    main()
