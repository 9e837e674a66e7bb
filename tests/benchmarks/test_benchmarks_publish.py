"""Tables and figures of the pages come from the results alone; what has no JSON, or was edited, is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from diffship.benchmarks.measure.bench import asked
from diffship.benchmarks.measure.record import read_result, write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.measure.suite import read_suite
from diffship.benchmarks.publish.pages import main, pages, publish, read_all, rendered, stale, states
from diffship.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONDITIONS = {"model": "emoji", "runner": "torch", "part": "image", "batch": 1, "steps": 4, "size": 128}
PAGE = """# A page

<!-- table: some figures -->
<!-- end table -->

It starts in <!-- figure: some / emoji / torch / cold_start_seconds --><!-- end figure -->.

<!-- table: koala -->
<!-- end table -->

<!-- table: other parts -->
<!-- end table -->
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one results file and one page."""
    rows = [
        Row("some", "emoji / torch", "cold_start_seconds", 1.234, "s"),
        Row("some", "emoji / torch", "image_seconds_p50", 2.5, "s", conditions={**CONDITIONS, "precision": "fp32"}),
    ]
    write_result(tmp_path / "benchmarks" / "results" / "some.json", "some", "make it", rows)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(PAGE, encoding="utf-8")
    return tmp_path


def page(root: Path) -> str:
    return (root / "docs" / "page.md").read_text(encoding="utf-8")


def test_the_pages_of_this_repository_are_what_the_results_give() -> None:
    assert publish(ROOT, check=True) == []


def test_the_plots_of_these_pages_are_drawn_from_the_results_that_are_there() -> None:
    digests = {str(results.to_json()["digest"]) for results in read_all(ROOT).values()}
    shown = {name for page in pages(ROOT) for name in re.findall(r"images/([\w-]+\.svg)", page.read_text("utf-8"))}
    assert shown
    for name in shown:
        drawn = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert any(digest in drawn for digest in digests), f"{name}: run python -m diffship.benchmarks.publish --plots"


def test_a_page_is_written_once_and_then_stays(root: Path) -> None:
    assert publish(root, check=True) == ["docs/page.md"] and page(root) == PAGE
    assert publish(root) == ["docs/page.md"]
    text = page(root)
    assert "It starts in <!-- figure: some / emoji / torch / cold_start_seconds -->1.23 s<!-- end figure -->." in text
    assert "| cold start | 1.23 s |" in text
    assert "| emoji, 128 px, 4 steps | measured | 2.50 s |" in text
    assert publish(root) == [] and page(root) == text


def test_a_table_that_was_edited_by_hand_is_noticed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(root)
    (root / "docs" / "page.md").write_text(page(root).replace("1.23 s |", "0.99 s |"), encoding="utf-8")
    assert main(["--root", str(root), "--check"]) == 1
    assert capsys.readouterr().out == "docs/page.md: is not what the results give; run make tables\n"
    assert main(["--root", str(root)]) == 0 and "1.23 s |" in page(root)


def test_results_that_were_edited_by_hand_stop_everything(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "benchmarks" / "results" / "some.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["rows"][0]["value"] = 0.5
    file.write_text(json.dumps(content), encoding="utf-8")
    assert main(["--root", str(root)]) == 2
    assert "edited by hand" in capsys.readouterr().err and page(root) == PAGE


def test_a_figure_without_json_is_refused(root: Path) -> None:
    publish(root)
    (root / "benchmarks" / "results" / "some.json").unlink()
    with pytest.raises(ConfigError, match=r"docs/page.md: the figure .* has no JSON"):
        publish(root)


def test_a_table_without_json_says_how_to_measure_it(root: Path) -> None:
    publish(root)
    assert "Not measured yet: `diffship bench --suite other`" in page(root)
    text = "<!-- table: other parts -->\n| 1.0 s |\n<!-- end table -->"
    assert "1.0 s" not in rendered(text, {}, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: some partz -->\n<!-- end table -->", "did you mean 'parts'"),
        ("<!-- table: some parts -->\n", "not closed"),
        ("<!-- figure: some / x / y -->1 s", "not closed"),
        ("<!-- end table -->", "not closed"),
        ("<!-- figure: some / x / m --><!-- end figure -->", "has no JSON"),
    ],
)
def test_markers_that_are_wrong_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as fault:
        rendered(text, {}, "page.md")
    assert message in str(fault.value) and str(fault.value).startswith("page.md: ")


def test_a_figure_may_leave_out_what_a_subject_counts(root: Path) -> None:
    results = {"some": read_result(root / "benchmarks" / "results" / "some.json")}

    def shown(subject: str) -> str:
        return rendered(f"<!-- figure: some / {subject} / cold_start_seconds --><!-- end figure -->", results, "p.md")

    assert "-->1.23 s<!--" in shown("emoji*")
    with pytest.raises(ConfigError, match=r"has no 'cold_start_seconds' of 'sdxl\*'; the nearest is"):
        shown("sdxl*")
    twice = replace(results["some"], rows=(*results["some"].rows, Row("some", "emoji / x", "cold_start_seconds", 2.0)))
    results["some"] = twice
    with pytest.raises(ConfigError, match="has no"):
        shown("emoji*")


@pytest.mark.slow
def test_results_of_other_code_are_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "benchmarks" / "results"
    rows = [Row("cold-start", "emoji", "cold_start_seconds_median", 1.0, "s")]
    write_result(file / "cold-start.json", "cold-start", "as it was measured then", rows)
    assert stale(root) == {} and main(["--root", str(root), "--fresh"]) == 0
    assert states(root)["cold-start"].startswith("fresh (commit ") and states(root)["serving"] == "not measured"
    monkeypatch.setattr("diffship.benchmarks.publish.pages.digest", lambda entry, runners: "f" * 64)
    assert stale(root).keys() == {"some", "cold-start"}
    capsys.readouterr()
    assert main(["--root", str(root), "--fresh"]) == 1
    assert capsys.readouterr().out == (
        "cold-start.json: measured with other code than this; measure it again: "
        "python -m diffship.benchmarks cold-start\n"
        "some.json: measured with other code than this; measure it again: make it\n"
    )


@pytest.mark.slow
def test_results_of_another_question_are_named(root: Path) -> None:
    """A suite's file may change and its code not: then the figures answer what nobody asks any more."""
    (root / "benchmarks" / "suites").mkdir()
    suite = root / "benchmarks" / "suites" / "cpu-edge.toml"
    text = 'schema = 1\ntitle = "t"\n[[bench]]\ntargets = ["emoji"]\nsteps = [4]\n'
    suite.write_text(text, encoding="utf-8")
    settings = {"rounds": 3, "memory_limit": None, **asked(read_suite("cpu-edge", suite.parent))}
    file = root / "benchmarks" / "results" / "cpu-edge.json"
    write_result(file, "cpu-edge", "bench it", [Row("cpu-edge", "x", "m", 1.0)], settings)
    assert stale(root) == {}
    suite.write_text(f"# a comment\n{text}", encoding="utf-8")
    assert stale(root) == {}
    suite.write_text(text.replace("[4]", "[25]"), encoding="utf-8")
    assert stale(root) == {"cpu-edge": "its suite or experiment asks for something else now"}


