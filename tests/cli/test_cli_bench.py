"""The bench verb: its flags, its refusals, and real small models in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks.measure.record import read_result, write_result
from diffship.benchmarks.measure.row import Row
from diffship.cli.bench import byte_count, prints_json

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "bench.json"
CONDITIONS = {"model": "arch:x", "weights": "random weights", "runner": "torch", "part": "image", "batch": 1}
CONDITIONS |= {"steps": 4, "size": 64, "precision": "fp32"}


def check(document: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in document.items() if key not in ("exit_code", "stderr")}
    jsonschema.validate(plain, json.loads(SCHEMA.read_text(encoding="utf-8")))
    return document


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom diffship.cli.main import main\n"
        "assert main(['bench', '--help']) == 0\n"
        "print([m for m in ('numpy', 'torch', 'onnx', 'onnxruntime', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("1.5g", 15 * 10**8), ("2 kB", 2000), ("1000", 1000)],
)
def test_byte_counts(text: str, size: int) -> None:
    assert byte_count(text) == size


@pytest.mark.parametrize(
    ("words", "stdout"),
    [
        (["bench", "emoji", "--json"], True),
        (["bench", "--json", "out.json", "emoji"], False),
        (["bench", "emoji", "--json", "--quiet"], True),
        (["bench", "emoji"], False),
    ],
)
def test_json_goes_to_a_file_or_to_stdout(words: list[str], stdout: bool) -> None:
    assert prints_json(words) is stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a bundle or a source"),
        (["emoji", "--engines", "onnxruntim"], "did you mean 'onnxruntime'"),
        (["emoji", "--against", "optimum-itel"], "did you mean 'optimum-intel'"),
        (["emoji", "--parts", "unett"], "did you mean 'unet'"),
        (["emoji", "--steps", "0"], "legal is from 1"),
        (["emoji", "--memory-limit", "lots"], "not a number of bytes"),
        (["emoji", "--suite", "gpu"], "leave emoji out"),
        (["--suite", "gpu", "--calls", "3"], "leave --calls out"),
        (["--suite", "no-such-suite"], "there is no such folder: run it in a clone of diffship"),
        (["--merge", "a.json", "-o", "b.json"], "--merge measures nothing"),
        (["emoji", "--json", "a.json", "-o", "b.json"], "give one of them"),
        (["no/such/model", "--rounds", "1", "--no-install"], "does not exist"),
    ],
)
def test_refusals_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err and err.startswith("diffship bench: ")


def test_a_refusal_has_the_name_of_the_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    from diffship.cli.main import main

    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "diffship bench: nothing to measure: name a bundle or a source\n"
    assert main(["bench", "emoji", "--steps", "0"]) == 2
    assert capsys.readouterr().err.startswith("diffship bench: steps[0] is 0; legal is from 1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "taken"], "-o taken is a folder"),
        (["--json", "file/r.json"], "--json file/r.json: "),
        (["--csv", "taken"], "--csv taken is a folder"),
        (["--markdown", "file/t.md"], "is a file, not a folder"),
        (["--plots", "file"], "is a file, not a folder"),
        (["--work", "file"], "is a file, not a folder"),
    ],
)
def test_places_are_checked_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setattr("diffship.cli.bench._measured", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", "emoji", *words]) == 2
    assert message in capsys.readouterr().err


def test_plots_need_matplotlib_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.cli.main import main

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("diffship.cli.bench._measured", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", "emoji", "--plots", str(tmp_path / "plots")]) == 3
    assert "pip install 'diffship[plots]'" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two results files that hold whole images."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, steps in zip(paths, (4, 25), strict=True):
        row = Row("s", f"x, {steps}", "image_seconds_p50", 0.5 * steps, "s", conditions={**CONDITIONS, "steps": steps})
        write_result(path, "s", "make it", [row])
    return paths


def test_merge_joins_files_into_both_forms(files: list[Path], command: Any, tmp_path: Path) -> None:
    words = ["bench", "--merge", *files, "--markdown", tmp_path / "t.md", "--csv", tmp_path / "t.csv"]
    document = check(command(*words))
    assert document["exit_code"] == 0
    cells = [cell for row in document["merged"]["lcm_lora"]["rows"] for cell in row]
    assert "2.00 s" in cells and "12.5 s" in cells and "published" in cells
    assert "random weights" in (tmp_path / "t.md").read_text(encoding="utf-8")
    assert len((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_tables_are_printed_and_other_files_written_where_one_cannot_be(
    files: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.cli.main import main
    from diffship.core import atomic

    def write(path: Path, text: str) -> None:
        if path.suffix == ".csv":
            raise OSError(28, "No space left on device", str(path))
        path.write_text(text, encoding="utf-8")

    monkeypatch.setattr(atomic, "write_file", write)
    words = ["--csv", str(tmp_path / "t.csv"), "--markdown", str(tmp_path / "new" / "t.md"), "--overwrite"]
    monkeypatch.setattr("diffship.cli.bench._measured", lambda *_: read_result(files[0]))
    for start in (["emoji"], ["--merge", *map(str, files)]):
        assert main(["bench", *start, *words]) == 3
        said = capsys.readouterr()
        assert said.err == f"diffship bench: No space left on device: {tmp_path / 't.csv'}\n"
        assert "2.00 s" in said.out and "| " in (tmp_path / "new" / "t.md").read_text(encoding="utf-8")


def test_merge_refuses_older_and_edited_files(files: list[Path], command: Any) -> None:
    content = json.loads(files[0].read_text(encoding="utf-8"))
    files[0].write_text(json.dumps({**content, "schema": 1}), encoding="utf-8")
    document = check(command("bench", "--merge", *files))
    assert document["exit_code"] == 2 and "has schema 1, this version reads 2" in document["error"]["message"]
    files[0].write_text(json.dumps({**content, "command": "other"}), encoding="utf-8")
    assert "edited by hand" in check(command("bench", "--merge", *files))["error"]["message"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_source_in_our_engines_and_a_peer(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    words = ["bench", "arch:tiny-sd", "--engines", "onnxruntime,torch", "--against", "diffusers,sdcpp", "--rounds", 1]
    words += ["--parts", "unet,image", "--steps", 2, "--calls", 2, "--no-install", "-o", tmp_path / "r.json"]
    document = check(command(*words, "--work", tmp_path / "work"))
    assert document["exit_code"] == 0, document
    found = {(row.subject, row.metric): row for row in read_result(tmp_path / "r.json").rows}
    for runner in ("onnxruntime", "torch", "diffusers"):
        for subject in (f"arch:tiny-sd / {runner} / unet", f"arch:tiny-sd / {runner} / image, 2 steps"):
            assert found[subject, "peak_host_bytes"].value > 3e7
            assert found[subject, "flops"].value > 0 and 0 < found[subject, "share_of_ceiling"].value < 2
        # all three count the same model
        assert found[f"arch:tiny-sd / {runner} / unet", "parameters"].value == 715_700
    missing = found["arch:tiny-sd / sdcpp / unet", "call_seconds_p50"]
    assert (missing.value, missing.status) == (None, "missing") and ".venv-sdcpp" in missing.reason
    assert found["arch:tiny-sd / torch / unet against diffusers", "call_seconds_ratio"].n == 1
    assert ("arch:tiny-sd / torch / unet against onnxruntime", "call_seconds_ratio") not in found, "each pair once"


@pytest.mark.slow
def test_a_bundle_alone(command: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", tiny_bundle, "--engines", "onnxruntime,torch", "--against", "diffusers", "--rounds", 1]
    words += ["--parts", "vae_decoder", "--calls", 2, "--memory-limit", "20GB", "--work", tmp_path / "work"]
    document = check(command(*words))
    rows = {(row["subject"], row["metric"]): row for row in document["results"]["rows"]}
    assert rows["tiny / onnxruntime / vae_decoder", "call_seconds_p50"]["status"] == "ok"
    for runner, reason in (("torch", "does not run"), ("diffusers", "bench the source")):
        row = rows[f"tiny / {runner} / vae_decoder", "call_seconds_p50"]
        assert row["status"] == "unsupported" and reason in row["reason"]
    assert str(tiny_bundle) not in json.dumps(document["results"])
