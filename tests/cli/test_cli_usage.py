from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffship.cli import main as entry
from diffship.cli.main import VERBS, main
from diffship.core import errors
from diffship.core.registry import RUNNERS, STAGES, load
from diffship.runtimes.engines.engine import Probe
from diffship.runtimes.proof.verify import Refused


def leaves(tree: type[errors.DiffshipError]) -> list[type[errors.DiffshipError]]:
    return [tree, *(leaf for child in tree.__subclasses__() for leaf in leaves(child))]


BAD = {
    "nothing": ([], 2, "no verb is given; legal: export, compress, calibrate, run,"),
    "help as a verb": (["help"], 2, "did you mean '--help'?"),
    "version as a verb": (["version"], 2, "did you mean '--version'?"),
    "unknown verb": (["exprot", "emoji"], 2, "did you mean 'export'?"),
    "unknown flag": (["run", "D", "x", "--stepz", "3"], 2, "did you mean '--steps'?"),
    "unknown flag with a value": (["run", "D", "x", "--stepz=3"], 2, "did you mean '--steps'?"),
    "abbreviated flag": (["run", "D", "x", "--pixel"], 2, "unknown flag '--pixel'"),
    "no steps": (["run", "D", "x", "--steps", "0"], 2, "steps is 0; legal is a whole number from 1 to 150"),
    "too many steps": (["run", "D", "x", "--steps", "151"], 2, "1 to 150"),
    "steps in words": (["run", "D", "x", "--steps", "many"], 2, "invalid int value: 'many'"),
    "seven pixels": (["run", "D", "x", "--size", "7"], 2, "width is 7; legal is a whole number from 64 to 1536"),
    "half a size": (["run", "D", "x", "--size", "7x"], 2, "width is 7"),
    "size in words": (["run", "D", "x", "--size", "big"], 2, "is not N or WxH"),
    "guidance": (["run", "D", "x", "--guidance", "nan"], 2, "from 0.0 to 35.0"),
    "no images": (["run", "D", "x", "--images", "0"], 2, "images is 0"),
    "seed": (["run", "D", "x", "--seed", "-1"], 2, "seed is -1"),
    "sampler": (["run", "D", "x", "--sampler", "eular"], 2, "did you mean 'euler'?"),
    "engine": (["run", "D", "x", "--engine", "tpu"], 2, "invalid choice: 'tpu'"),
    "option": (["run", "D", "x", "--option", "threads"], 2, "is not key=value"),
    "no prompt": (["run", "D"], 2, "no prompt is given"),
    "a prompt behind a flag": (["run", "D", "--prompt", "x"], 2, "prompts are given without a flag"),
    "missing bundle": (["run", "./nowhere", "x"], 2, "'./nowhere' does not exist"),
    "missing prompts file": (["run", "D", "--prompts-file", "nowhere.txt"], 2, "is not a file"),
    "two pictures, one file": (["run", "D", "x", "y", "-o", "a.png"], 2, "one file for 2 pictures"),
    "empty prompt list": (["run", "D", "--prompts-file", __file__ + ".none"], 2, "is not a file"),
    "verify nothing": (["verify", "./nowhere"], 2, "does not exist"),
    "verify a source": (
        ["verify", "emoji"],
        2,
        "a bundle is a folder with diffship.json in it, which diffship export makes",
    ),
    "verify an empty folder": (["verify", "."], 2, "is not a bundle: it has no diffship.json; it is empty"),
    "inspect an empty folder": (["inspect", "."], 2, "it is not a diffusers folder; it is empty"),
    "run an empty folder": (["run", ".", "x"], 2, "; it is empty"),
    "a prompt with a dash": (["run", "D", "--blue"], 2, "one that begins with a dash stands behind --"),
    "a value with a dash": (["run", "D", "x", "--negative", "-blur"], 2, "is joined to it by ="),
    "verify a file": (["verify", __file__], 2, ""),
    "hashes and engine": (["verify", "D", "--hashes-only", "--engine", "torch"], 2, "opens no engine"),
    "export nowhere": (["export", "emoji"], 2, "required: -o"),
    "export target": (["export", "emoji", "--to", "tflite", "-o", "x"], 2, "invalid choice: 'tflite'"),
    "export a flag of another target": (["export", "emoji", "-o", "x", "--sm=89"], 2, "--sm is of --to tensorrt"),
    "export no parts": (["export", "emoji", "--parts", ",", "-o", "x"], 2, "--parts names no part"),
    "export missing folder": (["export", "./nowhere", "-o", "x"], 2, "nowhere"),
    "export arch": (["export", "arch:sd99", "-o", "x"], 2, "sd99"),
    "inspect missing": (["inspect", "./nowhere"], 2, "nowhere"),
    "compare missing": (["compare", "./nowhere", "./nowhere"], 2, "nowhere"),
    "compare grid without pictures": (
        ["compare", "A", "B", "--no-steps", "--grid", "g.png"],
        2,
        "--grid needs pictures",
    ),
    "bench no rounds": (["bench", "emoji", "--rounds", "0"], 2, "--rounds 0: at least 1 is measured"),
    "bench rounds": (["bench", "emoji", "--rounds", "-1"], 2, "--rounds -1"),
    "bench timeout": (["bench", "emoji", "--timeout", "nan"], 2, "--timeout nan is no number of seconds"),
    "train stage": (["train", "emoij", "--data", "d", "--out", "o"], 2, "invalid choice: 'emoij'"),
    "train data": (["train", "judge", "--data", "./nowhere", "--out", "o"], 2, "is not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_writes_nothing(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") <= 2 and captured.err.startswith("diffship")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_with_json_is_one_document(name: str, command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    words, code, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    document = command(*words)
    assert document["ok"] is False and document["schema"] == 1
    assert document["error"]["exit_code"] == document["exit_code"] == code
    assert message in document["error"]["message"]


def test_verify_in_an_engine_that_is_not_installed_says_nothing_of_the_bundle(capsys: Any, monkeypatch: Any) -> None:
    absent = classmethod(lambda cls: Probe("openvino", False, reason="openvino is not installed"))
    monkeypatch.setattr(load(RUNNERS, "openvino"), "probe", absent)
    assert main(["verify", "D", "--engine", "openvino"]) == 3
    assert capsys.readouterr().err.endswith("openvino is not installed. Run: pip install 'diffship[openvino]'\n")


@pytest.mark.parametrize(
    ("source", "way"), [("emoji", "Run: diffship export emoji -o DIR"), ("emoji-small", "Export it where torch is")]
)
def test_without_torch_a_source_is_told_how_it_becomes_a_bundle(
    source: str, way: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffship.cli.drawing.installed", lambda name: name != "torch")
    assert main(["run", source, "red apple"]) == 3
    assert f"{way}, or run: pip install 'diffship[torch]'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [cls for cls in leaves(errors.DiffshipError) if cls is not errors.MissingExtra])
def test_every_error_of_the_tree_has_its_exit_code(
    kind: type[errors.DiffshipError], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: object) -> None:
        raise kind("the reason", None) if kind is Refused else kind("the reason")  # type: ignore[call-arg]

    monkeypatch.setattr(entry.VERBS["doctor"], "run", fail)
    assert main(["doctor"]) == kind.exit_code
    assert capsys.readouterr().err == "diffship doctor: the reason\n"


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 3, "No such file or directory: x.png"),
        (OSError(28, "No space left on device"), 3, "No space left on device"),
        (MemoryError(), 3, "out of memory"),
        (errors.MissingExtra("onnx", "onnx"), 3, "pip install 'diffship[onnx]'"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 3, "pip install 'diffship[torch]'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "internal error: ModuleNotFoundError"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero"),
    ],
)
def test_other_faults(fault: BaseException, code: int, message: str, capsys: Any, monkeypatch: Any) -> None:
    def fail(options: object) -> None:
        raise fault

    monkeypatch.setattr(entry.VERBS["doctor"], "run", fail)
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_a_verb_that_does_not_import_is_told_in_one_line(capsys: Any, monkeypatch: Any) -> None:
    def fail(name: str) -> None:
        raise KeyError("a table of it")

    monkeypatch.setattr(entry, "import_module", fail)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "internal error: KeyError: 'a table of it'" in captured.err and "Traceback" not in captured.err