def test_a_table_says_when_its_file_was_measured(root: Path) -> None:
    publish(root)
    results = read_result(root / "benchmarks" / "results" / "some.json")
    commit, date = results.environment["commit"], results.environment["date"]
    assert f"commit {commit}, {date}." in page(root)


def test_a_page_that_shows_several_files_says_once_where_they_come_from(root: Path) -> None:
    rows = [Row("more", "emoji", "top5", 0.5, "share", kind="quality")]
    write_result(root / "benchmarks" / "results" / "more.json", "more", "make more", rows)
    marks = "".join(f"<!-- table: {words} -->\n<!-- end table -->\n" for words in ("some figures", "more matrix"))
    results = {file.stem: read_result(file) for file in sorted((root / "benchmarks" / "results").glob("*.json"))}
    shown = "<!-- figure: more / emoji / top5 --><!-- end figure -->"
    assert rendered(marks, results, "p.md").count("Measured on ") == 2
    page = rendered(f"{marks}{shown}<!-- table: measured -->\n<!-- end table -->\n", results, "p.md")
    assert page.count("Measured on ") == 1 and page.count("numpy ") == 1
    assert "| `some.json` | `make it` |" in page and "| `more.json` | `make more` |" in page
    moved = {**results["more"].environment, "cpu": "Another CPU"}
    results["more"] = replace(results["more"], environment=moved)
    page = rendered(f"{marks}<!-- table: measured -->\n<!-- end table -->\n", results, "p.md")
    assert "\nmore: on Another CPU" in page
