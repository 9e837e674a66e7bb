"""What the published repositories say of themselves, as data; and the pages of docs/reproduce made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffship.benchmarks.measure.record import Results, read_result
from diffship.benchmarks.measure.row import Row as MeasuredRow
from diffship.core.document import read_toml
from diffship.core.errors import ConfigError
from diffship.core.strict import bounds, load
from prove.capabilities import missing
from prove.catalogue import HERE, MAX_BYTES, Catalogue, Checkpoint, read_catalogue

PUBLISHED = HERE / "published"
ROOT = HERE.parents[1]
PAGES = ROOT / "docs" / "reproduce"
RESULTS = ROOT / "benchmarks" / "results"
SUITE = "prove-real"
Known = Mapping[tuple[str, str], str]
NETWORK = "needs a networked machine and the published weights"


@dataclass(frozen=True)
class Command:
    """One command of a published repository and ours for the same; `ours` is empty where there is nothing to run."""

    title: str
    theirs: str
    ours: str
    needs: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Smaller:
    """By how much the `metric` of each of `subjects` is smaller than that of `against`, in a file of results."""

    results: str
    metric: str
    subjects: tuple[str, ...]
    against: str


@dataclass(frozen=True)
class Row:
    """One row of a published table. `checkpoints` are the catalogue's rows that re-prove it.

    Without one, `smaller` is what was counted here, or `run` is our command for it and `needs` names the capabilities
    that the command takes.
    """

    cells: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()
    smaller: Smaller | None = None
    run: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """`conditions`: hardware, step counts, size and precision, as far as the source states them.

    `metric` is the one of our results that stands against it.
    """

    title: str
    source: str
    conditions: str
    columns: tuple[str, ...]
    row: tuple[Row, ...]
    metric: str = "image_seconds"
    needs: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.row:
            if len(row.cells) != len(self.columns):
                raise ConfigError(f"{self.title}: {row.cells[0]!r} has {len(row.cells)} cells, not {len(self.columns)}")


@dataclass(frozen=True)
class Here:
    """What was measured on a model that is here (`emoji`, random weights) instead of the published one.

    `results` is a file of benchmarks/results without its suffix, `page` where its table stands, below docs.
    """

    what: str
    results: str
    page: str


@dataclass(frozen=True)
class Page:
    """One published repository, at the commit that was read."""

    schema: int = field(metadata=bounds(1, 1))
    name: str
    title: str
    repository: str
    commit: str
    licence: str
    intro: str
    command: tuple[Command, ...]
    table: tuple[Table, ...]
    here: tuple[Here, ...] = ()


def read_pages(folder: Path = PUBLISHED) -> list[Page]:
    """Every page, by file name.

    Raises:
        ConfigError: a file that is not of the form above.
    """
    return [load(Page, read_toml(file, MAX_BYTES), file.name) for file in sorted(folder.glob("*.toml"))]


def figures_of(checkpoint: str, pages: Iterable[Page]) -> list[str]:
    """Published figures of one checkpoint, each with its conditions: what is printed beside the measured ones."""
    found = []
    for page in pages:
        for table in page.table:
            for row in table.row:
                if checkpoint in row.checkpoints:
                    cells = [f"{name} {cell}" for name, cell in zip(table.columns[1:], row.cells[1:], strict=True)]
                    found.append(f"{row.cells[0]}: {'; '.join(cells)} ({table.conditions}; {table.source})")
    return found


def measured_here(folder: Path = RESULTS) -> Known:
    """(checkpoint, metric) -> what a committed result says of it, in Markdown; only rows with status ok count.

    Raises:
        ConfigError: a results file was edited by hand, or is of another schema.
    """
    found: dict[tuple[str, str], str] = {}
    for file in sorted(folder.glob(f"{SUITE}*.json")):
        results = read_result(file)
        for row in results.rows:
            if row.status == "ok" and row.unit == "s":
                said = f"measured: {_figure(row, results)} ([{file.name}]({_link(file)}))"
                found[row.subject, row.metric] = said
    return found


def result_of(row: Row, table: Table, catalogue: Catalogue, known: Known) -> str:
    """`measured: ...`, `not yet: ...` or "unproven: run `...`"; a dash where there is nothing of ours to run."""
    if lacking := missing([*table.needs, *row.needs]):
        return f"not yet: {', '.join(lacking)}"
    if row.smaller is not None:
        return counted(row.smaller)
    if not row.checkpoints:
        return f"unproven: run `{row.run}`" if row.run else "-"
    said = {name: _standing(catalogue.checkpoints[name], table.metric, known) for name in row.checkpoints}
    if len(said) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{name}: {text}" for name, text in said.items())


def counted(wanted: Smaller, folder: Path = RESULTS) -> str:
    """`measured: 54.8 % and 69.5 % smaller`, with the file that says so.

    Raises:
        ConfigError: the file has no such row.
    """
    file = folder / f"{wanted.results}.json"
    values = {row.subject: row.value for row in read_result(file).rows if row.metric == wanted.metric}
    shares = []
    for subject in wanted.subjects:
        mine, theirs = values.get(subject), values.get(wanted.against)
        if not mine or not theirs:
            raise ConfigError(f"{file.name} has no {wanted.metric} of {subject} and {wanted.against}")
        shares.append(f"{1 - mine / theirs:.1%}".replace("%", " %"))
    return f"measured: {' and '.join(shares)} smaller ([{file.name}]({_link(file)}))"


def _standing(entry: Checkpoint, metric: str, known: Known) -> str:
    if (entry.name, metric) in known:
        return known[entry.name, metric]
    if lacking := missing(entry.needs):
        return f"not yet: {', '.join(lacking)}"
    return f"unproven: run `{prove_command(entry.name)}`"


def prove_command(checkpoint: str) -> str:
    """The command that re-proves one checkpoint."""
    return f"python scripts/prove_real.py --only {checkpoint}"


def page_text(page: Page, catalogue: Catalogue, known: Known) -> str:
    """The Markdown page; made again by `python scripts/prove_real.py --pages`."""
    lines = [
        f"# Reproducing {page.title}",
        "",
        f"<!-- made from scripts/prove/published/{page.name}.toml; write it again with "
        "`python scripts/prove_real.py --pages` -->",
        "",
        f"<{page.repository}> at commit `{page.commit[:12]}`; {page.licence}.",
        "",
        page.intro.strip(),
        "",
        "A result is *measured* where a committed file in `benchmarks/results/` holds it, *unproven* where the command",
        "exists and nobody has run it and committed what came out, and *not yet* where this version cannot do it.",
        "",
        "## Commands",
        "",
        "Ours are given in the folder of a clone, whose environment ([install](../install.md)) is active:",
        "",
        f"<!-- not run: {NETWORK} -->",
        "```sh",
        ". .venv/bin/activate",
        "```",
        "",
    ]
    for command in page.command:
        lines += _command(command)
    lines += ["## Tables", ""]
    for table in page.table:
        lines += _table(table, catalogue, known)
    lines += _here(page.here)
    return "\n".join(lines).rstrip() + "\n"


def write_pages(folder: Path = PAGES) -> list[Path]:
    """Write every page; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue, known, written = read_catalogue(), measured_here(), []
    for page in read_pages():
        file = folder / f"{page.name}.md"
        file.write_text(page_text(page, catalogue, known), encoding="utf-8")
        written.append(file)
    return written


