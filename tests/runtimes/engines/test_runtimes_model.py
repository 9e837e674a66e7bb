from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError, ConfigError, MissingExtra, SourceError, UnsupportedError
from diffship.core.safetensors_file import read_header
from diffship.models.model import PipelineModel
from diffship.runtimes.engines import engine as engines
from diffship.runtimes.engines.model import BundleModel, open_model
from diffship.runtimes.proof.verify import verify
from diffship.sampling.generate import generate
from diffship.sampling.request import Request

REQUEST = Request(prompt="a red apple", steps=2, size=(64, 64), seed=1)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def torch_model() -> object:
    sources = pytest.importorskip("diffship.models.sources.opening")
    return PipelineModel(sources.open_source("arch:tiny-sd"))


@pytest.fixture(scope="module")
def ort_model(tiny_bundle: Path) -> Iterator[BundleModel]:
    """The bundle in ONNX Runtime on one thread, opened once for the tests that only draw with it."""
    with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
        assert isinstance(model, BundleModel)
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_leaves_the_floating_point_state_of_its_caller_alone(tiny_bundle: Path, engine: str) -> None:
    with open_model(tiny_bundle, engine) as model:
        generate(model, REQUEST)
        assert np.float64(5e-324) * np.ones(1) != 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_whole_pipeline_equals_torch_step_by_step(tiny_bundle: Path, torch_model: object, engine: str) -> None:
    request = Request(prompt="a red apple", steps=4, size=(64, 64), seed=1)
    latents: dict[str, list[np.ndarray]] = {"torch": [], engine: []}
    pictures = {}
    with open_model(tiny_bundle, engine, threads=1) as model:
        for name, opened in (("torch", torch_model), (engine, model)):
            keep = latents[name]
            pictures[name] = generate(opened, request, on_step=lambda batch, keep=keep: keep.append(batch[0].latents))
    for step, (right, ours) in enumerate(zip(latents["torch"], latents[engine], strict=True)):
        assert np.abs(np.asarray(right) - np.asarray(ours)).max() <= 1e-3, f"step {step}"
    assert len(latents["torch"]) >= 4
    assert psnr(pictures["torch"][0].pixels, pictures[engine][0].pixels) >= 40


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (192, 64), (192, 192)])
def test_sizes_equal_torch(ort_model: BundleModel, torch_model: object, size: tuple[int, int]) -> None:
    request = Request(prompt="x", steps=1, size=size, seed=3)
    ours = generate(ort_model, request)[0].pixels
    assert ours.shape == (size[1], size[0], 3)
    assert psnr(ours, generate(torch_model, request)[0].pixels) >= 40


def test_an_illegal_size_names_the_nearest_two(ort_model: BundleModel) -> None:
    with pytest.raises(ConfigError, match=r"width is 72; .*: the nearest are 64 and 128"):
        generate(ort_model, Request(prompt="x", steps=1, size=(72, 64)))


def test_same_seed_is_bit_equal_and_a_batch_equals_singles(ort_model: BundleModel) -> None:
    first, again = (generate(ort_model, REQUEST)[0].trajectory.latents for _ in range(2))
    batch = generate(ort_model, Request(prompt="a red apple", steps=2, size=(64, 64), seed=1, images=4))
    singles = [
        generate(ort_model, Request(prompt="a red apple", steps=2, size=(64, 64), seed=1 + i))[0] for i in range(4)
    ]
    np.testing.assert_array_equal(first, again)
    for together, alone in zip(batch, singles, strict=True):
        assert np.abs(together.trajectory.latents - alone.trajectory.latents).max() <= 1e-4


@pytest.mark.slow
def test_thread_count_changes_less_than_1e_5(tiny_bundle: Path, ort_model: BundleModel) -> None:
    with open_model(tiny_bundle, "onnxruntime", threads=2) as model:
        two = generate(model, REQUEST)[0].trajectory.latents
    assert np.abs(generate(ort_model, REQUEST)[0].trajectory.latents - two).max() <= 1e-5


