"""The commands `python -m diffship.benchmarks.NAME`: errors in one line, and names as results record them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffship.benchmarks import entry
from diffship.benchmarks.entry import enter, named_bundle, named_experiment
from diffship.core.errors import ConfigError, UnsupportedError

HERE = Path(entry.__file__).parent
# started by others, who read what they print; publish says it itself
INSIDE = ("measure/child", "measure/materials", "measure/peers/pipelines", "measure/peers/sdcpp", "publish/__main__")


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (ConfigError("no such model"), 2, "siblings: no such model\n"),
        (UnsupportedError("no GPU"), 3, "siblings: no GPU\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            3,
            "siblings: No such file or directory: x.json\n",
        ),
    ],
)
def test_an_expected_error_is_one_line_and_its_exit_code(
    fault: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        raise fault

    monkeypatch.setattr(sys, "argv", ["/somewhere/siblings.py"])
    with pytest.raises(SystemExit) as left:
        enter(main)
    assert left.value.code == code and capsys.readouterr().err == line


def test_a_package_is_called_by_its_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/__main__.py"])
    with pytest.raises(SystemExit):
        enter(results_of_nothing)
    assert capsys.readouterr().err == "benchmarks: no such file\n"


def results_of_nothing() -> int:
    raise ConfigError("no such file")


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (1, 1)])
def test_without_an_error_the_exit_code_is_that_of_main(given: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as left:
        enter(lambda: given)
    assert left.value.code == code


def test_every_command_goes_through_it() -> None:
    ending = 'if __name__ == "__main__":\n    '
    names = {file.relative_to(HERE).with_suffix("").as_posix(): file for file in HERE.rglob("*.py")}
    texts = {name: file.read_text(encoding="utf-8") for name, file in names.items()}
    commands = {name: text for name, text in texts.items() if ending in text and name not in INSIDE}
    assert {"studies/quality/siblings", "studies/service/serving", "__main__"} <= set(commands)
    assert all(text.endswith(f"{ending}enter(main)\n") for text in commands.values())


def test_names_that_results_record_are_found_where_they_usually_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_bundle("emoji") == Path("emoji")  # nowhere: the message has what was given
    (tmp_path / "out" / "emoji").mkdir(parents=True)
    assert named_bundle("emoji") == Path("out/emoji")
    (tmp_path / "emoji").mkdir()
    assert named_bundle("emoji") == Path("emoji") and named_bundle("x/emoji") == Path("x/emoji")
    (tmp_path / "benchmarks" / "experiments").mkdir(parents=True)
    (tmp_path / "benchmarks" / "experiments" / "compression.toml").touch()
    assert named_experiment("compression.toml") == Path("benchmarks/experiments/compression.toml")


def test_an_experiment_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    words = ["-m", "diffship.benchmarks.studies.quality.siblings", "nix.toml", "--work", "w"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "siblings: nix.toml cannot be read: No such file or directory\n")
