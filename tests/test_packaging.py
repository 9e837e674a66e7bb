from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from clean_clone import outside

import diffship
from diffship.cli.main import VERBS
from diffship.core import errors
from diffship.core.lazy import EXTRAS
from diffship.core.registry import EXPORTERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffship"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("exporters", "runtimes", "compression", "calibration", "benchmarks")

OPTIONAL = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "onnx"),
    *("onnxscript", "coremltools"),
    *(
        "onnxruntime",
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
        "tensorrt_rtx_bindings",
        "torch_pruning",
        "httpx",
        "fastapi",
    ),
    *("uvicorn", "psutil", "matplotlib", "ml_dtypes", "polygraphy", "onnx_ir", "cuda"),
    "tensorrt_rtx_bindings",
    "resource",  # Unix alone has it
)

BLOCK = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocked())
"""

IMPORT = """
for name in sys.argv[2].split(","):
    try:
        importlib.import_module(name)
        print(name, "ok")
    except ModuleNotFoundError as fault:
        print(name, fault.name)
"""

USE = """
import json
from pathlib import Path
from diffship.core.errors import MissingExtra
from diffship.core.registry import EXPORTERS, RUNNERS, load
from diffship.core.weights import SafetensorsWeights
from diffship.exporters.onnx.graph import Graph
from diffship.models.walks.cost import cost
from diffship.models.sources.hub import hub_folder
from diffship.training.judge_model import Judge, JudgeConfig, load_judge
from diffship.models.sources.opening import open_source
from diffship.models.parts.unet import unet as make_unet
from diffship.runtimes.engines.engine import choose_engine
from diffship.training import commands, loop
from diffship.training.options import TrainOptions

home, exporter = Path("diffship/models/emoji"), load(EXPORTERS, "onnx")()
weights = SafetensorsWeights([home / "unet" / "diffusion_pytorch_model.safetensors"])
unet = make_unet(json.loads((home / "unet" / "config.json").read_text()), weights)
USES = {
    "torch": (
        lambda: open_source("emoji"),
        lambda: unet.meta,
        lambda: unet.load(),
        lambda: cost(unet),
        lambda: exporter.graph(unet),
        lambda: hub_folder("owner/name"),
        lambda: Judge(JudgeConfig()),
        lambda: load_judge(home / "judge"),
        lambda: commands.run("emoji-vae", TrainOptions(data=home, out=home)),
        lambda: loop.step_generator(0, 0),
    ),
    "onnx": (
        lambda: exporter.check(None),
        lambda: Graph(23).emit("Add", [], "float32", ()),
    ),
    "onnxruntime": (
        lambda: choose_engine("onnx"),
        lambda: load(RUNNERS, "onnxruntime")().open([home / "onnx" / "unet" / "model.onnx"]),
    ),
    "openvino": (lambda: load(RUNNERS, "openvino")().open([home / "onnx" / "unet" / "model.onnx"]),),
    "coreml": (lambda: load(EXPORTERS, "coreml")().check(None),),
}
for extra, uses in USES.items():
    for number, use in enumerate(uses):
        try:
            use()
            print(extra, number, "no error")
        except MissingExtra as fault:
            print(extra, number, fault)
"""


def modules() -> list[str]:
    names = []
    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name != "diffship.__main__"]


def without_optional(code: str, *arguments: str) -> str:
    """Output of `code` in an interpreter that has the core dependencies alone."""
    command = [sys.executable, "-c", BLOCK + code, ",".join(OPTIONAL), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_imports_without_the_optional_dependencies() -> None:
    results = dict(line.split(" ", 1) for line in without_optional(IMPORT, ",".join(modules())).splitlines())
    assert len(results) == len(modules())
    assert {name: result for name, result in results.items() if result != "ok"} == {}


@pytest.mark.slow
def test_what_needs_an_extra_names_it_when_it_is_used() -> None:
    lines = without_optional(USE).splitlines()
    assert {line.partition(" ")[0] for line in lines} == {"torch", "onnx", "onnxruntime", "openvino", "coreml"}
    wrong = [line for line in lines if not line.endswith(f"Run: pip install 'diffship[{line.partition(' ')[0]}]'")]
    assert wrong == []


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, diffship; print([m for m in ('numpy', 'torch', 'PIL', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


HELP = """
import sys, resource
from diffship.cli.main import main
assert main([*sys.argv[1].split(), "--help"]) == 0
heavy = [m for m in ("numpy", "torch", "onnx", "diffusers", "onnxruntime", "PIL", "tqdm") if m in sys.modules]
usage = resource.getrusage(resource.RUSAGE_SELF)
print(heavy, usage.ru_utime + usage.ru_stime, file=sys.stderr)
"""


@pytest.mark.parametrize("verb", ["", *VERBS, *(f"export --to {target}" for target in EXPORTERS)])
def test_help_is_fast_and_imports_neither_torch_nor_numpy(verb: str) -> None:
    fastest = 10.0
    for _ in range(8):  # the machine may be busy: the fastest counts
        begin = time.perf_counter()
        command = [sys.executable, "-c", HELP, verb]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        wall = time.perf_counter() - begin
        assert done.returncode == 0 and ("examples:" if verb else "verbs:") in done.stdout
        heavy, _, seconds = done.stderr.strip().rpartition(" ")
        assert heavy == "[]"
        fastest = min(fastest, wall, float(seconds))
        if fastest < 0.3:
            return
    pytest.fail(f"{verb} --help takes {fastest} s")


def test_public_names() -> None:
    assert diffship.__all__ == sorted(diffship.__all__)
    assert dir(diffship) == diffship.__all__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert diffship.__version__ == project["version"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffship.nothing
    script = "import diffship; diffship.export"  # a fresh process: once imported, it is the module of that name
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr.strip().endswith("no attribute 'export'; from diffship.export import export")


@pytest.mark.parametrize("name", [name for name in diffship.__all__ if not name.startswith("__")])
def test_public_names_load(name: str) -> None:
    assert callable(getattr(diffship, name))


def test_error_tree_in_the_docstring_is_the_code() -> None:
    drawn = {name: int(code) for name, code in re.findall(r"[├└]── (\w+) +(\d+)", errors.__doc__ or "")}
    classes = {cls.__name__: cls.exit_code for cls in errors.DiffshipError.__subclasses__()}
    assert drawn == {name: code for name, code in classes.items() if hasattr(errors, name)}
    assert set(drawn.values()) <= {1, 2, 3, 4, 130}


def test_five_rooms_are_packages_and_the_readme_maps_them_after_what_a_user_wants() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", readme, re.MULTILINE) == [
        *("Measured", "Install", "Use it", "Limits", "What it promises", "Rooms", "Pages"),
    ]
    for name in ROOMS:
        assert (PACKAGE / name / "__init__.py").is_file()
        assert f"`{name}/`" in readme and f"diffship/{name}/" in readme


BANNED_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_NAMES = {"eval", "exec"}
BANNED_ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load"), ("joblib", "load")}
BANNED_OBJECTS = re.compile(r"(send|recv|broadcast|gather|scatter)_object|_object_list|all_gather_object")


def faults(tree: ast.AST) -> list[str]:
    """What in a source file could run code out of data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) in BANNED_ATTRIBUTES or BANNED_OBJECTS.search(node.attr):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Call):
            found += _call_faults(node)
    return found


