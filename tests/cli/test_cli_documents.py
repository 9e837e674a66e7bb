from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffship.cli.main import VERBS, main
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.sampling.picture import read_settings
from diffship.sampling.wire import pack, unpack

jsonschema = pytest.importorskip("jsonschema")
SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"


def check(document: dict[str, Any], verb: str) -> dict[str, Any]:
    """The document, valid under the schema of its verb; `exit_code` and `stderr` are the fixture's own."""
    schema = json.loads((SCHEMAS / f"{verb}.json").read_text(encoding="utf-8"))
    plain = {key: value for key, value in document.items() if key not in ("exit_code", "stderr")}
    jsonschema.validate(plain, schema)
    return document


def test_every_verb_has_a_schema_that_is_one() -> None:
    assert {file.stem for file in SCHEMAS.glob("*.json")} == set(VERBS)
    for file in SCHEMAS.glob("*.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("verb", VERBS)
def test_errors_validate(verb: str, command: Any) -> None:
    document = check(command(verb, "--no-such-flag"), verb)
    assert document["error"]["exit_code"] == 2


def test_doctor(command: Any) -> None:
    document = check(command("doctor"), "doctor")
    assert {engine["engine"] for engine in document["engines"]} >= {"onnxruntime", "openvino", "torch"}
    for engine in document["engines"]:
        assert engine["available"] or (engine["reason"] and engine["install"])


def test_inspect_bundle(command: Any, tiny_bundle: Path) -> None:
    document = check(command("inspect", tiny_bundle), "inspect")
    parts = {part["name"]: part for part in document["parts"]}
    assert document["kind"] == "bundle" and parts.keys() >= {"text_encoder", "unet", "vae_decoder"}
    assert all(part["status"] == "proved" and part["bytes"] > 0 for part in parts.values())
    assert [spec["name"] for spec in parts["unet"]["inputs"]][:3] == ["sample", "timestep", "encoder_hidden_states"]


@pytest.mark.slow
def test_inspect_lint(command: Any, tmp_path: Path) -> None:
    document = check(command("inspect", tmp_path, "--lint", "swift"), "inspect")
    assert document["exit_code"] == 1 and document["kind"] == "lint" and not document["passed"]
    assert {"vocab.json", "Unet.mlpackage"} <= {finding["file"] for finding in document["findings"]}


@pytest.mark.slow
def test_inspect_source(command: Any) -> None:
    pytest.importorskip("torch")
    document = check(command("inspect", "arch:tiny-sd"), "inspect")
    unet = next(part for part in document["parts"] if part["name"] == "unet")
    assert document["kind"] == "source" and unet["parameters"] > 0 and unet["conv_linear_macs"] > 0


@pytest.mark.slow
def test_inspect_placement(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ["--placement", "--stages", 2, "--stride", 2, "--warm-up", 2, "--steps", 7, "--chart", tmp_path / "t.svg"]
    document = check(command("inspect", "arch:tiny-sdxl", *words), "inspect")
    assert document["cut"] == "published" and document["homes"] == [1, 0, 1]
    # stride 2 takes one more device, which holds and receives what the last one does
    assert [row["stages"] for row in document["devices"]] == [["unet.1"], ["unet.0", "unet.2"], ["unet.0", "unet.2"]]
    assert [(link["from"], link["to"]) for link in document["links"]] == [(0, 1), (1, 0), (0, 2)]
    assert document["bytes_per_round"] == sum(link["bytes"] for link in document["links"])
    assert [row["cut"] for row in document["compared"]] == ["published", "speed", "memory"]
    fastest = max(row["after_warm_up"] for row in document["compared"])
    assert fastest == document["compared"][1]["after_warm_up"] <= 4.0
    assert (tmp_path / "t.svg").read_text(encoding="utf-8").startswith("<svg ")
    assert "--overwrite" in command("inspect", "arch:tiny-sdxl", *words)["error"]["message"]


def test_flags_of_a_placement_without_it_are_refused(command: Any, tiny_bundle: Path) -> None:
    document = check(command("inspect", "arch:tiny-sd", "--stages", 3, "--warm-up", 2), "inspect")
    assert document["exit_code"] == 2 and "--stages, --warm-up without --placement" in document["error"]["message"]
    assert "holds its unet as one part" in command("inspect", tiny_bundle, "--placement")["error"]["message"]


@pytest.mark.slow
def test_verify(command: Any, tiny_bundle: Path) -> None:
    document = check(command("verify", tiny_bundle), "verify")
    assert document["exit_code"] == 0 and document["passed"]
    assert check(command("verify", tiny_bundle, "--hashes-only"), "verify")["files"] == document["files"]


@pytest.mark.slow
def test_run_writes_pictures_with_their_settings(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["run", tiny_bundle, "red apple", "black cat", "--steps", 2, "--seed", 5, "--images", 2]
    document = check(command(*words, "-o", tmp_path / "o", "--grid", tmp_path / "g.png"), "run")
    assert document["exit_code"] == 0, document["stderr"]
    assert [picture["seed"] for picture in document["pictures"]] == [5, 6, 5, 6]
    for picture in document["pictures"]:
        settings = read_settings(picture["file"])
        assert settings["prompt"] == picture["prompt"] and settings["seed"] == picture["seed"]
        with Image.open(picture["file"]) as image:
            assert image.size == (picture["width"], picture["height"])
            assert f"Seed: {picture['seed']}" in image.text["parameters"]
    assert (tmp_path / "g.png").stat().st_size > 0
    assert "loaded in" not in document["stderr"] and document["peak_host_bytes"] > 3e7
    assert 0 < document["load_seconds"] + 4 * document["picture_seconds"] <= document["seconds"] + 0.01


@pytest.mark.slow
def test_run_twice_gives_the_same_bytes(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        document = command("run", tiny_bundle, "red apple", "--steps", 2, "-o", tmp_path / name, "--no-metadata")
        assert document["exit_code"] == 0, document["stderr"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_settings(tmp_path / "a.png") == {}


def test_run_refuses_a_size_that_the_model_cannot_draw(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    document = check(command("run", tiny_bundle, "x", "--size", 100, "-o", tmp_path / "o"), "run")
    assert document["exit_code"] == 2 and "nearest" in document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_an_option_that_the_engine_lacks(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    document = command("run", tiny_bundle, "x", "--option", "threadz=1", "-o", tmp_path / "o")
    assert document["exit_code"] == 2 and "threads" in document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_damage_is_exit_code_one(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    victim = max(copy.rglob("*.onnx_data"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    document = check(command("verify", copy), "verify")
    assert document["exit_code"] == 1 and victim.name in document["damage"]
    victim.write_bytes(data[:-1])
    document = check(command("run", copy, "x", "--steps", 1, "-o", tmp_path / "o"), "run")
    assert document["exit_code"] == 1 and victim.name in document["error"]["message"]
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["arch:tiny-sdxl"], "unet: arch:tiny-sd (torch) takes sample"),
        (["arch:tiny-sd+lcm"], "timestep_cond"),
        (["emoji", "--parts", "text_encoder"], "text_encoder: arch:tiny-sd (torch) and emoji (torch) have other vocab"),
        (
            ["emoji", "--parts", "vae_decoder"],
            "has latents of (4, 8, 8), emoji (torch) of (4, 16, 16): give one --size",
        ),
    ],
)
def test_compare_refuses_two_families(others: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "arch:tiny-sd", *others, "--steps", "1", "--quiet"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_compare_a_source_with_its_bundle(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["compare", "arch:tiny-sd", tiny_bundle, "red apple", "--steps", 2, "--grid", tmp_path / "g.png"]
    document = check(command(*words), "compare")
    assert document["exit_code"] == 0, document
    assert all(part["same_source"] and part["judged"] and part["passed"] for part in document["parts"])
    assert len(document["steps"]) >= 2 and document["steps"][-1]["max_abs"] < 1e-3
    with Image.open(tmp_path / "g.png") as image:
        assert np.asarray(image).std() > 0


@pytest.mark.slow
def test_export_of_one_part_without_proof(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    folder = tmp_path / "vae"
    words = ["export", "arch:tiny-sd", "--parts", "vae_decoder", "--no-verify", "-o", folder]
    document = check(command(*words), "export")
    assert document["exit_code"] == 0, document
    assert [(part["name"], part["proof"]) for part in document["parts"]] == [("vae_decoder", "unproven")]
    again = check(command(*words), "export")
    assert again["exit_code"] == 2 and "overwrite" in again["error"]["message"]
    assert check(command("verify", folder), "verify")["exit_code"] == 1


@pytest.mark.slow
def test_resume_continues_to_the_same_picture(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    from diffship.runtimes.engines.model import open_model
    from diffship.sampling.generate import Request, start
    from diffship.sampling.loop import denoise, denoiser_of
    from diffship.sampling.wire import pack, unpack

    words = ["run", tiny_bundle, "red apple", "--steps", 3, "--seed", 4, "--no-metadata"]
    kept = tmp_path / "kept"
    whole = command(*words, "-o", tmp_path / "whole.png", "--save-trajectory", kept)
    assert whole["exit_code"] == 0 and unpack(kept.read_bytes()).done
    with open_model(tiny_bundle) as model:
        half = denoise(start(model, Request("red apple", steps=3, seed=4)), denoiser_of(model), until=1)
    kept.write_bytes(pack(half[0]))
    words = ["run", tiny_bundle, "--resume", kept, "--no-metadata", "-o", tmp_path / "rest.png"]
    rest = check(command(*words), "run")
    assert rest["exit_code"] == 0 and rest["pictures"][0]["prompt"] == "red apple"
    assert (tmp_path / "rest.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["x"], "leave a prompt out"),
        (["--steps", "3"], "leave --steps out"),
        (["--mask", "m.png"], "leave --mask out"),
        ([], "is not a file"),
    ],
)
def test_resume_refuses(extra: list[str], message: str, command: Any, tmp_path: Path) -> None:
    document = check(command("run", "D", "--resume", tmp_path / "none", *extra), "run")
    assert document["exit_code"] == 2 and message in document["error"]["message"]


def test_a_damaged_trajectory_is_refused(command: Any, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"\x00" * 100)
    document = check(command("run", "D", "--resume", tmp_path / "kept"), "run")
    assert document["exit_code"] == 1 and document["error"]["type"] == "HandoffError"
    (tmp_path / "kept").write_text("<!DOCTYPE html><html></html>")
    assert "; it is a web page" in command("run", "D", "--resume", tmp_path / "kept")["error"]["message"]


LATE = {
    "a file for a folder": (["run", "B", "apple", "-o", "file"], "-o file is a file; name a folder, or a .png file"),
    "a folder for a file": (["run", "B", "apple", "-o", "dir.png"], "-o dir.png is a folder"),
    "below a file": (["run", "B", "apple", "-o", "file/x.png"], "file is a file, not a folder"),
    "another format": (["run", "B", "apple", "-o", "x.jpg"], "pictures are written as PNG"),
    "grid": (["run", "B", "apple", "--grid", "dir.png"], "--grid dir.png is a folder"),
    "trajectory": (["run", "B", "apple", "--save-trajectory", "dir.png"], "--save-trajectory dir.png is a folder"),
    "grid of two": (["compare", "B", "B", "--grid", "dir.png"], "--grid dir.png is a folder"),
    "no prompt": (["run", "red apple"], "no prompt is given; the bundle comes first"),
    "taken": (["export", "emoji", "-o", "dir.png"], "dir.png exists already"),
    "here": (["export", "emoji", "-o", "."], "is the current folder"),
    "part": (["verify", "B", "--parts", "unett"], "did you mean 'unet'"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_at_the_end_is_refused_before_the_work(
    case: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = LATE[case]
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "dir.png" / "kept").touch()
    monkeypatch.chdir(tmp_path)
    opened: list[object] = []
    monkeypatch.setattr("diffship.runtimes.engines.model.open_model", lambda *_, **__: opened.append(1))
    assert main([str(tiny_bundle) if word == "B" else word for word in words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not opened
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dir.png", "file", "kept"]


@pytest.mark.slow
def test_prompts_behind_two_dashes_may_begin_with_one(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(tiny_bundle), "--steps", "1", "-o", str(tmp_path / "q.png")]
    assert main([*words, "--", "-5 degrees"]) == 0
    assert read_settings(tmp_path / "q.png")["prompt"] == "-5 degrees"
    told = r"onnxruntime: loaded in \d+\.\d s, 1 picture in \d+\.\d\d s, peak memory \d+\.\d [MG]B"
    said = capsys.readouterr()
    assert re.fullmatch(told, said.err.splitlines()[-1]) and said.out == f"{tmp_path / 'q.png'}\n"
    assert main([*words, "--overwrite", "--quiet", "x"]) == 0 and capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "facts", [{}, {"seed": "abc"}, {"seed": None}, {"seed": [1]}, {"seed": 1, "warnings": 5}, {"warnings": [["a"]]}]
)
def test_a_trajectory_is_finished_whatever_its_facts_say(
    facts: dict[str, Any], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "t.traj"
    words = ["--steps", "2", "--save-trajectory", str(kept), "-o", str(tmp_path / "a.png"), "--seed", "7"]
    assert main(["run", str(tiny_bundle), "apple", *words]) == 0
    kept.write_bytes(pack(replace(unpack(kept.read_bytes()), facts=facts)))
    capsys.readouterr()
    assert main(["run", str(tiny_bundle), "--resume", str(kept), "-o", str(tmp_path / "b.png"), "--json"]) == 0
    check(json.loads(capsys.readouterr().out), "run")


@pytest.mark.slow
def test_an_export_that_only_draws_with_another_sampler_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_source("arch:tiny-sd")
    index = {**model.model_index, "scheduler": ["diffusers", "LMSDiscreteScheduler"]}
    scheduler = {**model.scheduler, "_class_name": "LMSDiscreteScheduler"}
    save(replace(model, scheduler=scheduler, model_index=index), tmp_path / "m")
    words = ["export", str(tmp_path / "m"), "--parts", "vae_decoder", "--no-verify", "-o", str(tmp_path / "b")]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "warning: it draws with --sampler NAME only: scheduler/scheduler_config.json: _class_name is 'LMS" in said
