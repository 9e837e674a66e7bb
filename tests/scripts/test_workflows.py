"""The workflow files: correct YAML, and every command that they call exists in this tree."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prove_real
import pytest
from prove.catalogue import read_catalogue

from diffship.benchmarks import gpu_host
from diffship.cli.main import parse

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def triggers(content: dict[Any, Any]) -> dict[str, Any]:
    return dict(content[True])  # YAML 1.1 reads the key `on` as true


def steps(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, job in content["jobs"].items():
        for step in job["steps"]:
            yield name, step


def commands(content: dict[str, Any]) -> Iterator[list[str]]:
    for _, step in steps(content):
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield shlex.split(line)


def check(words: list[str]) -> None:
    """Raises or fails where the command is none that this tree has."""
    if words[0] == "diffship":
        parse(words[1:])
    elif words[0] == "make":
        for target in words[1:]:
            assert "=" in target or re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target
    elif words[:2] == ["python", "scripts/prove_real.py"]:
        options = prove_real.make_parser().parse_args(words[2:])
        assert options.only == "$ONLY" or not options.only
    elif words[:3] == ["python", "-m", "diffship.benchmarks.gpu_host"]:
        gpu_host.make_parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "pip"]:
        assert words[3] == "install"
    else:
        assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is no program of this tree"


def test_both_workflows_are_there() -> None:
    assert [file.name for file in FILES] == ["ci.yml", "prove-real.yml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_command_exists(file: Path) -> None:
    found = list(commands(read(file)))
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("words", [["diffship", "prove"], ["make", "nothing"], ["scripts/nothing.sh"]])
def test_the_check_sees_what_is_missing(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"unknown verb|nothing"):
        check(words)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_jobs_are_bounded_and_their_actions_pinned(file: Path) -> None:
    content = read(file)
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 360, name
    for name, step in steps(content):
        assert ("uses" in step) != ("run" in step), name
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step["uses"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_input_is_pasted_into_a_command(file: Path) -> None:
    assert not any("${{" in step.get("run", "") for _, step in steps(read(file)))


def test_extras_that_are_installed_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [re.search(r"\[(.+)\]", word) for file in FILES for words in commands(read(file)) for word in words]
    extras = {extra for match in named if match for extra in match[1].split(",")}
    assert extras and extras <= set(project["optional-dependencies"])


def test_prove_real_is_started_by_hand_with_a_checkpoint_of_the_catalogue() -> None:
    content = read(ROOT / ".github" / "workflows" / "prove-real.yml")
    assert list(triggers(content)) == ["workflow_dispatch"]
    assert triggers(content)["workflow_dispatch"]["inputs"]["only"]["default"] in read_catalogue().checkpoints
    assert {job["runs-on"] if isinstance(job["runs-on"], str) else "gpu" for job in content["jobs"].values()} == {
        "ubuntu-latest",
        "macos-14",
        "gpu",
    }
    assert content["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]


def test_ci_runs_the_same_script_as_a_developer() -> None:
    content = read(ROOT / ".github" / "workflows" / "ci.yml")
    assert [step["run"] for _, step in steps(content) if "run" in step] == [".ci/run"]
    assert set(triggers(content)) == {"push", "pull_request"}
