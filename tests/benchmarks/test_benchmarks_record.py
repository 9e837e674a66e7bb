"""Results carry their command, their machine and a digest; other schemas and edits by hand are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.benchmarks import freshness
from diffship.benchmarks.freshness import PACKAGE, suite_digest
from diffship.benchmarks.measure import ceiling, machine, materials, record
from diffship.benchmarks.measure.record import SCHEMA, content_digest, read_result, write_result
from diffship.benchmarks.measure.row import Row
from diffship.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FORM = ROOT / "docs" / "schema" / "results" / "v2.json"


def a_row(**changes: Any) -> Row:
    plain: dict[str, Any] = {"suite": "s", "subject": "x", "metric": "m", "value": 1.5, "unit": "s"}
    return Row(**{**plain, **changes})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "r.json"
    write_result(path, "s", "make it", [a_row(low=1.0, high=2.0, n=3, conditions={"model": "emoji"})], {"calls": 3})
    return path


def changed(file: Path, **changes: object) -> Path:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_result_comes_back_with_its_machine_in_every_row(file: Path) -> None:
    found = read_result(file)
    assert (found.suite, found.command, found.settings) == ("s", "make it", {"calls": 3})
    (row,) = found.rows
    assert (row.value, row.low, row.high, row.n) == (1.5, 1.0, 2.0, 3)
    assert row.environment == found.environment and found.environment["cores"] >= 1
    assert found.code == suite_digest("s")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.environment["date"])


@pytest.mark.slow
def test_code_that_changed_while_it_ran_is_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies on the disk at the end of hours is not what was measured."""
    newest = max(file.stat().st_mtime for file in PACKAGE.rglob("*"))
    monkeypatch.setattr(record, "_BEGAN", newest)
    assert record.code_of("serving", []) == suite_digest("serving") and capsys.readouterr().err == ""
    later = tmp_path / "load.py"
    later.write_bytes((PACKAGE / "benchmarks" / "studies" / "service" / "load.py").read_bytes())
    os.utime(later, (newest + 1, newest + 1))
    find, load = freshness._file, "diffship.benchmarks.studies.service.load"
    monkeypatch.setattr(
        freshness,
        "_file",
        lambda name, package: later if name == load else find(name, package),
    )
    made = write_result(tmp_path / "serving.json", "serving", "make it", [a_row(suite="serving")])
    assert made.code == record.NO_CODE and read_result(tmp_path / "serving.json") is not None
    assert capsys.readouterr().err.startswith(f"serving: {load} changed while it was measured")
    assert record.code_of("cold-start", []) == suite_digest("cold-start"), "which the server's clock is no part of"


def test_an_edit_by_hand_is_refused_and_says_what_to_do(file: Path) -> None:
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    rows[0]["value"] = 1.4
    with pytest.raises(ConfigError, match=r"edited by hand. Measure again: make it$"):
        read_result(changed(file, rows=rows))


@pytest.mark.parametrize("key", ["environment", "settings", "command", "code", "suite"])
def test_what_a_reader_relies_on_is_signed(key: str, file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edited = {**content[key], "cpu": "faster"} if isinstance(content[key], dict) else "other"
    with pytest.raises(ConfigError, match="edited by hand"):
        read_result(changed(file, **{key: edited}))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (1, f"has schema 1, this version reads {SCHEMA}. Measure it again with this version: make it"),
        (None, "has schema None"),
        (SCHEMA + 1, "A newer diffship wrote it: pip install -U diffship"),
    ],
)
def test_another_schema_is_refused_and_says_what_to_do(schema: object, message: str, file: Path) -> None:
    with pytest.raises(ConfigError) as fault:
        read_result(changed(file, schema=schema))
    assert message in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "null"])
def test_a_file_that_is_none_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        read_result(tmp_path / "r.json")
    assert "r.json" in str(fault.value) and "\n" not in str(fault.value)


def test_a_row_of_another_form_is_refused_even_with_a_right_digest(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["rows"][0]["verdict"] = "best"
    content["digest"] = content_digest(content)
    with pytest.raises(ConfigError, match="unknown key 'verdict'"):
        read_result(changed(file, **content))


def test_the_environment_names_no_host_and_no_path() -> None:
    found = machine.environment()
    text = json.dumps(found)
    assert "/" not in text.replace("\\/", "")
    assert set(found) >= {"cpu", "gpus", "driver", "memory_gib", "threads", "python", "packages", "commit"}


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (
            ["processor\t: 0", "cpu family\t: 23", "model\t\t: 49", "model name\t: AMD EPYC"],
            "AMD EPYC (family 23, model 49)",
        ),
        (["cpu family: 6", "model: 85", "model name: Xeon", "model name: other"], "Xeon (family 6, model 85)"),
        (["model name\t: ARMv7 rev 4", "BogoMIPS\t: 38.4"], "ARMv7 rev 4"),
        (["processor : 0", "no colon"], ""),
    ],
)
def test_generations_of_processors_of_one_name_are_told_apart(lines: list[str], name: str) -> None:
    assert machine.processor(lines) == name


