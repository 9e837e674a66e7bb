from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import socket
from dataclasses import fields
from pathlib import Path

import pytest
from clean_clone import outside

from diffship import __version__
from diffship.cli.main import make_parser, parse
from diffship.core.registry import EXPORTERS, RUNNERS, kinds, load
from diffship.sampling.samplers import SAMPLERS

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
ACTIVATE = ". .venv/bin/activate"
PORT = 8765
BESIDE = "beside.log"
START = f"""set -e
trap '[ -z "$beside" ] || {{ kill -- $beside; cat "$1/{BESIDE}" >&2; }}' EXIT
"""


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def script(page: Path) -> str:
    """The page's blocks as one program of bash, but for those that say why they are not run; $1: a folder for logs."""
    lines = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] in RUN and not block["why"]:
            body = block["body"] if block["kind"] == "sh" else f"python - <<'END'\n{block['body']}END\n"
            if block["beside"]:
                body = f'setsid bash -e -c {shlex.quote(body)} >>"$1/{BESIDE}" 2>&1 &\nbeside="$beside -$!"\n'
            lines.append(body)
    return "".join([START, *lines]) if lines else ""


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
    for target in re.findall(r"(?:\]\(|src=\")([^)#\"]+)[)#\"]", text):
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
            assert known and (active or block["why"] or block["kind"] != "python"), block["body"]
        assert block["kind"] != "powershell" or block["why"], "it cannot be run here"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_wheels_that_pages_name_are_of_this_version(page: Path) -> None:
    for version in re.findall(r"diffship-([^-\s]+)-py3-none-any\.whl", page.read_text(encoding="utf-8")):
        assert version == __version__


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_module_commands_name_modules_that_are_there(page: Path) -> None:
    for module in re.findall(r"python -m (diffship\.[\w.]+)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module) is not None, module


def defined(module: Path) -> set[str]:
    """Classes and functions of a module; methods also as `Class.name`."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_pages_call_path_and_name_is_defined_there(page: Path) -> None:
    """`core/kind.py: Kind`, below diffship/."""
    for path, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", page.read_text(encoding="utf-8")):
        assert name in defined(ROOT / "diffship" / path), f"{page.name}: {path} has no {name}"


def test_the_design_names_files_that_there_are() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    stated = re.findall(r"`((?:[\w.-]+/)*[\w-]+(?:\.py|\.toml|/))`", text)
    missing = [path for path in stated if not any((root / path).exists() for root in (ROOT, ROOT / "diffship"))]
    assert len(stated) > 40 and missing == []


def test_the_design_names_flags_that_there_are_and_marks_those_to_come() -> None:
    parser, verbs = make_parser()
    known = {flag for each in (parser, *verbs.values()) for action in each._actions for flag in action.option_strings}
    known |= {f"--{field.name}" for name in EXPORTERS for field in fields(load(EXPORTERS, name))}
    forms = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## 7. ")[1]
    today, to_come = (set(re.findall(r"--[a-z][\w-]*", text)) for text in forms.split("**Not built yet**"))
    assert today and today <= known
    assert to_come & known <= {"--engine", "--prompts", "--to"}, "built meanwhile"


def test_every_page_is_reached_from_the_readme_and_the_index() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    for file, prefix in (("README.md", "docs/"), ("docs/README.md", "")):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert pages == {name for name in pages if f"({prefix}{name})" in text}, file


def test_the_table_of_support_names_what_the_code_has() -> None:
    text = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    classes = {name for kind in kinds().values() for name in kind.classes if "Img2Img" not in name}
    named = {*EXPORTERS, *RUNNERS, *SAMPLERS, *classes}
    assert {name for name in named if f"`{name}`" not in text} == set()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=named)
def test_the_blocks_of_a_page_run_in_one_shell_in_a_clean_clone(page: Path, clone: Path, tmp_path: Path) -> None:
    """As printed, top to bottom, in the state that the text before leaves; terminals beside it end with the page."""
    pytest.importorskip("torch")
    if "setsid " in script(page):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                pytest.skip(f"port {PORT}, which the page names, is taken here")
    shutil.rmtree(clone / "out", ignore_errors=True)
    outside(clone, "bash", "-c", script(page), "bash", str(tmp_path))
