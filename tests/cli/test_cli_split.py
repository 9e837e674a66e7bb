"""`run` with several models: flags, output, engines, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from diffship.cli.main import main
from diffship.cli.models import half_on_cpu
from diffship.core.precision import FP16
from diffship.sampling.picture import read_settings

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schema" / "run.json").read_text(encoding="utf-8"))
LARGE = "arch:tiny-sd"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bk-tiny layout of LARGE as a diffusers folder."""
    folder = tmp_path_factory.mktemp("split") / "small"
    words = ["compress", LARGE, "--pass", "layout", "--set", "name=bk-tiny", "-o", str(folder)]
    assert main([*words, "--quiet"]) == 0
    return folder


def valid(document: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in document.items() if key not in ("exit_code", "stderr")}
    jsonschema.validate(plain, SCHEMA)
    return document


@pytest.mark.slow
def test_large_and_small_in_their_own_engines(command: Any, small: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["run", small, "red apple", "--large", tiny_bundle, "--split", "1,2", "--engines", "onnxruntime,torch"]
    document = valid(command(*words, "--sampler", "ddim", "--images", 2, "-o", tmp_path / "o"))
    assert document["exit_code"] == 0, document
    first, last = document["models"]
    assert (first["source"], first["engine"], first["steps"], first["calls"]) == (str(tiny_bundle), "onnxruntime", 1, 2)
    assert (last["source"], last["engine"], last["steps"], last["calls"]) == (str(small), "torch", 2, 4)
    assert first["seconds"] > 0 and last["seconds"] > 0
    assert (document["model"], document["engine"]) == (last["name"], "torch")
    settings = read_settings(document["pictures"][0]["file"])
    assert settings["steps"] == 3
    assert [entry["steps"] for entry in settings["split"]] == [1, 2]


@pytest.mark.slow
def test_one_model_reports_itself(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    document = valid(command("run", tiny_bundle, "x", "--steps", 2, "--sampler", "ddim", "-o", tmp_path / "a.png"))
    (model,) = document["models"]
    assert (model["steps"], model["calls"], model["engine"]) == (None, 2, "onnxruntime")
    assert "split" not in document["pictures"][0]["settings"]


@pytest.mark.slow
def test_the_text_lists_files_and_then_models(capsys: Any, small: Path, tmp_path: Path) -> None:
    words = ["run", "red apple", "--models", LARGE, str(small), "--split", "2,1", "--sampler", "ddim"]
    assert main([*words, "-o", str(tmp_path / "a.png"), "--quiet"]) == 0
    picture, first, last = capsys.readouterr().out.splitlines()
    assert picture == str(tmp_path / "a.png")
    assert first.startswith(f"{LARGE} (torch): 2 calls, ") and last.startswith(f"{small} (torch): 1 calls, ")


@pytest.mark.slow
def test_models_in_place_of_large(command: Any, small: Path, tmp_path: Path) -> None:
    rest = ["--split", "1,1", "--sampler", "ddim", "--no-metadata"]
    for name, words in (
        ("large", [small, "x", "--large", LARGE]),
        ("models", ["x", "--models", LARGE, small]),
        ("behind", ["--models", LARGE, small, "--seed", "0", "x"]),
    ):
        document = valid(command("run", *words, *rest, "-o", tmp_path / f"{name}.png"))
        assert document["exit_code"] == 0, document
    pictures = {(tmp_path / f"{name}.png").read_bytes() for name in ("large", "models", "behind")}
    assert len(pictures) == 1


@pytest.mark.slow
def test_a_split_resumes_where_it_stood(command: Any, small: Path, tmp_path: Path) -> None:
    pair = ["--large", LARGE, "--split", "1,2"]
    kept, whole = tmp_path / "kept", tmp_path / "whole.png"
    words = ["run", small, "x", *pair, "--sampler", "dpmpp-2m", "--no-metadata"]
    assert command(*words, "--save-trajectory", kept, "-o", whole)["exit_code"] == 0
    for step, calls in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1]), (3, [0, 0])):
        kept.write_bytes(half(small, step))
        document = valid(
            command("run", small, *pair, "--resume", kept, "--no-metadata", "--overwrite", "-o", tmp_path / "rest.png")
        )
        assert document["exit_code"] == 0, document
        assert [model["calls"] for model in document["models"]] == calls
        assert (tmp_path / "rest.png").read_bytes() == whole.read_bytes()
    document = valid(command("run", small, "--large", LARGE, "--split", "2,2", "--resume", kept))
    assert document["exit_code"] == 2 and "makes 4 steps, asked are 3" in document["error"]["message"]


def half(small: Path, step: int) -> bytes:
    from diffship.runtimes.engines.model import open_model
    from diffship.runtimes.handoff.router import Router, begin
    from diffship.sampling.generate import Request
    from diffship.sampling.loop import denoise
    from diffship.sampling.wire import pack

    with open_model(LARGE) as first, open_model(small) as last:
        router = Router([first, last], (1, 2))
        return pack(denoise(begin(router, Request("x", sampler="dpmpp-2m")), router, until=step)[0])


