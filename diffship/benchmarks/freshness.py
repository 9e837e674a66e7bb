"""Whether figures are of this code: a digest over the modules that a suite imports, as their meaning, not their text.

Modules are found by reading imports, those inside functions too, from the command's own module on: the clock, the
statistics and the figures are among them. A module counts as its syntax tree without docstrings, comments, layout and
positions, so that a comment makes nothing stale and a changed factor does.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from diffship.benchmarks.catalogue import ResultsFile, of_suite
from diffship.core.registry import EXPORTERS, KINDS, PASSES, RUNNERS, SAMPLERS

PACKAGE = Path(__file__).parents[1]
# They name others, or write down what was measured: no figure depends on them.
ASIDE = {
    "diffship",
    "diffship.core.registry",
    *(f"diffship.benchmarks.{name}" for name in ("catalogue", "freshness", "measure.record", "entry")),
}
# A module that loads classes of a registry by names that a model says, and the registry: any of them may count.
CHOSEN_BY_MODELS = {"diffship.sampling.samplers": SAMPLERS, "diffship.core.family": KINDS}
BUILDS = "diffship.models"  # what a kind imports of it serves building: no figure of what only draws depends on it
# The module itself counts, what it imports does not: it serves all suites, and each uses a few of its imports.
SHALLOW = {"diffship.benchmarks.studies.workbench"}
_MODULE = re.compile(r"(diffship(?:\.\w+)+)(?::\w+)?\Z")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NO_MEANING = {"ctx", "kind", "type_comment", "type_ignores", "type_params"}  # or not in every version of Python


def suite_digest(suite: str, runners: Iterable[str] = (), package: Path = PACKAGE) -> str:
    """sha256 over what the figures of a suite depend on; `runners` are those of its rows."""
    return digest(of_suite(suite), runners, package)


def digest(entry: ResultsFile, runners: Iterable[str] = (), package: Path = PACKAGE) -> str:
    """The same for an entry of the catalogue. What is computed from other runs depends on what those depended on."""
    names = tuple(runners)
    runs = digest(of_suite(entry.of), names, package) if entry.of else ""
    return derived(entry, runs, names, package)


def derived(entry: ResultsFile, runs: str, runners: Iterable[str] = (), package: Path = PACKAGE) -> str:
    """The digest of an entry whose figures are computed from runs of the digest `runs` ("": from none)."""
    lines = [runs, *(f"{name} {meaning(_file(name, package))}" for name in modules(entry, runners, package))]
    lines += [f"{folder} {_content(package / folder)}" for folder in entry.data]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def changed_since(moment: float, entry: ResultsFile, runners: Iterable[str] = (), package: Path = PACKAGE) -> list[str]:
    """Modules and data that an entry depends on and that were written after `moment` (seconds, as of time.time)."""
    names = tuple(runners)
    files = {name: _file(name, package) for name in modules(entry, names, package)}
    files |= {f"{folder}/{path.name}": path for folder in entry.data for path in (package / folder).rglob("*")}
    found = [name for name, path in files.items() if path.stat().st_mtime > moment]
    return found + (changed_since(moment, of_suite(entry.of), names, package) if entry.of else [])


def modules(entry: ResultsFile, runners: Iterable[str] = (), package: Path = PACKAGE) -> list[str]:
    """Names of the modules that an entry of the catalogue imports, sorted; of the registries, only what it uses."""
    tables = {**EXPORTERS, **{f"engine {name}": target for name, target in RUNNERS.items()}, **PASSES}
    used = {*entry.uses, *(runner.partition(":")[0] for runner in runners)}
    targets = {name: target.partition(":")[0] for name, target in tables.items()}
    wanted = {module for name, module in targets.items() if name.removeprefix("engine ") in used}
    unused = {module for module in targets.values() if module not in wanted}
    found = closure([*entry.roots, *wanted], unused, package)
    if not any(name.startswith(f"{BUILDS}.") for name in found):
        unused.add(BUILDS)
    for module, table in CHOSEN_BY_MODELS.items():
        if module in found:
            found |= closure([target.partition(":")[0] for target in table.values()], unused, package)
    return sorted(found)


def closure(roots: Iterable[str], without: Iterable[str] = (), package: Path = PACKAGE) -> set[str]:
    """`roots` and every module of diffship that they import, now or later, those of `without` and below left out."""
    found: set[str] = set()
    left_out = tuple(without)
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name in ASIDE or any(name == top or name.startswith(f"{top}.") for top in left_out):
            continue
        file = _file(name, package)
        if file.is_file():
            found.add(name)
            named = [] if name in SHALLOW else _named(file)
            waiting += [*named, *([name.rpartition(".")[0]] if name.count(".") > 1 else [])]
    return found


def _file(name: str, package: Path) -> Path:
    path = package.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(file: Path, changed: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _named(file: Path) -> tuple[str, ...]:
    """What may be modules of diffship: imported names, and texts such as `diffship.benchmarks.measure.child`."""
    return _named_now(file, file.stat().st_mtime_ns)


@cache
def _named_now(file: Path, changed: int) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_names(_tree(file, changed))))


def _names(tree: ast.AST) -> Iterator[str]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("diffship."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffship":
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := _MODULE.match(node.value)):
            yield match[1]


def meaning(file: Path) -> str:
    """A digest of a module's syntax tree; layout, comments and docstrings do not count, nor does Python's version."""
    return _meaning(file, file.stat().st_mtime_ns)


@cache
def _meaning(file: Path, changed: int) -> str:
    parts: list[str] = []
    _spell(_tree(file, changed), parts)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _spell(value: object, parts: list[str]) -> None:
    """Append the parts of a text that is the same for the same syntax tree alone."""
    if isinstance(value, ast.AST):
        parts.append(f"({type(value).__name__}")
        for name in value._fields:
            field = getattr(value, name, None)
            if field is not None and field != [] and name not in _NO_MEANING:
                parts.append(f" {name}=")
                _spell(_without_docstring(value, name, field), parts)
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for entry in value:
            _spell(entry, parts)
            parts.append(",")
        parts.append("]")
    else:
        parts.append(repr(value))


def _without_docstring(node: ast.AST, name: str, field: object) -> object:
    if name != "body" or not isinstance(node, _DOCUMENTED) or not isinstance(field, list):
        return field
    first = field[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return field[1:] if text else field


@cache
def _content(folder: Path) -> str:
    """A digest of a folder's files, pages left out."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()
