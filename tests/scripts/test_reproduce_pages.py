"""docs/reproduce is made from the published data, its commands exist, and nothing counts as measured that was not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import prove_real
import pytest
from PIL import Image
from prove.capabilities import CAPABILITIES, missing
from prove.catalogue import read_catalogue
from prove.published import (
    PAGES,
    Here,
    Page,
    Row,
    Smaller,
    Table,
    counted,
    figures_of,
    measured_here,
    page_text,
    prove_command,
    read_pages,
    result_of,
    write_pages,
)

from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row as Figure
from diffship.cli.compress import _flagged
from diffship.cli.main import parse
from diffship.core.errors import ConfigError, DiffshipError
from diffship.models.sources.opening import open_source

PUBLISHED = read_pages()
CATALOGUE = read_catalogue()
# lacking these, a command can parse and still have nothing that it could read or be judged by
BEYOND_THE_COMMAND_LINE = {"asymmetric-vae", "coco", "staged-controlnet", "transformer", "upscaler", "video"}
BY_NAME = {page.name: page for page in PUBLISHED}


def lines_of(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield shlex.split(line)


def parses(words: list[str]) -> bool:
    try:
        if words[0] == "torchrun" and words[1] == "--nproc-per-node" and words[2].isdigit():
            words = words[words.index("-m") + 1 :]
        if words[0] == "diffship":
            parse(words[1:])
        elif words[:2] == ["python", "scripts/prove_real.py"]:
            CATALOGUE.chosen(prove_real.make_parser().parse_args(words[2:]).only.split(","))
        else:
            return words[:2] == ["pip", "install"] or words == [".", ".venv/bin/activate"]
    except DiffshipError:
        return False
    return True


def ours() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(where, command, needs) of every command of ours."""
    for page in PUBLISHED:
        for command in page.command:
            yield f"{page.name}: {command.title}", command.ours, command.needs
        for table in page.table:
            for row in table.row:
                yield f"{page.name}: {table.title}: {row.cells[0]}", row.run, (*table.needs, *row.needs)


def test_the_pages_are_those_of_the_issue() -> None:
    assert sorted(BY_NAME) == ["asyncdiff", "hybrid-sd", "koala", "lcm-lora"]


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.name)
def test_the_committed_page_is_made_from_the_data(page: Page) -> None:
    text = (PAGES / f"{page.name}.md").read_text(encoding="utf-8")
    assert text == page_text(page, CATALOGUE, measured_here()), "run: python scripts/prove_real.py --pages"


@pytest.mark.parametrize(("where", "command", "needs"), [entry for entry in ours() if entry[1]], ids=lambda value: None)
def test_commands_exist_exactly_where_they_are_not_called_not_yet(
    where: str, command: str, needs: tuple[str, ...]
) -> None:
    fine = all(parses(words) for words in lines_of(command))
    if missing(needs):
        assert not fine or BEYOND_THE_COMMAND_LINE & set(needs), f"{where}: this exists; why is it not yet?"
    else:
        assert fine, f"{where}: {command}"


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.name)
def test_sh_blocks_hold_commands_that_parse_and_are_marked(page: Page) -> None:
    text = (PAGES / f"{page.name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(<!-- not run: [^>]+ -->\n)?```sh\n(.*?)```", text, re.DOTALL)
    assert blocks
    for mark, body in blocks:
        assert mark
        assert all(parses(words) for words in lines_of(body)), body


def test_what_was_measured_here_must_be_there() -> None:
    page = BY_NAME["hybrid-sd"]
    text = page_text(page, CATALOGUE, measured_here())
    for entry in page.here:
        assert f"[results](../../benchmarks/results/{entry.results}.json)" in text
        assert (PAGES.parent / entry.page.partition("#")[0]).is_file()
    false = replace(page, here=(Here("nothing", "no-such", "handoff.md"),))
    with pytest.raises(ConfigError, match=r"there is no benchmarks/results/no-such\.json"):
        page_text(false, CATALOGUE, measured_here())