@pytest.mark.slow
def test_another_model_does_not_resume(command: Any, small: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(half(small, 1))
    document = valid(command("run", "arch:tiny-lcm", "--resume", tmp_path / "kept", "-o", tmp_path / "o"))
    assert document["exit_code"] == 1 and "does not fit arch:tiny-lcm" in document["error"]["message"]
    assert not (tmp_path / "o").exists()


REFUSED = {
    "no model": ([], "DIR is missing"),
    "large without a split": (["D", "x", "--large", "L"], "give one number of model calls per model, such as --split"),
    "models without a split": (["x", "--models", "A", "B", "--large", "L"], "exclude each other"),
    "split without another model": (["D", "x", "--split", "1,2"], "add --large SOURCE, or --models A B"),
    "split in words": (["D", "x", "--large", "L", "--split", "half"], "whole numbers such as 10,15"),
    "split of three": (["D", "x", "--large", "L", "--split", "1,2,3"], "has 3 entries for 2 models"),
    "split below zero": (["D", "x", "--large", "L", "--split", "3,-1"], "entries are 0 or more"),
    "split of nothing": (["D", "x", "--large", "L", "--split", "0,0"], "together 1 to 150 steps"),
    "other steps": (["D", "x", "--large", "L", "--split", "1,2", "--steps", "4"], "makes 3 steps, asked are 4"),
    "one engine too many": (["D", "x", "--engines", "torch,torch"], "names 2 for 1 models"),
    "no such engine": (["D", "x", "--engines", "onnxruntim"], "did you mean 'onnxruntime'"),
    "both kinds of engine": (["D", "x", "--engines", "torch", "--engine", "torch"], "give one of them"),
    "a model that is not there": (["D", "x", "--large", "./nowhere", "--split", "1,2"], "'./nowhere' does not exist"),
    "an incompatible pair": ([LARGE, "x", "--large", "arch:tiny-lcm", "--split", "1,2"], "cannot share a trajectory"),
    "a tiny VAE": ([LARGE, "x", "--large", LARGE + "+taesd", "--split", "1,2"], "--shared-latents"),
    "a size that one cannot draw": (
        ["SMALL", "x", "--large", LARGE, "--split", "1,2", "--size", "96"],
        "multiples of 64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(
    name: str, command: Any, small: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[name]
    document = valid(command("run", *(str(small) if word == "SMALL" else word for word in words)))
    assert document["exit_code"] == 2, document
    assert message in document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_the_pair_check_warns_of_is_in_the_document(command: Any, small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small, other)
    index = json.loads((other / "model_index.json").read_text(encoding="utf-8"))  # it names the scheduler's class
    changed = {**index, "scheduler": ["diffusers", "DDIMScheduler"]}
    (other / "model_index.json").write_text(json.dumps(changed), encoding="utf-8")
    document = valid(command("run", other, "x", "--large", LARGE, "--split", "1,1", "-o", tmp_path / "a.png"))
    assert document["exit_code"] == 0, document
    assert [warning for warning in document["warnings"] if "PNDMScheduler and DDIMScheduler" in warning]
    assert "warning: " in document["stderr"]


@pytest.mark.slow
def test_shared_latents_admits_a_tiny_vae(command: Any, tmp_path: Path) -> None:
    words = ["run", f"{LARGE}+taesd", "x", "--large", LARGE, "--split", "1,1", "--shared-latents"]
    document = valid(command(*words, "--sampler", "ddim", "-o", tmp_path / "a.png"))
    assert document["exit_code"] == 0, document


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_half_precision_on_a_cpu_is_told_once(command: Any, tiny_bundle: Path, tmp_path: Path, engine: str) -> None:
    """A CPU computes it in float32; what the manifest says counts, so that it says fp16 of a copy."""
    pytest.importorskip(engine)
    words = ["--engine", engine]
    half = shutil.copytree(tiny_bundle, tmp_path / "half")
    manifest = json.loads((half / "diffship.json").read_text(encoding="utf-8"))
    for part in manifest["parts"]:
        if part["name"] == "unet":
            part["precision"] = "fp16"
            del part["golden"]["blocks"]  # those of a part in fp32
    (half / "diffship.json").write_text(json.dumps(manifest), encoding="utf-8")
    document = command("run", half, "apple", "cat", "--steps", "1", "-o", tmp_path / "p", *words)
    assert document["exit_code"] == 0 and len(document["pictures"]) == 2
    assert document["stderr"].count("half is in fp16, which") == 1 == len(document["warnings"])
    assert f"{engine} computes in float32 on a CPU" in document["warnings"][0]
    assert command("run", tiny_bundle, "apple", "--steps", "1", "-o", tmp_path / "q", *words)["warnings"] == []


def test_half_precision_on_a_gpu_is_as_it_should_be() -> None:
    bundle = SimpleNamespace(path=Path("half"), manifest=SimpleNamespace(parts=[SimpleNamespace(format=FP16)]))
    models = [SimpleNamespace(bundle=bundle, engine=engine) for engine in ("onnxruntime", "tensorrt", "onnxruntime")]
    assert len(half_on_cpu(models, SimpleNamespace(device=None, option=[]))) == 1  # type: ignore[arg-type]
    for chosen in (
        SimpleNamespace(device="cuda", option=[]),
        SimpleNamespace(device=None, option=[("device", "cuda")]),
    ):
        assert half_on_cpu(models, chosen) == []  # type: ignore[arg-type]
