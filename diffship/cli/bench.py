"""bench: measure bundles and sources, in our engines and in other toolchains, as rows that say where they come from."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.benchmarks.measure.peers.table import PEERS
from diffship.cli.flags import names, numbers
from diffship.cli.output import Result
from diffship.cli.places import add_overwrite, refuse_taken, require_file_place
from diffship.cli.progress import Stages, say
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.lazy import need
from diffship.core.outcome import outcome
from diffship.core.registry import RUNNERS
from diffship.core.strict import load, unknown

if TYPE_CHECKING:
    from diffship.benchmarks.measure.case import Bench
    from diffship.benchmarks.measure.record import Results
    from diffship.benchmarks.measure.suite import Suite
    from diffship.benchmarks.report.table import Table

_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([kmg]?)(i?)b?\Z")
SHAPES = ("engines", "against", "parts", "batches", "steps", "size", "guidance", "sampler", "precision", "device")
BENCH_FIELDS = (*SHAPES, "calls", "images", "together")
EXAMPLES = """examples:
  diffship bench out/emoji --parts unet,image --steps 4 --rounds 1
  diffship bench emoji --against diffusers,optimum-intel --json out/emoji.json
  diffship bench --suite cpu-edge -o benchmarks/results/cpu-edge.json --resume
  diffship bench --merge benchmarks/results/*.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", metavar="TARGET", nargs="*", default=[], help="bundles or sources")
    parser.add_argument("--suite", metavar="NAME", help="what benchmarks/suites/NAME.toml (or a .toml file) says")
    parser.add_argument("--merge", metavar="FILE", type=Path, nargs="+", help="join results of several machines")
    _add_shapes(parser.add_argument_group("what is measured"))
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", metavar="N", type=int, help="times that all rows are measured, interleaved (3)")
    how.add_argument("--resume", action="store_true", help="keep what an interrupted run of the same code measured")
    how.add_argument("--memory-limit", metavar="BYTES", type=byte_count, help="per row, such as 4GB; above it is OOM")
    how.add_argument("--timeout", metavar="S", type=float, default=3600, help="per row, in seconds (3600)")
    how.add_argument("--work", metavar="DIR", type=Path, default=Path("out/bench"), help="keeps exports (out/bench)")
    how.add_argument("--no-install", action="store_true", help="make no environments for peers; missing ones are rows")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE.json", nargs="?", type=json_name, help="as -o; alone: on stdout")
    out.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the results file")
    out.add_argument("--csv", metavar="FILE", type=Path, help="every row, for a spreadsheet")
    out.add_argument("--markdown", metavar="FILE", type=Path, help="the tables")
    out.add_argument("--plots", metavar="DIR", type=Path, help="memory bars, roofline, latency against quality")
    add_overwrite(out, "results, tables and plots")


def _add_shapes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--engines", metavar="A,B", type=names, help=f"ours: {', '.join(RUNNERS)} (the installed ones)")
    group.add_argument("--against", metavar="A,B", type=names, help=f"other people's: {', '.join(PEERS)}")
    group.add_argument("--parts", metavar="A,B", type=names, help="part names and image (all)")
    group.add_argument("--batches", metavar="N,M", type=numbers, help="images at once (1)")
    group.add_argument("--steps", metavar="N,M", type=numbers, help="denoising steps of images (4)")
    group.add_argument("--size", metavar="N", type=int, help="pixels a side (the model's)")
    group.add_argument("--guidance", metavar="X", type=float, help="weight of the prompt (7.5)")
    group.add_argument("--sampler", choices=("ddim", "euler", "lcm"), help="the same for everyone (euler)")
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="of the weights (fp32)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="where it is computed (cpu)")
    group.add_argument("--calls", metavar="N", type=int, help="timed calls of a part per round (5)")
    group.add_argument("--images", metavar="N", type=int, help="timed images per round (1)")
    group.add_argument("--together", metavar="N", type=int, help="compared runners that are loaded at once (what fits)")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading an engine."""


def run(options: argparse.Namespace) -> Result:
    from diffship.benchmarks.measure.record import read_result, save
    from diffship.benchmarks.report.tables import best

    file = _output(options)
    _check_places(options, file)
    if options.merge:
        return _merge(options, [read_result(path) for path in options.merge])
    suite = _suite(options)
    _refuse_taken(options, None if options.resume else file, [suite.name])
    results = _measured(options, suite)
    writers = _side_files(options, [results], _tables(results))
    if file:
        writers.insert(0, partial(save, file, results))
    tables = [table for table in _tables(results) if table.rows]
    blocks = [table.text(origin=table is tables[-1]) for table in tables]
    text = "\n\n".join([*blocks, "\n".join(best(results))]).strip()
    failed = any(row.status == "failed" for row in results.rows)
    return Result({"results": results.to_json()}, text, _written(writers) or int(failed))


def byte_count(text: str) -> int:
    """`4GB`, `512MiB`, `1000000`."""
    found = _BYTES.match(text.lower())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** "_kmg".index(found[2] or "_")) if found else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 4GB or 512MiB")
    return size


def json_name(text: str) -> Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end with .json; for JSON on stdout put --json last")
    return Path(text)


def prints_json(words: Sequence[str]) -> bool:
    """Whether `--json` among these words is the one without a file."""
    at = words.index("--json") if "--json" in words else -1
    return at >= 0 and not (at + 1 < len(words) and words[at + 1].endswith(".json"))


def _output(options: argparse.Namespace) -> Path | None:
    named = [path for path in (options.output, options.json) if path is not None]
    if len(named) > 1:
        raise ConfigError("-o and --json FILE name the same thing; give one of them")
    if named and options.merge:
        raise ConfigError("--merge measures nothing; use --markdown or --csv to keep its tables")
    return named[0] if named else None


def _check_places(options: argparse.Namespace, file: Path | None) -> None:
    """Raises what would keep the results from being written, before anything is measured."""
    plots, work = (folder and folder / "name" for folder in (options.plots, options.work))
    places = {
        "-o" if options.output else "--json": file,
        "--csv": options.csv,
        "--markdown": options.markdown,
        "--plots": plots,
        "--work": work,
    }
    for flag, place in places.items():
        if place is not None:
            require_file_place(place, flag)
    if options.plots is not None:
        need("matplotlib")


def _refuse_taken(options: argparse.Namespace, file: Path | None, suites: Sequence[str]) -> None:
    """Raises ConfigError if what is to be written would replace something, or itself."""
    from diffship.benchmarks.report.plots import stems

    named = {"-o" if options.output else "--json": file, "--csv": options.csv, "--markdown": options.markdown}
    places = [(flag, path) for flag, path in named.items() if path]
    if options.plots:
        places += [("--plots", path) for suite in suites for path in stems(options.plots, suite)]
    refuse_taken(places, options.overwrite)


def _suite(options: argparse.Namespace) -> Suite:
    from diffship.benchmarks.measure.case import engine_of
    from diffship.benchmarks.measure.suite import Suite, read_suite

    given = {name: value for name in BENCH_FIELDS if (value := getattr(options, name)) is not None}
    if options.suite:
        if options.targets or given:
            stray = options.targets[0] if options.targets else f"--{next(iter(given))}"
            raise ConfigError(f"--suite says what is measured; leave {stray} out")
        return read_suite(options.suite)
    engines = [engine_of(runner)[0] for runner in options.engines or ()]
    for kind, legal, found in (("engine", RUNNERS, engines), ("peer", PEERS, options.against or ())):
        for name in found:
            if name not in legal:
                raise ConfigError(unknown(kind, name, legal))
    return Suite("bench", "diffship bench", 3, (_bench({"targets": tuple(options.targets), **given}),), ())


def _bench(given: dict[str, Any]) -> Bench:
    from diffship.benchmarks.measure.case import Bench

    try:
        return load(Bench, given, "bench")
    except ConfigError as fault:  # the verb says whose message it is
        raise ConfigError(re.sub(r"\Abench(: |\.)", "", str(fault))) from None


def _measured(options: argparse.Namespace, suite: Suite) -> Results:
    from diffship.benchmarks.measure.bench import run_suite
    from diffship.benchmarks.measure.session import Settings

    rounds = suite.rounds if options.rounds is None else options.rounds
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: at least 1 is measured")
    if not 0 < options.timeout < math.inf:
        raise ConfigError(f"--timeout {options.timeout} is no number of seconds above 0")
    settings = Settings(
        work=options.work.resolve(),
        root=Path.cwd(),
        rounds=rounds,
        timeout=options.timeout,
        memory_limit=options.memory_limit,
        resume=options.resume,
        install=not options.no_install,
    )
    with Stages(options.quiet) as stages:
        return run_suite(suite, _command(options), settings, stages)


def _command(options: argparse.Namespace) -> str:
    """The command that repeats this; folders and files of this machine are left out."""
    from diffship.benchmarks.measure.case import label

    words = ["diffship", "bench", *([f"--suite {options.suite}"] if options.suite else map(label, options.targets))]
    for name in (*BENCH_FIELDS, "rounds", "memory_limit"):
        value = getattr(options, name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{name.replace('_', '-')} {shlex.quote(text)}")
    return " ".join(words)


def _tables(results: Results) -> list[Table]:
    from diffship.benchmarks.report.tables import parts_table, ratios_table

    return [parts_table(results), ratios_table(results)]


def _merge(options: argparse.Namespace, files: list[Results]) -> Result:
    from diffship.benchmarks.report.hardware import merged

    if options.targets or options.suite:
        raise ConfigError("--merge reads results; leave targets and --suite out")
    _refuse_taken(options, None, [results.suite for results in files])
    tables = merged(files)
    code = _written(_side_files(options, files, list(tables.values())))
    text = "\n\n".join(f"In {name}:\n{table.text()}" for name, table in tables.items())
    shapes: dict[str, Any] = {
        name: {"head": list(table.head), "rows": [list(row) for row in table.rows], "notes": list(table.notes)}
        for name, table in zip(("koala", "lcm_lora"), tables.values(), strict=True)
    }
    return Result({"merged": shapes}, text, code)


def _side_files(options: argparse.Namespace, files: list[Results], tables: list[Table]) -> list[Callable[[], object]]:
    """What writes each of them."""
    from diffship.benchmarks.report.plots import draw_all
    from diffship.benchmarks.report.tables import csv_text

    markdown = "\n\n".join(table.markdown() for table in tables if table.rows) + "\n"
    texts = ((options.csv, csv_text(files)), (options.markdown, markdown))
    writers: list[Callable[[], object]] = [partial(_write, path, text) for path, text in texts if path]
    return [*writers, *(partial(draw_all, results, options.plots) for results in files if options.plots)]


def _write(path: Path, text: str) -> None:
    from diffship.core.atomic import write_file

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text)


def _written(writers: list[Callable[[], object]]) -> int:
    """Exit code of writing all that can be written: what was measured is printed, whatever becomes of the files."""
    code = 0
    for write in writers:
        try:
            write()
        except (DiffshipError, OSError) as fault:
            _, message, failed = outcome(fault)
            say(f"diffship bench: {message}")
            code = code or failed
    return code
