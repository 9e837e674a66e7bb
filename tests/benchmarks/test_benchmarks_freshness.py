"""What makes results stale: a change of meaning in what a suite imports, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffship.benchmarks import freshness
from diffship.benchmarks.catalogue import FILES, of_suite, results_file
from diffship.benchmarks.freshness import PACKAGE, closure, digest, meaning, modules, suite_digest
from diffship.core.errors import ConfigError
from diffship.core.registry import RUNNERS

ROOT = Path(__file__).parents[2]
SUITES = ("serving", "cpu-edge", "compression", "cold-start", "cpu-edge-repeats")


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], set[str]]:
    """`edited(module, old, new)`: which suites become stale if that module's text is changed so."""
    changed: dict[Path, Path] = {}
    find = freshness._file
    monkeypatch.setattr(freshness, "_content", lambda folder: "")
    monkeypatch.setattr(freshness, "_file", lambda name, package: changed.get(file := find(name, package), file))
    before = {suite: suite_digest(suite) for suite in SUITES}

    def edit(module: str, old: str, new: str) -> set[str]:
        text = (PACKAGE / module).read_text(encoding="utf-8")
        assert old in text, f"{module} has no {old!r} any more"
        copy = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        copy.write_text(text.replace(old, new), encoding="utf-8")
        changed[PACKAGE / module] = copy
        try:
            return {suite for suite in SUITES if suite_digest(suite) != before[suite]}
        finally:
            changed.clear()

    return edit


Edit = Callable[[str, str, str], set[str]]


@pytest.mark.slow
def test_comments_docstrings_and_layout_make_nothing_stale(edited: Edit) -> None:
    for module in ("core/errors.py", "benchmarks/studies/service/serving.py", "benchmarks/measure/intervals.py"):
        assert edited(module, "from __future__", "# a word\n\n\nfrom __future__") == set()
    assert edited("benchmarks/measure/intervals.py", '"""How sure a figure is', '"""How very sure a figure is') == set()
    assert edited("core/errors.py", '"""No capacity right now;', '"""None;') == set()


@pytest.mark.slow
def test_a_doubled_clock_of_the_server_makes_its_file_stale(edited: Edit) -> None:
    service, clock, median = "benchmarks/studies/service", "time.perf_counter()", "statistics.median(values)"
    assert edited(f"{service}/load.py", f"{clock} - begin, client", f"2 * {clock}, client") == {"serving"}
    assert edited(f"{service}/serving.py", median, f"2 * {median}") == {"serving"}


@pytest.mark.slow
def test_what_materials_are_made_of_counts_for_those_who_use_them(edited: Edit) -> None:
    call = 'export(source, to="onnx"'
    made = edited("benchmarks/studies/workbench.py", call, f'{call}, precision="fp16"')
    assert {"cold-start", "serving"} <= made


@pytest.mark.slow
def test_what_a_sampler_computes_counts_for_those_who_draw(edited: Edit) -> None:
    assert {"cold-start", "serving"} <= edited("sampling/solvers/ddim.py", "return Coefficients(", "return Other(")


@pytest.mark.slow
def test_statistics_and_figures_count(edited: Edit) -> None:
    assert edited("benchmarks/measure/intervals.py", "LEVEL = 0.95", "LEVEL = 0.5") == set(SUITES)
    runs = {"cpu-edge", "cpu-edge-repeats"}
    assert edited("benchmarks/measure/figures.py", '"p99": 0.99', '"p99": 0.9') == runs
    clock = edited("benchmarks/measure/clock.py", "time.perf_counter() - started", "time.time() - started")
    assert runs <= clock and "serving" not in clock
    assert edited("benchmarks/studies/repeats.py", "value / middle - 1", "value / middle") == {"cpu-edge-repeats"}


@pytest.mark.slow
def test_rooms_count_for_the_suites_that_use_them(edited: Edit) -> None:
    assert edited("runtimes/serve/batcher.py", "def ", "async def ") == {"serving"}
    assert edited("compression/distill.py", "def ", "async def ") == {"compression"}
    assert edited("cli/run.py", "def run", "def ran") == {"cold-start"}
    assert edited("runtimes/engines/shell.py", "def ", "async def ") == set(SUITES)
    assert edited("benchmarks/report/tables.py", "def ", "async def ") == set()