def test_parts_load_when_used_once_and_again_after_release(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
        assert isinstance(model, BundleModel)
        assert model._runners == {} and {"unet", "vae_decoder", "text_encoder"} <= model.parts
        started = threading.Barrier(4)

        def use(_: int) -> object:
            started.wait(timeout=30)
            return model.use("vae_decoder")

        with ThreadPoolExecutor(4) as pool:
            runners = list(pool.map(use, range(4), timeout=60))
        assert len({id(runner) for runner in runners}) == 1
        model.release("vae_decoder")
        model.release("vae_decoder")
        model.release("no such part")
        assert model.use("vae_decoder") is not runners[0]
        with pytest.raises(BundleError, match="no part 'vae'"):
            model.use("vae")
    assert model._runners == {}


def test_facts_equal_those_of_the_source(ort_model: BundleModel, torch_model: object) -> None:
    for fact in ("family", "digest", "parts"):
        assert getattr(ort_model, fact) == getattr(torch_model, fact), fact
    prompts = ["a red apple", "", "ÿ 🍎"]
    for name, tokenizer in torch_model.tokenizers.items():  # type: ignore[attr-defined]
        np.testing.assert_array_equal(ort_model.tokenizers[name](prompts).ids, tokenizer(prompts).ids)


@pytest.mark.slow
def test_low_memory_gives_the_same_picture_and_frees_parts(tiny_bundle: Path, ort_model: BundleModel) -> None:
    with open_model(tiny_bundle, "onnxruntime", threads=1, arena=False) as model:
        low = generate(model, Request(prompt="a red apple", steps=2, size=(64, 64), seed=1, memory="low"))[0].pixels
        assert model._runners == {}
    assert psnr(low, generate(ort_model, REQUEST)[0].pixels) >= 40


def test_what_is_neither_bundle_nor_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither diffship\.json nor model_index\.json"), open_model(tmp_path):
        pass
    with (
        pytest.raises(UnsupportedError, match="Run: diffship export arch:tiny-sd --to onnx"),
        open_model("arch:tiny-sd", "onnxruntime"),
    ):
        pass


@pytest.mark.slow
def test_torch_opens_sources_but_no_bundles(tiny_bundle: Path) -> None:
    with open_model("arch:tiny-sd", "torch") as model:
        assert "unet" in model.parts
    with (
        pytest.raises(UnsupportedError, match="torch does not read onnx bundles; use --engine onnxruntime or openvino"),
        open_model(tiny_bundle, "torch"),
    ):
        pass


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    there = engines.installed
    engine_files = (f"runtimes.engines.{name}" for name in ("onnxruntime", "openvino", "torch"))
    for file in (*engine_files, "targets.tensorrt.libraries"):
        monkeypatch.setattr(f"diffship.{file}.installed", lambda name: name not in modules and there(name))


def test_default_engine_and_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BundleModel(bundle).engine == "onnxruntime"
    without(monkeypatch, "onnxruntime")
    assert BundleModel(bundle).engine == "openvino"
    without(monkeypatch, "onnxruntime", "openvino")
    with pytest.raises(MissingExtra, match=r"pip install 'diffship\[onnxruntime\]'"):
        BundleModel(bundle)
    without(monkeypatch, "diffusers")
    with pytest.raises(MissingExtra, match=r"pip install 'diffship\[torch\]'"), open_model("arch:tiny-sd"):
        pass


def test_probe_tells_version_devices_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = {probe.engine: probe for probe in engines.probe_all()}
    assert list(probes) == ["onnxruntime", "openvino", "tensorrt", "mil", "torch"]
    for name, probe in probes.items():
        on_cpu = probe.available and probe.version and "cpu" in probe.devices
        assert (on_cpu or name == "tensorrt") and not probe.conflict
        assert set(probe.to_json()) >= {"engine", "available", "version", "devices", "reason", "install", "conflict"}
    without(monkeypatch, "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt", "torch")
    for probe in engines.probe_all():
        if probe.engine == "mil":  # it needs numpy alone
            assert probe.available
            continue
        assert not probe.available and "not installed" in probe.reason and f"diffship[{probe.engine}]" in probe.install


def test_probe_reports_two_onnxruntimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffship.runtimes.engines.onnxruntime.package_version", lambda *names: "1.0")
    probe = engines.engine_class("onnxruntime").probe()
    assert "both installed" in probe.conflict


EDGE = """
import sys

class Blocked:
    names = {"torch", "diffusers", "transformers", "onnx", "accelerate", "openvino"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from diffship import Request, generate, open_model, verify
report = verify(sys.argv[1], threads=1)
assert report.passed, report.text()
with open_model(sys.argv[1], threads=1) as model:
    picture = generate(model, Request(prompt="a red apple", steps=2, size=(64, 64), seed=1))[0]
assert not Blocked.names & set(sys.modules), Blocked.names & set(sys.modules)
import hashlib
print(report.engine, picture.pixels.shape, hashlib.sha256(picture.pixels.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_edge_process_without_torch_draws_the_same_picture(tiny_bundle: Path, ort_model: BundleModel) -> None:
    import hashlib

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", textwrap.dedent(EDGE), str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    pixels = generate(ort_model, REQUEST)[0].pixels
    assert done.stdout.split() == ["onnxruntime", "(64,", "64,", "3)", hashlib.sha256(pixels.tobytes()).hexdigest()]


def test_a_bundle_whose_files_are_hard_links_is_drawn_with_where_it_was_opened_so(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Installers such as uv share the data of a package with their cache."""
    own = shutil.copytree(tiny_bundle, tmp_path / "own")  # others share that bundle, and refuse hard links
    linked = shutil.copytree(own, tmp_path / "linked", copy_function=os.link)
    with pytest.raises(BundleError, match="hard link"):
        Bundle.open(linked)
    with BundleModel(Bundle.open(linked, hard_links=True), "onnxruntime", threads=1) as model:
        assert set(model.tokenizers) == {"tokenizer"}


@pytest.mark.slow
def test_what_a_prompt_shows_is_one_short_line(ort_model: BundleModel, torch_model: Any, tiny_bundle: Path) -> None:
    picture = generate(ort_model, REQUEST)[0]
    bundle, pipeline = ort_model.bundle, torch_model.pipeline
    part = bundle.part("unet")
    trajectory = picture.trajectory
    assert trajectory is not None and part.golden is not None
    shown = [picture, trajectory, trajectory.positive, trajectory.noise, trajectory.sampler, trajectory.origin]
    shown += [replace(REQUEST, latents=np.zeros((1, 4, 64, 64)), prompt="word " * 300), bundle, bundle.manifest, part]
    shown += [part.golden, bundle.manifest.trajectory, ort_model, torch_model, pipeline]
    shown += [pipeline.components["unet"], ort_model.tokenizers["tokenizer"], ort_model.use("unet"), ort_model.family]
    shown += [verify(tiny_bundle, parts=("vae_decoder",)), read_header(bundle.file(part.golden.file))]
    for one in shown:
        assert len(repr(one)) <= 400 and "\n" not in repr(one), type(one)
    height, width = picture.pixels.shape[:2]
    assert repr(picture).startswith(f"Picture(pixels=uint8[{height}, {width}, 3], settings={{")
    with Image.open(io.BytesIO(picture._repr_png_())) as shown_by_a_notebook:
        assert np.array_equal(np.asarray(shown_by_a_notebook), picture.pixels)
