"""Write the tables and figures of README and docs from `benchmarks/results/*.json` alone: `make tables`.

    python -m diffship.benchmarks.publish [--root DIR] [--check] [--fresh] [--plots]

A page holds markers, and what stands between them is written here:

    <!-- table: cpu-edge parts -->     parts | ratios | figures | matrix | differences | proof of a file
                                       in results; engines | koala | lcm of all files; or
                                       measured: where the other tables and figures of the page come from
    <!-- end table -->
    <!-- figure: cold-start / emoji, 4 steps* / cold_start_seconds_median -->2.1 s<!-- end figure -->

`*` in a figure stands for any text of a subject; only one row may fit.

`--check` writes nothing and says which page is not what the files give; `--fresh` names results whose code has
changed, each with the command that measures it again.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from diffship.benchmarks.catalogue import BENCH, FILES, SIBLINGS, of_suite
from diffship.benchmarks.entry import EXPERIMENTS
from diffship.benchmarks.freshness import digest
from diffship.benchmarks.measure.bench import asked
from diffship.benchmarks.measure.record import Results, read_result, runners
from diffship.benchmarks.measure.suite import FOLDER, read_suite
from diffship.benchmarks.publish.choosing import engines_table
from diffship.benchmarks.report.hardware import koala_form, lcm_form
from diffship.benchmarks.report.plots import draw_all
from diffship.benchmarks.report.table import Table
from diffship.benchmarks.report.tables import (
    differences_table,
    figures_table,
    matrix_table,
    parts_table,
    ratios_table,
    shown,
    versions,
)
from diffship.benchmarks.studies.mutation.table import proof_table
from diffship.benchmarks.studies.quality.experiment import read_experiment
from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.strict import plain, unknown

RESULTS = Path("benchmarks") / "results"
IMAGES = Path("docs") / "images"
PAGES = ("README.md", "docs/*.md", "docs/reproduce/*.md", "diffship/models/*/README.md")
_TABLE = re.compile(r"(<!-- table: ([^\n]*?) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
_FIGURE = re.compile(r"(<!-- figure: ([^\n]*?) -->)(.*?)(<!-- end figure -->)", re.DOTALL)
_PLOT = re.compile(r"images/([\w-]+)\.svg\b")
_STRAY = re.compile(r"<!-- (?:end )?(?:table|figure)\b")
FORMS: dict[str, Callable[[Results], Table]] = {
    "parts": parts_table,
    "ratios": ratios_table,
    "figures": figures_table,
    "matrix": matrix_table,
    "differences": differences_table,
    "proof": proof_table,
}
MERGED: dict[str, Callable[[Sequence[Results]], Table]] = {
    "engines": engines_table,
    "koala": koala_form,
    "lcm": lcm_form,
}
MEASURED = "measured"


def read_all(root: Path) -> dict[str, Results]:
    """Every results file by its stem. Raises ConfigError for one that was edited by hand or has another schema."""
    return {file.stem: read_result(file) for file in sorted((root / RESULTS).glob("*.json"))}


def rendered(text: str, results: Mapping[str, Results], where: str) -> str:
    """The page with everything between markers written anew.

    Raises:
        ConfigError: a marker that names no results, row or form, or that is not closed.
    """
    used = _used(text, results)
    page = _TABLE.sub(lambda match: f"{match[1]}\n{_table(match[2], results, used, where)}\n\n{match[4]}", text)
    page = _FIGURE.sub(lambda match: f"{match[1]}{_figure(match[2], results, where)}{match[4]}", page)
    left = _STRAY.search(_FIGURE.sub("", _TABLE.sub("", page)))
    if left:
        raise ConfigError(f"{where}: a marker is not closed: {page[left.start() :][:80]!r}")
    return page


def publish(root: Path, check: bool = False) -> list[str]:
    """Write every page; the names of those that were not what the files give."""
    results = read_all(root)
    changed = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        new = rendered(text, results, page.relative_to(root).as_posix())
        if new != text:
            changed.append(page.relative_to(root).as_posix())
            if not check:
                write_file(page, new)
    return changed


def pages(root: Path) -> list[Path]:
    return sorted({page for pattern in PAGES for page in root.glob(pattern)})


def plots(root: Path) -> list[Path]:
    """Draw the plots that pages show, as SVG and PNG; the files."""
    wanted = {stem for page in pages(root) for stem in _PLOT.findall(page.read_text(encoding="utf-8"))}
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for results in read_all(root).values():
            with suppress(ConfigError):  # there is nothing in it to plot
                drawn = [file for file in draw_all(results, Path(folder)) if file.stem in wanted]
                written += [Path(shutil.copy(file, root / IMAGES)) for file in drawn]
    return written


def stale(root: Path) -> dict[str, str]:
    """Files whose figures are not of this code, with the reason: true then, to be measured again before a release."""
    found = {name: _aged(name, results, root) for name, results in read_all(root).items()}
    return {name: reason for name, reason in found.items() if reason}


def states(root: Path) -> dict[str, str]:
    """Every file of the catalogue: not measured, fresh, or why it is stale; with commit and date."""
    results, old = read_all(root), stale(root)
    return {name: _state(results[name], old.get(name)) if name in results else "not measured" for name in FILES}


def _state(results: Results, reason: str | None) -> str:
    env = results.environment
    return f"{reason or 'fresh'} (commit {env.get('commit')}, {env.get('date') or 'date not recorded'})"


def _aged(name: str, results: Results, root: Path) -> str:
    """Why figures are stale; empty if they are not."""
    entry = FILES.get(name) or of_suite(results.suite)
    if results.code != digest(entry, runners(results.rows)):
        return "measured with other code than this"
    wanted = _asked(entry.words, entry.module, root)
    known = {key: value for key, value in results.settings.items() if key in wanted}
    return "" if known == wanted else "its suite or experiment asks for something else now"


def _asked(words: Sequence[str], module: str, root: Path) -> dict[str, Any]:
    """What the suite's or experiment's file asks for today, as results keep it; nothing for commands without one."""
    if module == BENCH and words:
        return asked(read_suite(words[-1], root / FOLDER))
    if module == SIBLINGS:
        return dict(plain(read_experiment(root / EXPERIMENTS / words[0])))
    return {}


def _used(text: str, results: Mapping[str, Results]) -> dict[str, Results]:
    """The results that a page shows, if it has a table that says where they come from; nothing if it has none."""
    words = [match[2] for match in _TABLE.finditer(text)]
    if MEASURED not in words:
        return {}
    names = [*(word.rpartition(" ")[0] for word in words), *(m[2].partition(" / ")[0] for m in _FIGURE.finditer(text))]
    return {name: _todays(name, results) for name in dict.fromkeys(names) if name in results}


def _todays(name: str, results: Mapping[str, Results]) -> Results:
    """The results with the command of today, not the one of the day when they were measured."""
    return replace(results[name], command=FILES[name].command) if name in FILES else results[name]


def _table(words: str, results: Mapping[str, Results], used: Mapping[str, Results], where: str) -> str:
    name, _, form = words.rpartition(" ")
    if words in MERGED:
        return MERGED[words](list(results.values())).markdown()
    if words == MEASURED:
        return measured_table(used).markdown()
    if form not in FORMS:
        raise ConfigError(f"{where}: {unknown('form of a table', form, (*FORMS, *MERGED, MEASURED))}")
    if name not in results:
        return f"Not measured yet: `{FILES[name].command if name in FILES else f'diffship bench --suite {name}'}`"
    return FORMS[form](_todays(name, results)).markdown(origin=not used)


def measured_table(used: Mapping[str, Results]) -> Table:
    """A line for each results file of a page: commit, day, and what measures it again; machines and versions once."""
    lines = [
        (f"`{name}.json`", str(env.get("commit")), env.get("date") or "not recorded", f"`{found.command}`")
        for name, found in used.items()
        for env in [found.environment]
    ]
    machines: dict[str, list[str]] = {}
    for name, found in used.items():
        machines.setdefault(f"{found.hardware}; {versions(found)}", []).append(name)
    usual = max(machines, key=lambda machine: len(machines[machine]), default="")
    notes = [f"Measured on {usual}."] if usual else []
    notes += [f"{', '.join(names)}: on {machine}." for machine, names in machines.items() if machine != usual]
    return Table(("file", "commit", "day", "measured again by"), tuple(lines), tuple(notes))


def _figure(words: str, results: Mapping[str, Results], where: str) -> str:
    name, _, rest = words.partition(" / ")
    subject, _, metric = rest.rpartition(" / ")  # a subject may hold the separator itself
    if name not in results:
        raise ConfigError(f"{where}: the figure {words!r} has no JSON; there is no {(RESULTS / name).as_posix()}.json")
    rows = {(row.subject, row.metric): row for row in results[name].rows}
    if "*" in subject:
        fitting = [key for key in rows if key[1] == metric and fnmatchcase(key[0], subject)]
        subject = fitting[0][0] if len(fitting) == 1 else subject
    if (subject, metric) not in rows:
        near = difflib.get_close_matches(f"{subject} / {metric}", [" / ".join(key) for key in rows], 1, 0.5)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"{where}: {name}.json has no {metric!r} of {subject!r}{hint}")
    return shown(rows[subject, metric])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is out of date")
    parser.add_argument("--fresh", action="store_true", help="exit 1 if results were measured with other code")
    parser.add_argument(
        "--plots", action="store_true", help="draw the plots of the pages too (pip install 'diffship[plots]')"
    )
    arguments = parser.parse_args(argv)
    try:
        return _main(arguments)
    except DiffshipError as fault:
        print(f"publish: {fault}", file=sys.stderr)
        return fault.exit_code


def _main(arguments: argparse.Namespace) -> int:
    changed = publish(arguments.root, arguments.check)
    for page in changed:
        print(f"{page}: {'is not what the results give; run make tables' if arguments.check else 'written'}")
    if arguments.plots:
        print(*plots(arguments.root), sep="\n")
    old = stale(arguments.root) if arguments.fresh else {}
    for name, reason in old.items():
        command = FILES[name].command if name in FILES else read_all(arguments.root)[name].command
        print(f"{name}.json: {reason}; measure it again: {command}")
    return 1 if old or (changed and arguments.check) else 0