@pytest.mark.slow
def test_engines_of_the_rows_count() -> None:
    assert "diffship.runtimes.engines.tensorrt" not in modules(of_suite("gpu"))
    assert "diffship.runtimes.engines.tensorrt" in modules(of_suite("gpu"), ["tensorrt:graphs=false"])
    assert "diffship.runtimes.engines.openvino" in modules(of_suite("cpu-edge"), ["openvino"])


def test_weights_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(results_file("cold-start"))
    monkeypatch.setattr(freshness, "_content", lambda folder: "other weights")
    assert digest(results_file("cold-start")) != before
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"1")
    monkeypatch.undo()
    first = freshness._content.__wrapped__(folder)
    (folder / "README.md").write_text("a page", encoding="utf-8")
    assert freshness._content.__wrapped__(folder) == first
    (folder / "a.safetensors").write_bytes(b"2")
    assert freshness._content.__wrapped__(folder) != first


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("x = 1  # one", "x=1", True),
        ('"""A."""\nx = 1', "x = 1", True),
        ('def f():\n    """Says."""\n    return 1', "def f():\n\n    return (1)", True),
        ("x = 1", "x = 2", False),
        ("x = 1", "x = True", False),
        ("x = 'a'", "x = b'a'", False),
        ("f(a, b)", "f(b, a)", False),
        ("def f(): return 1", "async def f(): return 1", False),
        ("x = -0.0", "x = 0.0", False),
    ],
)
def test_a_module_counts_as_what_it_means(left: str, right: str, same: bool, tmp_path: Path) -> None:
    for name, text in (("a.py", left), ("b.py", right)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert (meaning(tmp_path / "a.py") == meaning(tmp_path / "b.py")) is same


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    texts = {
        "a.py": "def f():\n    from diffship.b import thing\n",
        "b.py": 'CHILD = "diffship.c.d"\nTABLE = {"x": "diffship.e:Class"}\n',
        "c/__init__.py": "",
        "c/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffship.f\n",
        "e.py": "import diffship.g.h\n",
        "f.py": "",
        "g/__init__.py": "",
        "g/h.py": "'diffship.f is not a module here'",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = closure(["diffship.a"], package=tmp_path)
    assert found == {f"diffship.{name}" for name in ("a", "b", "c", "c.d", "e", "g", "g.h")}
    assert closure(["diffship.a"], ["diffship.g"], tmp_path) == found - {"diffship.g", "diffship.g.h"}


IMPORTED = """
import json, sys
from diffship.cli.main import main
main(sys.argv[1:])
print("\\n" + json.dumps(sorted(name for name in sys.modules if name.startswith("diffship"))))
"""
# every verb is imported for its flags; only what `run` itself needs is asked about
_ASIDE = ("diffship.cli.", "diffship.benchmarks.", "diffship.core.")


@pytest.mark.slow
def test_what_a_run_imports_is_what_its_file_depends_on(tiny_bundle: Path, tmp_path: Path) -> None:
    """The closure is read from sources; this is what Python really loads, from command to picture."""
    words = ["run", str(tiny_bundle), "a red apple", "--steps", "1", "-o", str(tmp_path / "a.png"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", IMPORTED, *words], capture_output=True, text=True, timeout=120)
    loaded = {name for name in json.loads(done.stdout.splitlines()[-1]) if not name.startswith(_ASIDE)}
    assert (tmp_path / "a.png").is_file() and "diffship.runtimes.engines.onnxruntime_sessions" in loaded
    known = set(modules(results_file("cold-start"))) | freshness.ASIDE
    # engines that are asked whether they are there, and the flags of another verb
    others = [target.partition(":")[0] for name, target in RUNNERS.items() if name != "onnxruntime"]
    others += ["diffship.runtimes.serve", "diffship.targets"]
    assert {name for name in loaded - known if not name.startswith(tuple(others))} == set()


@pytest.mark.slow
def test_every_committed_file_is_in_the_catalogue_and_can_be_measured() -> None:
    results = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert results <= set(FILES)
    for name, entry in FILES.items():
        assert entry.command == f"python -m diffship.benchmarks {name}" and modules(entry)
        assert all((PACKAGE / folder).is_dir() for folder in entry.data)
        tree = freshness.closure(entry.roots)
        assert set(entry.roots) <= tree, f"{name} begins at a module that is not there"
    with pytest.raises(ConfigError, match="did you mean 'serving'"):
        results_file("servin")
