"""`python -m diffship.benchmarks NAME`: one command a file, without placeholders, and what it makes for itself."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks.catalogue import BENCH, FILES, results_file
from diffship.benchmarks.publish.runner import SENTINELS, command, main, measure
from diffship.benchmarks.studies import workbench
from diffship.benchmarks.studies.workbench import WORK, bundle, emoji_data, untrained
from diffship.cli.main import parse
from diffship.core.errors import ConfigError, UnsupportedError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("diffship/models/*/README.md")]
PLACEHOLDER = re.compile(r"\b(ENV|BUNDLE|DATA|DIR|MODEL|UNTRAINED|FILE|RUN|OUT)\b")


class Parsed(Exception):
    """What a command made of its arguments, before it does anything."""


def parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *words: Any) -> None:
        raise Parsed(original(self, *words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    entry = results_file(name)
    with pytest.raises(Parsed) as found:
        importlib.import_module(f"diffship.benchmarks.{entry.module}").main(command(entry))
    return found.value.args[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_a_command_that_needs_no_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = FILES[name]
    assert not PLACEHOLDER.search(entry.command)
    monkeypatch.chdir(ROOT)
    if entry.module == BENCH:
        given = parse(command(entry))
        assert given.output == Path(f"benchmarks/results/{name}.json") and given.suite == name
        work = given.work
    else:
        given = parsed(name, monkeypatch)
        assert given.out == Path(f"benchmarks/results/{name}.json")
        work = given.work
    assert work.is_relative_to("runs"), "git ignores it"


def test_arguments_of_its_own_are_passed_on() -> None:
    assert command(results_file("serving"), ["--soak", "0"])[:2] == ["--soak", "0"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_files_that_there_are_and_no_placeholders(page: Path) -> None:
    for words in re.findall(r"python -m diffship\.benchmarks ([^`\n#]*)", page.read_text(encoding="utf-8")):
        name = words.split()[0] if words.split() else ""
        assert name in (*FILES, SENTINELS, ""), words
    for line in re.findall(r"Command: `([^`]*)`", page.read_text(encoding="utf-8")):
        assert not PLACEHOLDER.search(line), f"{page.name}: {line}"


@pytest.mark.slow
def test_it_lists_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == FILES.keys()
    assert all(
        re.match(r"(fresh|measured with other code|its suite or).*\(commit \w+, |not measured", text)
        for text in lines.values()
    )


@pytest.mark.slow
def test_outside_of_a_clone_it_says_where_to_go(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffship.benchmarks", "cpu-edge"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "run this in a clone of diffship" in done.stderr
    with pytest.raises(ConfigError, match="did you mean 'cpu-edge'"):
        measure(results_file("cpu-edg"), [])


def test_a_bundle_is_made_once_for_this_code_and_is_named_after_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def export(source: str, to: str, out: Path) -> None:
        made.append(source)
        out.mkdir()
        (out / "diffship.json").touch()

    monkeypatch.setattr("diffship.export.export", export)
    first = bundle("arch:tiny-sd", tmp_path)
    assert first.name == "arch-tiny-sd" and (first / "diffship.json").is_file()
    assert bundle("arch:tiny-sd", tmp_path) == first and made == ["arch:tiny-sd"]
    monkeypatch.setattr(workbench, "code_digest", lambda names: "other code")
    assert bundle("arch:tiny-sd", tmp_path) != first and len(made) == 2


@pytest.mark.slow
def test_the_untrained_model_has_the_shape_and_the_rest_of_the_trained_one(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from diffship.models.sources.opening import open_source

    trained, drawn = open_source("emoji").components, open_source(str(untrained(tmp_path))).components
    assert drawn["vae_decoder"].digest == trained["vae_decoder"].digest
    assert drawn["unet"].digest != trained["unet"].digest
    ours, theirs = drawn["unet"].weights, trained["unet"].weights
    assert [ours.meta(name).shape for name in ours.names()] == [theirs.meta(name).shape for name in ours.names()]


def test_pictures_are_those_of_the_folder_or_a_line_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workbench.shutil, "which", lambda program: None)
    with pytest.raises(UnsupportedError, match=r"npm, which is not installed; or name a folder: --data"):
        emoji_data(tmp_path / "work")
    (tmp_path / "data" / "emoji").mkdir(parents=True)
    (tmp_path / "data" / "emoji" / "metadata.jsonl").touch()
    assert emoji_data(tmp_path / "work") == Path("data/emoji")
    assert WORK.parts[0] == "runs"
