from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
from clean_clone import outside

from diffship import __version__
from diffship.cli.main import parse

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CHANGELOG.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("diffship/models/*/README.md")),
]
BLOCK = re.compile(
    r"(<!-- (not run: (?P<why>[^>]+)|another terminal: (?P<beside>[^>]+)) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```",
    re.DOTALL,
)
RUN = ("sh", "python")
ACTIVATE = ". .venv/bin/activate\n"
PORT = 8765


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def script(page: Path) -> str:
    """The page's blocks as one program of bash, but for those that say why they are not run; $1: a folder for logs."""
    lines = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] in RUN and not block["why"]:
            body = block["body"] if block["kind"] == "sh" else f"python - <<'END'\n{block['body']}END\n"
            if block["beside"]:
                beside = f'setsid bash -e -c {shlex.quote(body)} >>"$1/beside.log" 2>&1 &'
                body = f'# beside\n{beside}\ntrap "kill -- -$! ; cat $1/beside.log >&2; $(trap -p EXIT)" EXIT\n'
            lines.append(body)
    return "".join(["set -e\n", *lines]) if lines else ""


def commands(page: Path) -> list[list[str]]:
    """Words of every `diffship ...` line in the page's sh blocks, those that are not run too."""
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] == "sh":
            lines = block["body"].replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if line.startswith("diffship ")]
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_the_docs_parse(page: Path) -> None:
    for words in commands(page):
        parse(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_come_after_what_makes_them_known(page: Path) -> None:
    """`diffship` is not in a shell's path before the environment is activated, in each terminal that a page opens."""
    active = False
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] in RUN:
            active = ACTIVATE in block["body"] or (active and not block["beside"])
            known = active or not re.search(r"^(diffship|python|torchrun) ", block["body"], re.MULTILINE)
            assert known and (active or block["kind"] != "python"), block["body"]
        assert block["kind"] != "powershell" or block["why"], "it cannot be run here"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_wheels_that_pages_name_are_of_this_version(page: Path) -> None:
    for version in re.findall(r"diffship-([^-\s]+)-py3-none-any\.whl", page.read_text(encoding="utf-8")):
        assert version == __version__


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_module_commands_name_modules_that_are_there(page: Path) -> None:
    for module in re.findall(r"python -m (diffship\.[\w.]+)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=named)
def test_the_blocks_of_a_page_run_in_one_shell_in_a_clean_clone(page: Path, clone: Path, tmp_path: Path) -> None:
    """As printed, top to bottom, in the state that the text before leaves; terminals beside it end with the page."""
    pytest.importorskip("torch")
    if "# beside" in script(page):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                pytest.skip(f"port {PORT}, which the page names, is taken here")
    shutil.rmtree(clone / "out", ignore_errors=True)
    outside(clone, "bash", "-c", script(page), "bash", str(tmp_path))
