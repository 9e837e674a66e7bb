"""Prove published checkpoints on a networked machine: download, export, verify, measure, draw, and compare.

    python scripts/prove_real.py --plan                      bytes, minutes, licences, revisions; needs no network
    python scripts/prove_real.py --only sd15,taesd           prove these; the same command goes on after an interruption
    python scripts/prove_real.py --offline --hub-cache DIR   only what the cache holds
    python scripts/prove_real.py --pin                       write the hub's commits over "unverified" in the catalogue
    python scripts/prove_real.py --pages                     write docs/reproduce again

The result is OUT/prove-real.json: commit it as benchmarks/results/prove-real-BOX.json, and write the pages again.
Exit codes: 0 all that could run went well, 1 a step failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from prove.catalogue import CATALOGUE, Checkpoint, pin, read_catalogue
from prove.plan import plan_text
from prove.published import read_pages, write_pages
from prove.report import report_text, write_report
from prove.state import State
from prove.steps import Box, Prover, resolve

from diffship.core.errors import DiffshipError
from diffship.core.registry import RUNNERS


def make_parser() -> argparse.ArgumentParser:
    """The parser; a test reads the workflow files with it."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--plan", action="store_true", help="print what would be done, and stop")
    action.add_argument("--pin", action="store_true", help="resolve unverified revisions and write them down")
    action.add_argument("--pages", action="store_true", help="write docs/reproduce from the published data")
    parser.add_argument("--only", metavar="A,B", default="", help="only these checkpoints")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/prove"), help="default: out/prove")
    parser.add_argument("--hub-cache", metavar="DIR", type=Path, help="the hub's cache (default: HF_HUB_CACHE)")
    parser.add_argument("--offline", action="store_true", help="take what the cache holds, download nothing")
    parser.add_argument("--to", choices=("onnx", "coreml", "tensorrt"), default="onnx", help="target (default: onnx)")
    parser.add_argument("--precision", default="fp32", help="of the export (default: fp32)")
    parser.add_argument("--engine", choices=tuple(RUNNERS), help="default: the first installed one")
    parser.add_argument("--device", help="the engine's device, such as cpu or cuda")
    parser.add_argument("--repeat", metavar="N", type=int, default=3, help="timed pictures; the first is a warm-up")
    parser.add_argument("--steps", metavar="N", type=int, help="instead of the catalogue's, for a trial run")
    parser.add_argument("--size", metavar="PX", type=int, help="instead of the catalogue's, for a trial run")
    parser.add_argument("--step-hours", metavar="H", type=float, default=6.0, help="a step is stopped after these")
    parser.add_argument("--catalogue", metavar="FILE", type=Path, default=CATALOGUE, help="another catalogue")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Exit code; every expected error is one line."""
    arguments = list(sys.argv[1:] if words is None else words)
    options = make_parser().parse_args(arguments)
    try:
        return run(options, " ".join(["python scripts/prove_real.py", *arguments]))
    except DiffshipError as fault:
        print(f"prove_real: {fault}", file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        print("prove_real: interrupted; the same command goes on with the step that was not finished", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, command: str) -> int:
    """One action; raises DiffshipError for what the command line got wrong."""
    if options.pages:
        print("\n".join(f"wrote {file.relative_to(file.parents[2])}" for file in write_pages()))
        return 0
    catalogue = read_catalogue(options.catalogue)
    entries = catalogue.chosen(name.strip() for name in options.only.split(",") if name.strip())
    prover = Prover(catalogue, box_of(options), State(options.out / "state.json"))
    if options.pin:
        return pin_revisions(options.catalogue, prover, entries)
    print(plan_text(prover, entries), flush=True)
    return 0 if options.plan else prove(prover, entries, command)


def prove(prover: Prover, entries: Sequence[Checkpoint], command: str) -> int:
    """Every entry; one that fails does not keep the next from its turn. 1 where one failed."""
    print(flush=True)
    results = []
    for entry in entries:
        results.append(prover.prove(entry))
        file = write_report(prover, entries, command)  # after each, so that an interruption loses nothing
    print(f"\n{report_text(prover, entries, read_pages())}\n\nresult: {file}")
    return 1 if {"failed", "OOM"} & set(results) else 0


def pin_revisions(file: Path, prover: Prover, entries: Sequence[Checkpoint]) -> int:
    """Ask for the commit of every unverified row and write it into the catalogue; 1 where one did not answer."""
    commits, failed = {}, 0
    for entry in entries:
        if entry.pinned is None:
            outcome = resolve(prover.box, entry)
            failed += outcome.result != "ok"
            if outcome.result == "ok":
                commits[entry.name] = str(outcome.facts["commit"])
            print(f"{entry.name}: {commits.get(entry.name, outcome.reason)}")
    print(f"pinned: {', '.join(pin(file, commits)) or 'nothing'}")
    return 1 if failed else 0


def box_of(options: argparse.Namespace) -> Box:
    """How this machine proves, from the flags."""
    return Box(
        out=options.out,
        target=options.to,
        precision=options.precision,
        engine=options.engine,
        device=options.device,
        hub_cache=options.hub_cache,
        offline=options.offline,
        repeat=options.repeat,
        step_seconds=options.step_hours * 3600,
        steps=options.steps,
        size=options.size,
    )


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a cancelled job ends like Ctrl-C: no step is left running
    sys.exit(main())