def _command(command: Command) -> list[str]:
    lines = [f"### {command.title}", "", f"Result: {_verdict(command)}.", ""]
    lines += ["Theirs:", "", "```text", command.theirs.strip(), "```", ""]
    if command.ours:
        fence = ["```text"] if missing(command.needs) else [f"<!-- not run: {NETWORK} -->", "```sh"]
        title = "Ours, in the form that it will have:" if missing(command.needs) else "Ours:"
        lines += [title, "", *fence, command.ours.strip(), "```", ""]
    if command.note:
        lines += [command.note.strip(), ""]
    return lines


def _verdict(command: Command) -> str:
    """What came of it, which stands before the command: nobody should type one that is not yet there."""
    if lacking := missing(command.needs):
        return f"not yet: {', '.join(lacking)}"
    if not command.ours:
        return "nothing to run"
    return "nothing to measure" if command.ours.startswith("pip ") else "unproven: run the command below"


def _table(table: Table, catalogue: Catalogue, known: Known) -> list[str]:
    head = [*table.columns, "ours"]
    lines = [f"### {table.title}", "", f"Source: {table.source}. {table.conditions}.", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for row in table.row:
        lines.append(_line([*row.cells, result_of(row, table, catalogue, known)]))
    return [*lines, "", *([table.note.strip(), ""] if table.note else [])]


def _here(entries: Sequence[Here]) -> list[str]:
    if not entries:
        return []
    lines = [
        "## The method, measured here",
        "",
        "Without the published weights: quality on the trained test model, cost on random weights of full size.",
        "",
    ]
    for entry in entries:
        if not (RESULTS / f"{entry.results}.json").is_file():
            raise ConfigError(f"{entry.what!r}: there is no benchmarks/results/{entry.results}.json")
        link = _link(RESULTS / f"{entry.results}.json")
        lines.append(f"- {entry.what}: [table](../{entry.page}), [results]({link})")
    return [*lines, ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _figure(row: MeasuredRow, results: Results) -> str:
    units = {"steps": " steps", "size": " px", "precision": "", "engine": "", "device": ""}
    said = [f"{row.conditions[key]}{unit}" for key, unit in units.items() if row.conditions.get(key) is not None]
    return f"{row.value:g} s on {results.hardware}, {', '.join(said)}"


def _link(file: Path) -> str:
    return f"../../benchmarks/results/{file.name}"