def test_threads_are_those_that_engines_will_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    assert machine.threads() >= 1


@pytest.mark.slow
def test_ceilings_are_rates_of_this_machine() -> None:
    found = ceiling.ceilings(repeats=1)
    assert found.keys() == {"matrix_product_flops", "copy_bytes_per_second"}
    assert all(1e7 < value < 1e15 for value in found.values())


@pytest.mark.slow
def test_the_ceiling_is_that_of_the_fastest_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_installed", list)
    alone = ceiling.ceilings(repeats=1)["matrix_product_flops"]
    monkeypatch.setattr(ceiling, "_installed", lambda: [lambda: lambda: None])  # it takes no time at all
    assert ceiling.ceilings(repeats=1)["matrix_product_flops"] > 100 * alone


def test_on_a_gpu_the_copy_is_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roofline divides one ceiling by the other: the host's copy under the GPU's product means nothing."""
    asked = []

    def product(device: str, dtype: str = "float32") -> Callable[[], None]:
        asked.append((device, dtype))
        return lambda: None

    monkeypatch.setattr(ceiling, "_torch", product)
    monkeypatch.setattr(ceiling, "_torch_copy", lambda device: product(device, "copy"))
    monkeypatch.setattr(ceiling.np, "copyto", None)  # the host's memory is not touched
    found = ceiling.ceilings("cuda", repeats=1)
    assert asked == [("cuda", "float32"), ("cuda", "float16"), ("cuda", "copy")]
    assert found.keys() == {"matrix_product_flops", "matrix_product_flops_fp16", "copy_bytes_per_second"}


def test_a_copy_by_torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(ceiling, "_COPY_BYTES", 64)
    assert ceiling._torch_copy("cpu")() == 1


@pytest.mark.parametrize("make", ceiling._installed(), ids=lambda make: make.__name__)
def test_every_library_gives_a_product(make: Callable[[], Callable[[], object]]) -> None:
    values = np.asarray(make()())
    assert values.shape == (ceiling.SIDE, ceiling.SIDE) and np.abs(values).max() > 1


def test_the_key_of_what_is_kept_follows_what_makes_it_and_nothing_else(tmp_path: Path) -> None:
    peer, table = "benchmarks/measure/peers/c.py", "benchmarks/report/tables.py"
    for name in ("core/a.py", "runtimes/b.py", peer, table, "cli/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n", encoding="utf-8")
    before = machine.code_digest(tmp_path)
    for name, matters in (("core/a.py", True), (peer, True), (table, False)):
        (tmp_path / name).write_text("2\n", encoding="utf-8")
        assert (machine.code_digest(tmp_path) != before) is matters
        before = machine.code_digest(tmp_path)


def test_what_makes_it_is_there() -> None:
    names = (*machine.ROOMS, *machine.MEASURING, *materials.WEIGHTS, *materials.GRAPHS)
    assert [name for name in names if not machine._sources(PACKAGE / name)] == []


def test_the_documented_form_fits_what_is_written(file: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(FORM.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.validate(content, schema)
    content["rows"][0]["status"] = "fine"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_of_this_schema_and_as_they_were_measured(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert read_result(path).command
    content = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(content, json.loads(FORM.read_text(encoding="utf-8")))


def test_rows_say_which_statuses_and_kinds_there_are() -> None:
    assert a_row(value=None, status="OOM", reason="killed").status == "OOM"
    for change in ({"status": "fine"}, {"kind": "speed"}, {"low": float("nan")}):
        with pytest.raises(ConfigError):
            a_row(**change)


def test_row_is_read_back_and_refuses_nonsense() -> None:
    row = Row("parity", "sd15/unet", "max_abs", 4e-6, "", "ok", {"threads": 2})
    assert Row.from_json(row.to_json()) == row
    assert Row("a", "b", "c", None, status="skipped").value is None
    with pytest.raises(ConfigError, match="not finite"):
        Row("a", "b", "c", float("nan"))
    with pytest.raises(ConfigError, match=r"Row\.status: unknown value 'good'"):
        Row("a", "b", "c", 1.0, status="good")
