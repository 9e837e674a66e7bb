from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffship"
FILES = sorted(PACKAGE.rglob("*.py"))

BELOW = {
    "core": set(),
    "sampling": {"core"},
    "targets": {"core"},
    "models": {"sampling", "core"},
    "kinds": {"models", "sampling", "core"},  # imported by nobody: the registry names its classes
    "runtimes": {"targets", "sampling", "core"},
    "training": {"models", "sampling", "core"},
    "calibration": {"models", "sampling", "core"},
    "compression": {"training", "calibration", "models", "sampling", "core"},
    "exporters": {"calibration", "models", "targets", "sampling", "core"},
}
BELOW["proved_part"] = {"exporters", "runtimes", *BELOW["exporters"]}
BELOW["export"] = {"proved_part", "compression", "exporters", "runtimes", *BELOW["compression"], *BELOW["exporters"]}
BELOW["fleet"] = {"export", *BELOW["export"]}
BELOW["reduce"] = {"exporters", "runtimes", *BELOW["exporters"], *BELOW["runtimes"]}
BELOW["compress"] = {"compression", *BELOW["compression"]}
BELOW["side_by_side"] = {"runtimes", "models", *BELOW["runtimes"]}
BELOW["adapted"] = {"compression", "runtimes", *BELOW["compression"], *BELOW["runtimes"]}
BELOW["benchmarks"] = {"export", "compress", *BELOW["export"]}
BELOW["cli"] = {"benchmarks", "fleet", "adapted", "reduce", "side_by_side", *BELOW["benchmarks"]}

# Among the rooms of `runtimes`. "engines.model" is a bundle opened as a Model: who draws needs no more of an engine.
RUNTIMES = {
    "engines": set(),
    "proof": {"engines"},
    "partition": set(),
    "handoff": {"engines.model"},
    "serve": {"engines.model", "engines.isolated", "handoff"},
}
# Who may import these from outside; benchmarks ask a server and read its forms.
USERS = {"serve": {"cli", "benchmarks"}, "handoff": {"cli", "benchmarks"}, "partition": {"cli", "benchmarks"}}

# Inside models: what each of its rooms may import beside itself; sources and the files above know all of them.
MODELS_BELOW = {"reduced": set(), "parts": {"reduced"}, "walks": {"parts", "reduced"}}

# Files of torch-free rooms that import torch or `models`, inside functions only.
TORCH_SIDE = {"runtimes/engines/torch.py", "runtimes/engines/model.py", "runtimes/partition/async_denoiser.py"}
TORCH = {"torch", "diffusers", "transformers", "accelerate", "peft", "torchvision"}
CORE_ONLY = {"numpy", "safetensors", "tokenizers", "PIL", "tqdm"}
OPTIONAL_IN_FUNCTIONS = {"ml_dtypes", "onnxruntime", "openvino", "psutil"}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, at module level) of every import in the file, those for type checkers left out."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append((node.module or "", top))
            if node.module == "diffship":
                found.extend((f"diffship.{alias.name}", top) for alias in node.names)
        inner = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(file.read_text(encoding="utf-8")), True)
    return found


