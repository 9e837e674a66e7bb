from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffship import __version__
from diffship.cli.main import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```", re.DOTALL)


def commands(page: Path, skipped: bool) -> list[list[str]]:
    """Words of every `diffship ...` line in the page's sh blocks; of the marked ones too if `skipped`."""
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] == "sh" and (skipped or not block["why"]):
            lines = block["body"].replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if line.startswith("diffship ")]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_parse(page: Path) -> None:
    for words in commands(page, skipped=True):
        parse(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_unmarked_blocks_hold_only_commands_that_are_run(page: Path) -> None:
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] in ("sh", "powershell") and not block["why"]:
            lines = [line for line in block["body"].splitlines() if line.strip() and not line.startswith("#")]
            assert all(line.startswith("diffship ") for line in lines), lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_wheels_that_pages_name_are_of_this_version(page: Path) -> None:
    for version in re.findall(r"diffship-([^-\s]+)-py3-none-any\.whl", page.read_text(encoding="utf-8")):
        assert version == __version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_module_commands_name_modules_that_are_there(page: Path) -> None:
    for module in re.findall(r"python -m (diffship\.[\w.]+)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, False)], ids=lambda page: page.name)
def test_commands_in_the_docs_run(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "demo-prompts.txt").write_text("red apple\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in commands(page, skipped=False):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