def test_the_overview_links_every_page_and_its_commands_exist() -> None:
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([a-z-]+\.md)\)", text)) == {f"{name}.md" for name in BY_NAME}
    blocks = re.findall(r"(<!-- not run: [^>]+ -->\n)```sh\n(.*?)```", text, re.DOTALL)
    assert blocks and text.count("```sh") == len(blocks)
    for _, body in blocks:
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            if words == [".", ".venv/bin/activate"]:
                continue
            assert words[:2] == ["python", "scripts/prove_real.py"]
            prove_real.make_parser().parse_args(words[2:])


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.name)
def test_every_result_is_one_of_three(page: Page) -> None:
    text = (PAGES / f"{page.name}.md").read_text(encoding="utf-8")
    results = re.findall(r"^Result: (.*)\.$", text, re.MULTILINE)
    assert len(results) == len(page.command)
    legal = ("unproven: run the command below", "not yet: ", "nothing to run", "nothing to measure")
    assert all(result.startswith(legal) for result in results)
    rows = sum(len(table.row) for table in page.table)
    cells = [line.split(" | ")[-1].removesuffix(" |") for line in text.splitlines() if line.startswith("| ")]
    bodies = [cell for cell in cells if cell not in ("ours", "---")]
    assert len(bodies) == rows
    assert all(re.match(r"measured: |unproven: run `|not yet: |-$|[a-z0-9-]+: ", cell) for cell in bodies), bodies


def test_published_figures_are_the_published_ones() -> None:
    koala = {row.cells[0]: row.cells[1:] for row in BY_NAME["koala"].table[0].row}
    assert len(koala) == 11 and koala["koala-lightning-700M"] == ("2.88", "6.8", "1.94", "8.2", "0.66", "8.3")
    assert koala["sdxl-base-1.0"] == ("OOM", "-", "9.65", "10.4", "3.23", "11.9")
    lcm = {row.cells[0]: row.cells[1:] for row in BY_NAME["lcm-lora"].table[0].row}
    assert list(lcm.values()) == [
        ("6.5 s", "64 s"), ("4.7 s", "10.2 s"), ("1.4 s", "7 s"), ("0.7 s", "3.4 s"), ("8.4 s", "26.5 s"),
        ("1.2 s", "3.8 s"), ("29 s", "219 s"),
    ]  # fmt: skip
    hybrid = {row.cells[0]: row.cells[1:] for row in BY_NAME["hybrid-sd"].table[0].row}
    assert hybrid["SD1.5 tiny vae"] == ("16.4", "6929") and hybrid["SDXL baseline vae"] == ("802.7", "19203")
    configurations = BY_NAME["asyncdiff"].table[0].row
    assert len(configurations) == 18 and configurations[-1].cells[4:6] == ("3.65s", "3.8x")


def test_the_koala_figure_is_the_one_that_our_tables_show() -> None:
    from diffship.benchmarks.report.published import koala, lcm_lora

    def number(cell: str) -> float | None:
        return None if cell in ("OOM", "-") else float(cell.removesuffix(" s"))

    mine = [tuple(map(number, row.cells[at : at + 2])) for row in BY_NAME["koala"].table[0].row for at in (1, 3, 5)]
    assert mine == [(cell.seconds, cell.memory_gb) for cell in koala()]
    both = [number(cell) for row in BY_NAME["lcm-lora"].table[0].row for cell in row.cells[1:]]
    assert sorted(both) == sorted(cell.seconds for cell in lcm_lora())


def test_published_speed_ups_follow_from_published_latencies() -> None:
    """A slip of the pen in a latency or a speed-up would show here; theirs are rounded, some down."""
    base = 1.0
    for row in BY_NAME["asyncdiff"].table[0].row:
        latency, speed = float(row.cells[4].removesuffix("s")), float(row.cells[5].removesuffix("x"))
        base = latency if row.cells[1] == "original" else base
        assert abs(base / latency - speed) < 0.11, row.cells


def test_checkpoints_of_rows_are_in_the_catalogue_and_needs_are_capabilities() -> None:
    for page in PUBLISHED:
        assert re.fullmatch(r"[0-9a-f]{40}", page.commit)
        for table in page.table:
            for row in table.row:
                assert set(row.checkpoints) <= set(CATALOGUE.checkpoints)
                assert {*table.needs, *row.needs} <= set(CAPABILITIES)
    for entry in CATALOGUE.checkpoints.values():
        assert set(entry.needs) <= set(CAPABILITIES)


def test_figures_come_with_their_conditions() -> None:
    (figure, *_) = figures_of("koala-lightning-700m", PUBLISHED)
    assert "RTX 4090 24 GB, s 0.66" in figure and "10 steps" in figure and "1024 px" in figure
    assert figures_of("nobody", PUBLISHED) == []


def test_a_table_with_a_short_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 cells, not 2"):
        Table("t", "s", "c", ("a", "b"), (Row(("x",)),))