def own_imports(file: Path) -> list[tuple[str, bool]]:
    """(room of diffship, at module level) of every import of the package itself."""
    parts = [(name.split("."), top) for name, top in imports(file)]
    return [(words[1], top) for words, top in parts if words[0] == "diffship" and len(words) > 1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_only_go_down(file: Path) -> None:
    here = room(file)
    if here in ("__init__", "__main__"):
        return
    legal = BELOW[here] | {here}
    name = file.relative_to(PACKAGE).as_posix()
    for other, top in own_imports(file):
        if other in BELOW and other not in legal:
            assert name in TORCH_SIDE and other == "models" and not top, f"{name} imports {other}"
        # what draws must not wait for the half that reads and builds
        assert not (here == "kinds" and other == "models" and top), f"{name} imports models at module level"


@pytest.mark.parametrize("inner", MODELS_BELOW)
def test_a_part_knows_nothing_of_what_is_made_of_it(inner: str) -> None:
    """A new part is one file: no table of walks, sources or kinds stands below it."""
    files = sorted((PACKAGE / "models" / inner).glob("*.py"))
    assert len(files) > 3
    legal = tuple(f"diffship.models.{name}." for name in {inner, *MODELS_BELOW[inner]})
    for file in files:
        for name, top in imports(file):
            if name.startswith("diffship.models") and top:
                assert name.startswith(legal), f"{file.name} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_among_the_runtimes(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    inside = RUNTIMES.get(name.split("/")[1]) if name.startswith("runtimes/") else None
    for module, _ in imports(file):
        _, _, below = module.partition("diffship.runtimes.")
        other = below.split(".")[0]
        if not below or name.startswith(f"runtimes/{other}/") or room(file) == "__init__":
            continue
        if inside is not None:
            assert any(f"{below}.".startswith(f"{legal}.") for legal in inside), f"{name} imports {below}"
        else:
            assert room(file) in USERS.get(other, {room(file)}), f"{name} imports {below}"


def test_every_room_of_the_runtimes_is_in_the_rule() -> None:
    assert {path.name for path in (PACKAGE / "runtimes").iterdir()} - {"__init__.py", "__pycache__"} == set(RUNTIMES)


# Rooms of `benchmarks`; the last two are not in the wheel. The runner joins them all.
MEASURING = {"measure": set(), "report": {"measure"}, "studies": {"measure", "report"}}
MEASURING["publish"] = {"studies", *MEASURING["studies"]}
IN_THE_CLONE = {"publish", "studies"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_among_the_benchmarks_and_what_the_wheel_does_without(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    inside = MEASURING.get(name.split("/")[1]) if name.startswith("benchmarks/") else None
    for module, _ in imports(file):
        other = module.removeprefix("diffship.benchmarks.").split(".")[0]
        if not module.startswith("diffship.benchmarks.") or name == "benchmarks/__main__.py" or other not in MEASURING:
            continue
        if inside is not None and not name.startswith(f"benchmarks/{other}/"):
            assert other in inside, f"{name} imports {module}"
        if inside is None:
            assert other not in IN_THE_CLONE, f"{name} imports {module}, which the wheel does not hold"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_torch_stays_out_of_the_edge_rooms(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    if room(file) not in ("core", "sampling", "targets", "kinds", "runtimes", "cli", "__init__", "__main__"):
        return
    for module, top in imports(file):
        if module.split(".")[0] in TORCH:
            assert not top, f"{name} imports {module} at module level"
            assert name in TORCH_SIDE, f"{name} imports {module}; list it in TORCH_SIDE if it must"


@pytest.mark.parametrize("name", ["core", "sampling"])
def test_core_and_sampling_stand_on_the_core_dependencies_alone(name: str) -> None:
    import sys

    legal = CORE_ONLY | set(sys.stdlib_module_names) | {"diffship"}
    for file in (PACKAGE / name).rglob("*.py"):
        for module, top in imports(file):
            first = module.split(".")[0]
            assert first in legal or (not top and first in OPTIONAL_IN_FUNCTIONS), f"{file.name} imports {module}"


def test_every_room_is_in_the_rule() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(BELOW), rooms - set(BELOW)
    for needed in ("exporters", "runtimes", "compression", "calibration", "benchmarks"):
        assert needed in BELOW


def test_every_package_folder_has_an_init() -> None:
    folders = {file.parent for file in FILES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_docstrings_say_what_comes_back_and_not_only_what_is_raised(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            text, gives = ast.get_docstring(node) or "", ast.unparse(node.returns)
            assert gives == "None" or not text.startswith("Raises"), f"line {node.lineno}: {node.name} gives {gives}"


UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_that_windows_lacks_are_asked_for_softly(file: Path) -> None:
    """Inside a `try` that hears ImportError; anywhere else the module, or its user, would not start on Windows."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    soft = {
        id(inner)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try) and any("ImportError" in ast.unparse(h.type or block) for h in block.handlers)
        for inner in ast.walk(block)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        hard = UNIX & {name.split(".")[0] for name in names}
        assert not hard or id(node) in soft, f"line {getattr(node, 'lineno', 0)} imports {hard}"
