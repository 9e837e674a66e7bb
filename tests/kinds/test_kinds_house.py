"""The rules of the house: who may know how parts are called, and what a kind may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffship.core.precision import PRECISIONS
from diffship.core.registry import KINDS, kinds

PACKAGE = Path(__file__).parents[2] / "diffship"
PART = re.compile(r"(unet|transformer|text_encoder(_[23])?|vae_(en|de)coder)\Z")
MOST = 11  # files outside kinds that may name a part; go down when you can
# what asks for a name of a kind instead of asking the kind
BY_NAME = {
    "compares the name of a family": re.compile(r"family\.name\s*(==|!=|in\b|not in\b)"),
    "looks for a kind in a name": re.compile(r"[\"'](xl|sdxl|refiner)[\"'] (not )?in \w"),
    "tells a class by its first letters": re.compile(r"class_name(\[:\d\]|\.startswith\(\s*[\"']CLIP)"),
    "tells a part by its first letters": re.compile(r"(name|part)\.startswith\(\s*[\"'](vae|text_encoder)"),
}


def literals(tree: ast.AST) -> set[str]:
    """Names of parts that stand in the code as texts of their own; longer texts do not count, docstrings among them."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if PART.match(text)}


def constants(tree: ast.Module) -> set[str]:
    """Names at module level that stand for a part, or for several."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and literals(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if name.isupper() and not name.startswith("_")}


def users_of_part_names(package: Path) -> set[str]:
    """Files that quote a part's name, or import a constant that stands for one."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in package.rglob("*.py")}
    found = {file for file, tree in trees.items() if literals(tree)}
    owned = {".".join(file.relative_to(package.parent).with_suffix("").parts): constants(trees[file]) for file in found}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names = {each.name for each in node.names} if isinstance(node, ast.ImportFrom) else set()
            if names and names & owned.get(node.module or "", set()):
                found.add(file)
    return {file.relative_to(package).as_posix() for file in found}


@pytest.mark.slow
def test_few_files_know_how_a_part_is_called() -> None:
    found = {file for file in users_of_part_names(PACKAGE) if not file.startswith("kinds/")}
    assert len(found) <= MOST, sorted(found)


def test_the_count_sees_a_text_and_a_constant(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "names.py").write_text('DENOISER = "unet"\n"""Not this unet, nor a \'unet\'."""\n')
    (tmp_path / "package" / "user.py").write_text("from package.names import DENOISER\n")
    (tmp_path / "package" / "other.py").write_text('"""The unet."""\nSIZE = len("unet/config.json")\n')
    assert users_of_part_names(tmp_path / "package") == {"names.py", "user.py"}


@pytest.mark.parametrize("fault", BY_NAME)
def test_nobody_asks_for_the_name_of_a_kind(fault: str) -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "kinds":
            found = BY_NAME[fault].search(file.read_text(encoding="utf-8"))
            assert found is None, f"{file.relative_to(PACKAGE)} {fault}: {found[0] if found else ''}"


def test_a_kind_goes_by_its_name_in_the_table() -> None:
    assert {name: kind.name for name, kind in kinds().items()} == {name: name for name in KINDS}
    for kind in kinds().values():
        assert {kind.denoiser, kind.decoder} <= set(kind.parts) and kind.denoiser not in kind.shared_parts
        assert set(kind.text_parts) <= set(kind.shared_parts)


def test_the_half_that_draws_imports_without_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'diffship.models'): sys.modules[name] = None\n"
        "from diffship.core.family import Family\n"
        "from diffship.core.registry import kinds\n"
        "for name, kind in kinds().items(): Family(name).latent_shape(512, 512), kind.conditions(Family(name))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("source", [f"arch:tiny-{name}" for name in ("sd", "sdxl", "lcm", "sd3", "flux2")])
def test_no_precision_rounds_the_timestep_of_a_denoiser(source: str) -> None:
    """float16 tells timesteps from 256 up apart by quarters, and bfloat16 by whole numbers, or by two or four."""
    pytest.importorskip("torch")
    from diffship.models.sources.opening import open_source

    pipeline = open_source(source)
    spec = next(one for one in pipeline.denoiser.inputs if one.name == pipeline.family.kind.time_input)
    assert spec.exact and not spec.whole and all(form.port(spec).dtype == "float32" for form in PRECISIONS.values())