@pytest.mark.slow
def test_only_a_committed_measurement_is_called_measured(tmp_path: Path) -> None:
    table = Table("t", "s", "c", ("model", "s"), (Row(("SD 1.5", "1"), ("sd15",)), Row(("x", "1"))))
    assert result_of(table.row[0], table, CATALOGUE, {}) == f"unproven: run `{prove_command('sd15')}`"
    assert result_of(table.row[1], table, CATALOGUE, {}) == "-"

    def figure(metric: str, value: float | None, status: str) -> Figure:
        where = {"steps": 25, "size": 512, "precision": "fp32"}
        return Figure("prove-real", "sd15", metric, value, "s", status, conditions=where)

    file = tmp_path / "prove-real-box.json"
    write_result(file, "prove-real", "c", [figure("image_seconds", None, "failed"), figure("load_seconds", 1.0, "ok")])
    assert "measured" not in result_of(table.row[0], table, CATALOGUE, measured_here(tmp_path))
    write_result(file, "prove-real", "c", [figure("image_seconds", 12.5, "ok")])
    said = result_of(table.row[0], table, CATALOGUE, measured_here(tmp_path))
    assert said.startswith("measured: 12.5 s on ") and "25 steps, 512 px, fp32" in said
    assert "](../../benchmarks/results/prove-real-box.json)" in said
    file.write_text(file.read_text(encoding="utf-8").replace("12.5", "0.5"), encoding="utf-8")
    with pytest.raises(ConfigError, match="edited by hand"):
        measured_here(tmp_path)


@pytest.mark.slow
def test_what_is_smaller_is_counted_from_a_committed_file(tmp_path: Path) -> None:
    rows = [
        Figure("layout-export", name, "parameters", count, "count") for name, count in (("a", 450.0), ("b", 1000.0))
    ]
    write_result(tmp_path / "layout-export.json", "layout-export", "c", rows)
    said = counted(Smaller("layout-export", "parameters", ("a", "b"), "b"), tmp_path)
    file = "[layout-export.json](../../benchmarks/results/layout-export.json)"
    assert said == f"measured: 55.0 % and 0.0 % smaller ({file})"
    with pytest.raises(ConfigError, match="has no parameters of c and b"):
        counted(Smaller("layout-export", "parameters", ("c",), "b"), tmp_path)


def test_koalas_shares_follow_from_the_published_counts() -> None:
    (row,) = (row for table in BY_NAME["koala"].table for row in table.row if row.smaller is not None)
    table = next(table for table in BY_NAME["koala"].table if row in table.row)
    one, seven = (f"{100 * (1 - count / 2_567_463_684):.1f} %" for count in (1_161_184_324, 782_822_724))
    assert result_of(row, table, CATALOGUE, {}).startswith(f"measured: {one} and {seven} smaller")


@pytest.mark.slow
def test_pages_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    files = write_pages(tmp_path / "pages")
    assert [file.name for file in files] == ["asyncdiff.md", "hybrid-sd.md", "koala.md", "lcm-lora.md"]
    assert files[0].read_text(encoding="utf-8").startswith("# Reproducing AsyncDiff\n")


TRAININGS = [
    words
    for page in PUBLISHED
    for command in page.command
    for words in lines_of(command.ours)
    if words[:2] == ["diffship", "compress"] and "--pass" in words
]


@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: words[-1])
def test_passes_of_printed_commands_have_the_options_that_there_are(words: list[str]) -> None:
    """A line parses with any KEY=VALUE; here its pass is made, which knows its keys and their bounds."""
    (made,) = _flagged(parse(words[1:]))
    assert made.kind == words[words.index("--pass") + 1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in TRAININGS if "lcm" in words], ids=lambda words: words[-1])
def test_printed_distillations_fit_the_models_that_they_name(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed, options and all; tiny models of the same kind stand for those on the hub, and nothing is trained."""
    data = tmp_path / "data" / "laion-aesthetics"
    data.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "0.png")
    (data / "0.txt").write_text("a red square", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # mixed fp16 is for GPUs
    monkeypatch.setattr("diffship.compression.lcm.open_source", lambda source: open_source(tiny(source)))
    (made,) = _flagged(parse(words[1:]))
    assert made.check(open_source(tiny(words[2]))) == []
    assert len(made.outline(open_source(tiny(words[2]))).calls) == 2


def tiny(source: str) -> str:
    return "arch:tiny-sdxl" if "xl" in source else "arch:tiny-sd"
