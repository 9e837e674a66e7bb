"""Every verb with nothing, with each of its flags alone, and with a source that is not there: taken from the parser, so
that a new flag is walked too. And commands whose standard streams are closed, full, or in an old code page."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffship.cli.main import VERBS, main, make_parser
from diffship.core.registry import EXPORTERS
from diffship.runtimes.engines import engine

ROOT = Path(__file__).parents[2]
NOWHERE = "./нигде"  # no letter of it is in the code page below
CODES = {0, 1, 2, 3, 4}
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def actions(verb: str, words: tuple[str, ...] = ()) -> list[argparse.Action]:
    _, parsers = make_parser()
    VERBS[verb].complete(parsers[verb], words)
    return [action for action in parsers[verb]._actions if action.dest != "help"]


def value(action: argparse.Action) -> list[str]:
    """A word that a flag takes; what it means where nothing else is given is the verb's affair."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(next(iter(action.choices)))]
    if action.type in (int, float, None) or action.type is str:
        return ["1"]
    return {"setting": ["a=1"], "worded": ["a=1"], "size": ["64"], "split": ["1,1"], "json_name": ["x.json"]}.get(
        getattr(action.type, "__name__", ""), ["1"]
    )


def places(verb: str) -> list[str]:
    """What stands for the words that a verb needs, each of them nowhere."""
    words = []
    for action in actions(verb):
        if not action.option_strings and action.nargs != "*":
            words += value(action) if action.choices else [NOWHERE]
        elif action.required:
            words += [action.option_strings[0], "out" if action.dest in ("output", "out") else NOWHERE]
    return words


def forms(verb: str) -> Iterator[list[str]]:
    """Nothing; what is needed; then every flag alone and with that, with its value and without."""
    needed = places(verb)
    yield from ([verb], [verb, *needed])
    targets = [("--to", name) for name in EXPORTERS] if verb == "export" else [()]
    for target in targets:
        for action in actions(verb, target):
            for flag in action.option_strings[-1:]:
                given = [*target, flag, *value(action)]
                yield from ([verb, *target, flag], [verb, *given])
                if flag not in needed:
                    yield [verb, *needed, *given]


class CodePage(io.TextIOWrapper):
    """A standard stream of an old Windows, and what was written to it since it was last asked."""

    def __init__(self, errors: str) -> None:
        super().__init__(io.BytesIO(), "cp1252", errors)

    def said(self) -> str:
        self.flush()
        self.seek(0)
        text = self.read()
        self.seek(0)
        self.truncate()
        return text


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_words_of_a_verb_are_an_internal_error(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "probe_all", list)  # doctor: seconds for each of its flags
    stdout, stderr = CodePage("strict"), CodePage("backslashreplace")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    wrong = []
    for words in [words for form in forms(verb) for words in (form, [*form, "--json"])]:
        code = main(words)
        said, told = stdout.said(), stderr.said()
        if code not in CODES or "internal error" in told or ("Traceback" in told and "--debug" not in words):
            wrong.append((words, code, told))
        elif words.count("--json") == 1 and words[-1] == "--json":
            document = json.loads(said)
            if document["ok"] != (code == 0) or (code and document["error"]["exit_code"] != code):
                wrong.append((words, code, said))
    assert wrong == []


def shell(redirections: str, words: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Streams are closed before the interpreter starts, as a daemon's are."""
    python = [sys.executable, *words]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *python],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        timeout=60,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the redirections are sh's")
@pytest.mark.parametrize(
    ("redirections", "code", "out", "err"),
    [
        (">&-", 0, b"", b""),
        ("2>&-", 0, b"onnx bundle", b""),
        ("<&- >&- 2>&-", 0, b"", b""),
        pytest.param(">/dev/full", 3, b"", b"diffship: stdout: No space left on device\n", marks=FULL),
    ],
    ids=["stdout", "stderr", "all", "a full disk"],
)
def test_streams_that_are_closed_or_full(
    redirections: str, code: int, out: bytes, err: bytes, tmp_path: Path, tiny_bundle: Path
) -> None:
    done = shell(redirections, ["-m", "diffship", "inspect", str(tiny_bundle)], tmp_path)
    assert (done.returncode, done.stderr) == (code, err)
    assert out in done.stdout and bool(out) == bool(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the redirections are sh's")
def test_work_with_stderr_closed_is_done_and_its_document_is_the_only_thing_on_stdout(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    words = ["-m", "diffship", "run", str(tiny_bundle), "cat", "--steps", "1", "-o", "out", "--json"]
    done = shell("2>&-", words, tmp_path)
    assert done.returncode == 0
    (picture,) = json.loads(done.stdout)["pictures"]
    assert (tmp_path / picture["file"]).is_file()


CLOSED = """
import os
from diffship.core.streams import prepare
prepare()
opened = os.open("weights", os.O_WRONLY | os.O_CREAT)
os.write(2, b"what a library says")  # of native code: it knows the number alone
raise SystemExit(opened < 3 or os.stat("weights").st_size)
"""


@pytest.mark.skipif(os.name == "nt", reason="the redirections are sh's")
def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    assert shell("<&- >&- 2>&-", ["-c", CLOSED], tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="other locales")
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, b"\\u044f\\u0431/a.png"),
        ({"LC_ALL": "C"}, "яб/a.png".encode()),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "яб/a.png".encode()),
    ],
    ids=["cp1252", "C", "C without UTF-8"],
)
def test_a_code_page_that_lacks_a_letter(
    setting: dict[str, str], expected: bytes, tmp_path: Path, tiny_bundle: Path
) -> None:
    words = ["-m", "diffship", "run", str(tiny_bundle), "cat", "--steps", "1", "-q", "-o", "яб/a.png"]
    done = shell("", words, tmp_path, **setting)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, b"")
    assert (tmp_path / "яб/a.png").is_file()
