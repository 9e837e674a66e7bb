"""`export --recipe` and `inspect` of what it wrote: documents, exit codes, a process that is killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from diffship.cli.fleet import describe_report
from diffship.core.errors import MissingExtra
from diffship.exporters.onnx import Onnx
from diffship.fleet.build import FleetReport, Outcome
from diffship.fleet.recipe import fleet_target

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
RECIPE = """schema = 1
source = "arch:tiny-sd"
[[target]]
to = "onnx"
[[target]]
to = "onnx"
name = "small"
precision = "int8-weights"
"""


def check(document: dict[str, Any], verb: str) -> dict[str, Any]:
    schema = json.loads((ROOT / "docs" / "schema" / f"{verb}.json").read_text(encoding="utf-8"))
    jsonschema.validate({key: value for key, value in document.items() if key not in ("exit_code", "stderr")}, schema)
    return document


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "fleet.toml"


def words(recipe: Path, graphs: Path) -> list[object]:
    out = recipe.parent / "new" / "out"
    return ["export", "--recipe", recipe, "-o", out, "--parts", "text_encoder", "--cache", graphs, "--no-verify"]


@pytest.mark.slow
def test_one_command_writes_all_and_inspect_shows_them(command: Any, recipe: Path, graphs_folder: Path) -> None:
    out = recipe.parent / "new" / "out"
    document = check(command(*words(recipe, graphs_folder)), "export")
    assert document["exit_code"] == 0 and document["ok"], document["stderr"]
    assert [(one["name"], one["outcome"]) for one in document["targets"]] == [("onnx-fp32", "made"), ("small", "made")]
    assert "target small" in document["stderr"]
    again = check(command(*words(recipe, graphs_folder)), "export")
    assert [one["outcome"] for one in again["targets"]] == ["kept", "kept"]

    seen = check(command("inspect", out), "inspect")
    assert seen["kind"] == "fleet" and seen["same_source"] and seen["exit_code"] == 0
    assert [(row["name"], row["precisions"]) for row in seen["bundles"]] == [
        ("onnx-fp32", ["fp32"]),
        ("small", ["int8-weights"]),
    ]
    assert {tuple(row["parts"].items()) for row in seen["bundles"]} == {tuple(document["source_digests"].items())}
    assert "name one of them" in command("inspect", out, "--size", 64)["error"]["message"]

    (out / "small" / "model_index.json").unlink()
    damaged = check(command("inspect", out), "inspect")
    assert damaged["exit_code"] == 1 and "model_index.json is missing" in damaged["bundles"][1]["fault"]


def test_a_failed_target_is_told_and_its_exit_code_given(
    command: Any, recipe: Path, graphs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.core.errors import UnsupportedError

    true = Onnx.export

    def failing(self: Onnx, *rest: Any) -> Any:
        if self.precision == "fp32":
            raise UnsupportedError("an operation has no form")
        return true(self, *rest)

    monkeypatch.setattr(Onnx, "export", failing)
    document = check(command(*words(recipe, graphs_folder)), "export")
    assert document["exit_code"] == 3 and not document["ok"]
    first, second = document["targets"]
    assert (first["outcome"], first["problem"]["message"]) == ("failed", "an operation has no form")
    assert (second["outcome"], second["problem"]) == ("made", None)
    monkeypatch.undo()
    assert [one["outcome"] for one in command(*words(recipe, graphs_folder))["targets"]] == ["made", "kept"]


BAD = {
    "a flag of the target": (["--precision", "fp16"], RECIPE, "write --precision as keys of its [[target]]"),
    "a target": (["--to", "coreml"], RECIPE, "write --to as keys"),
    "stages": (["--stages", "2"], RECIPE, "--stages and --cut do not go with --recipe"),
    "no source": ([], RECIPE.replace('source = "arch:tiny-sd"\n', ""), "names none; legal: a diffusers folder"),
    "passes": ([], f'{RECIPE}[[pass]]\ntype = "layout"\nname = "bk-tiny"\n', "run them first: diffship compress"),
    "a wrong key": ([], RECIPE.replace("precision", "precison"), "did you mean 'precision'?"),
    "no recipe": (["--recipe", "nowhere.toml"], RECIPE, "--recipe 'nowhere.toml' is not a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_exit_code_two_and_writes_nothing(name: str, command: Any, recipe: Path) -> None:
    flags, text, message = BAD[name]
    recipe.write_text(text, encoding="utf-8")
    document = check(command("export", "--recipe", recipe, "-o", recipe.parent / "new" / "out", *flags), "export")
    assert document["exit_code"] == 2 and message in document["error"]["message"]
    assert [path.name for path in recipe.parent.iterdir()] == ["fleet.toml"]


def test_passes_of_a_recipe_are_not_passed_over_without_a_word(command: Any, recipe: Path) -> None:
    recipe.write_text(f'{RECIPE}[[pass]]\ntype = "layout"\nname = "bk-tiny"\n', encoding="utf-8")
    document = command("export", "arch:tiny-sd", "--recipe", recipe, "-o", recipe.parent / "out", "--parts", "none")
    assert "arch:tiny-sd is exported as it is" in document["stderr"]
    assert f"diffship compress --recipe {recipe}" in document["stderr"]


def test_a_fleet_of_which_nothing_is_installed_says_that_nothing_was_written(tmp_path: Path) -> None:
    missing = Outcome(fleet_target("onnx", optional=True), "skipped", fault=MissingExtra("onnx", "onnx"))
    told = describe_report(FleetReport(tmp_path / "out", (missing,), {}))
    assert told.exit_code == 0 and "nothing was written: all targets are optional" in told.text.splitlines()[-1]


def test_without_source_and_recipe_both_are_named(command: Any, tmp_path: Path) -> None:
    message = command("export", "-o", tmp_path / "out")["error"]["message"]
    assert "no source is given" in message and "--recipe FILE" in message


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_goes_on(command: Any, recipe: Path, graphs_folder: Path) -> None:
    out = recipe.parent / "new" / "out"
    script = "import sys; from diffship.cli.main import main; sys.exit(main(sys.argv[1:]))"
    given = [str(word) for word in words(recipe, graphs_folder)]
    process = subprocess.Popen([sys.executable, "-c", script, *given], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(out.glob(".small.partial-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait(60)
    manifest = (out / "onnx-fp32" / "diffship.json").read_bytes()
    document = command(*words(recipe, graphs_folder))
    assert [one["outcome"] for one in document["targets"]] == ["kept", "made"], document
    assert (out / "onnx-fp32" / "diffship.json").read_bytes() == manifest
    assert sorted(path.name for path in out.iterdir()) == ["onnx-fp32", "small"]