def _call_faults(node: ast.Call) -> list[str]:
    words = {word.arg: word.value for word in node.keywords}
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    found = [f"{name}()"] if name in BANNED_NAMES else []
    shell = words.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        found.append("shell=")
    loads_numpy = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("np.load", "numpy.load")
    allowed = words.get("allow_pickle")
    if loads_numpy and not (isinstance(allowed, ast.Constant) and allowed.value is False):
        found.append("np.load without allow_pickle=False")
    remote = words.get("trust_remote_code")
    if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
        found.append("trust_remote_code")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_source_cannot_run_code_out_of_data(file: Path) -> None:
    assert faults(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "eval('1')",
        "exec('1')",
        "subprocess.run('x', shell=True)",
        "dist.send_object_list([1])",
        "np.load('x')",
        "os.system('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_guard_sees(code: str) -> None:
    assert faults(ast.parse(code)) != []


def test_the_guard_lets_model_eval_pass() -> None:
    assert faults(ast.parse("model.eval(); np.load('x', allow_pickle=False)")) == []


def test_extras_are_those_of_the_design() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    engines = "onnxruntime onnxruntime-gpu openvino tensorrt tensorrt-rtx"
    assert set(extras) == set(f"torch onnx coreml edge prune serve plots dev {engines}".split())
    assert not any("torch" in line for line in extras["edge"] + extras["onnxruntime"])


@pytest.mark.slow
def test_no_extra_is_offered_for_nothing() -> None:
    """Something in the package asks for a package of each extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES if file.name != "lazy.py")
    asked = {extra for name, (_, extra) in EXTRAS.items() if re.search(rf'"{name}[".]|\b(import|from) {name}\b', text)}
    assert asked == set(extras) - {"dev", "onnxruntime-gpu"}


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files", "diffship"], capture_output=True, text=True, cwd=ROOT, timeout=30)
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    return {line for line in done.stdout.splitlines() if (ROOT / line).is_file()}


@pytest.mark.slow
def test_wheel_equals_tree(tmp_path: Path, clone: Path) -> None:
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    outside(clone, sys.executable, *build)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"diffship"}
    aside = ("diffship/benchmarks/publish/", "diffship/benchmarks/studies/")  # what measures our own pages
    assert {name for name in names if name.startswith("diffship/")} == {
        name for name in tracked() if not name.startswith(aside)
    }
    assert any(name.endswith("licenses/NOTICE") for name in names)
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    ask = [sys.executable, "-m", "diffship.benchmarks"]
    done = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=environment)
    assert done.returncode == 2 and "a wheel holds no studies: run this in a clone" in done.stderr


@pytest.mark.slow
def test_a_clone_does_not_shadow_the_package_that_is_installed_from_it(clone: Path) -> None:
    """A clone's folder is called like the package: beside it, it must not be taken for the package itself."""
    python = str(clone / ".venv" / "bin" / "python")
    assert "verbs:" in outside(clone.parent, python, "-m", "diffship", "--help")
    script = "import diffship\nfrom diffship import Request\nprint(diffship.__file__, Request('red apple').prompt)\n"
    (clone.parent / "script.py").write_text(script, encoding="utf-8")
    found = outside(clone.parent, python, "script.py")
    assert found == f"{clone / 'diffship' / '__init__.py'} red apple\n"