def test_debug_shows_the_traceback(capsys: Any, monkeypatch: Any) -> None:
    def fail(options: object) -> None:
        raise errors.BundleError("the reason")

    monkeypatch.setattr(entry.VERBS["doctor"], "run", fail)
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_and_common_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "--json" in text and "--quiet" in text


def test_prompts_may_stand_behind_flags() -> None:
    options = entry.parse(["run", "D", "red apple", "--steps", "3", "black cat", "--seed", "1", "frog"])
    assert options.prompts == ["red apple", "black cat", "frog"] and options.steps == 3
    assert entry.parse(["run", "D", "--steps", "3", "x"]).prompts == ["x"]
    assert entry.parse(["run", "D"]).prompts == []  # and none of the above has been kept


def test_version_and_module_form() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffship", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("diffship 0.")


def test_every_stage_of_the_registry_is_there() -> None:
    commands = pytest.importorskip("diffship.training.commands")
    assert all(callable(getattr(commands, target.partition(":")[2])) for target in STAGES.values())


def test_closed_pipe_is_no_error() -> None:
    code = "import sys; from diffship.cli.main import main; sys.exit(main(['--help']))"
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.close()
    assert "Traceback" not in reader.stderr.read()
    reader.stderr.close()
    reader.wait(timeout=60)
