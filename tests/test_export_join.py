"""export joins exporter, golden vectors and engine: what it writes, what it records, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from diffship.core.bundle import Bundle
from diffship.core.errors import Cancelled, ConfigError, ParityError, UnsupportedError
from diffship.core.job import Job
from diffship.export import export
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.runtimes.proof.verify import verify

Make = Callable[..., Bundle]


class Made(NamedTuple):
    pipeline: Pipeline
    bundle: Bundle
    graphs: Job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Text encoder and VAE decoder of `arch:tiny-sd`: everything but the slow U-Net."""
    graphs = Job(tmp_path_factory.mktemp("graphs"))
    pipeline = open_source("arch:tiny-sd")
    out = tmp_path_factory.mktemp("out") / "bundle"
    bundle = export(pipeline, out=out, parts=["vae_decoder", "text_encoder"], job=graphs)
    return Made(pipeline, bundle, graphs)


@pytest.fixture
def text_only(made: Made) -> Pipeline:
    return replace(made.pipeline, components={"text_encoder": made.pipeline.components["text_encoder"]})


@pytest.mark.slow
def test_the_bundle_opens_and_proves_itself_again(made: Made) -> None:
    opened = Bundle.open(made.bundle.path)
    assert opened == made.bundle
    assert verify(opened, "onnxruntime").passed


def test_files_are_where_optimum_looks(made: Made) -> None:
    folder = made.bundle.path
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    tokenizer = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert names == {
        "diffship.json",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"tokenizer/{name}" for name in tokenizer),
        *(
            f"{p}/{n}"
            for p in ("text_encoder", "vae_decoder")
            for n in ("model.onnx", "model.onnx_data", "config.json")
        ),
        *(f"golden/{part}{kind}.safetensors" for part in ("text_encoder", "vae_decoder") for kind in ("", ".blocks")),
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    config = json.loads((folder / "vae_decoder" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    assert config["scaling_factor"] > 0


def test_both_tokenizer_forms_have_equal_ids(made: Made) -> None:
    from tokenizers import Tokenizer

    folder = made.bundle.path / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == vocabulary


def test_the_manifest_says_what_was_done(made: Made) -> None:
    manifest = made.bundle.manifest
    assert manifest.recipe["target"] == [{"to": "onnx", "precision": "fp32", "opset": 23}]
    assert manifest.source["id"] == "arch:tiny-sd"
    assert {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "python"} <= set(manifest.tools)
    assert [part.name for part in manifest.parts] == ["vae_decoder", "text_encoder"]
    assert manifest.sampler == made.pipeline.scheduler
    card = (made.bundle.path / "README.md").read_text()
    assert card.startswith("---\n") and 'library_name: "diffship"' in card
    assert "| text_encoder | fp32 | proved |" in card


def test_the_proof_has_its_figures(made: Made) -> None:
    for part in made.bundle.manifest.parts:
        assert part.proof["engine"].startswith("onnxruntime ")
        assert 0 < part.proof["max_abs"] <= 1e-4
        assert part.golden is not None and part.golden.sizes["batch_size"] == 2


def test_without_proof_it_says_unproven(text_only: Pipeline, made: Made, tmp_path: Path) -> None:
    bundle = export(text_only, out=tmp_path / "b", verify=False, job=made.graphs)
    part = bundle.part("text_encoder")
    assert part.proof["status"] == "unproven" and part.golden is None
    assert not (tmp_path / "b" / "golden").exists()
    assert not verify(bundle, "onnxruntime").passed


def test_a_missed_tolerance_is_an_error_with_figures(
    text_only: Pipeline, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.exporters import golden

    true = golden.reference

    def shifted(*arguments: Any) -> dict[str, Any]:
        return {name: np.add(array, np.float32(0.01)) for name, array in true(*arguments).items()}

    monkeypatch.setattr(golden, "reference", shifted)
    with pytest.raises(ParityError, match=r"text_encoder \(fp32\) does not compute the same.*max 0\.01.*PSNR") as fault:
        export(text_only, out=tmp_path / "b", job=made.graphs)
    assert fault.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_an_engine_that_fails_is_a_parity_error(
    text_only: Pipeline, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.exporters.onnx import exporter

    def spoil(model: Any, weights: Any, folder: Path, *rest: Any) -> str:
        (folder / "model.onnx_data").write_bytes(b"\0" * 64)
        return "0" * 64

    monkeypatch.setattr(exporter, "pour", spoil)
    with pytest.raises(ParityError, match=r"text_encoder \(fp32\) could not be proved: .* ends before its tensors do"):
        export(text_only, out=tmp_path / "b", job=made.graphs)
    assert not list(tmp_path.iterdir())


def test_disk_is_checked_before_work(text_only: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UnsupportedError, match=r"the bundle needs .* of disk"):
        export(text_only, out=tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_memory_is_checked_before_work(text_only: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffship.core import job

    monkeypatch.setattr(job, "available_memory", lambda: 100 << 20)
    with pytest.raises(UnsupportedError, match=r"the export needs .* of memory"):
        export(text_only, out=tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "onyx"}, "onyx"),
        ({"precison": "fp16"}, "did you mean 'precision'"),
        ({"precision": "int3"}, "int3"),
        ({"opset": 12}, "opset"),
        ({"parts": ["unett"]}, "did you mean 'unet'"),
        ({"parts": []}, "no part is chosen"),
    ],
)
def test_bad_requests_are_refused_in_one_line(made: Made, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as fault:
        export(made.pipeline, out=tmp_path / "b", **options)
    assert "\n" not in str(fault.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_kept(text_only: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"exists already|never replaced"):
            export(text_only, out=tmp_path / "b", overwrite=overwrite)
    assert (tmp_path / "b" / "mine.txt").read_text() == "mine"


def test_overwrite_replaces_a_bundle(text_only: Pipeline, made: Made, tmp_path: Path) -> None:
    export(text_only, out=tmp_path / "b", verify=False, job=made.graphs)
    export(text_only, out=tmp_path / "b", verify=True, overwrite=True, job=made.graphs)
    assert Bundle.open(tmp_path / "b").part("text_encoder").proof["status"] == "proved"


def test_progress_is_told_and_cancel_is_heard(text_only: Pipeline, made: Made, tmp_path: Path) -> None:
    labels: list[str] = []
    asked = False

    def progress(label: str, done: int, total: int) -> None:
        nonlocal asked
        labels.append(label)
        asked = label.startswith("weights") and done > total // 2

    with pytest.raises(Cancelled):
        job = Job(made.graphs.folder, progress=progress, cancel=lambda: asked)
        export(text_only, out=tmp_path / "b", job=job)
    assert labels[0] == "graph text_encoder" and labels[-1] == "weights text_encoder"
    assert not list(tmp_path.iterdir())
