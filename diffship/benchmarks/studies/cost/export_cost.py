"""Time and peak memory of whole exports, gate included, against `optimum-cli export onnx` on the same weights.

python -m diffship.benchmarks export-sd15
python -m diffship.benchmarks export-sdxl-fp16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.exports import SUITE, export_rows, runs_of, save_source
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.workbench import add_work, optimum_cli
from diffship.core.quiet import timing


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
