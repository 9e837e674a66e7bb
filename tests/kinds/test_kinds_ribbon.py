"""A kind of model that the package does not have comes from one file and one line, and everything runs it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ribbon

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError, ConfigError, HandoffError
from diffship.core.registry import KINDS
from diffship.core.seeded import SeededWeights
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.wire import pack, unpack

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
ASKED: dict[str, Any] = {"prompt": "a red ribbon", "negative": "grey", "seed": 3, "steps": 4}
CONFIGS = {
    "words": ("WordTable", {"vocab_size": 1000, "width": 12}, ribbon.Words),
    "transformer": ("RibbonTransformer", {"width": 16, "text_width": 12}, ribbon.Transformer),
    "painter": ("RibbonPainter", {}, ribbon.Painter),
}


@pytest.fixture(scope="module", autouse=True)
def the_line() -> Iterator[None]:
    KINDS["ribbon"] = "ribbon:Ribbon"
    yield
    del KINDS["ribbon"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a ribbon model with random weights."""
    import torch

    from diffship.models.assemble import assemble
    from diffship.models.parts.component import weight_metas
    from diffship.models.pipeline import Material, Module
    from diffship.models.saving import save
    from diffship.models.sources.tokenizer_files import clip_files

    modules = {}
    for seed, (folder, (class_name, config, network)) in enumerate(CONFIGS.items()):
        with torch.device("meta"):
            metas = weight_metas(network(config))
        modules[folder] = Module(class_name, config, SeededWeights(metas, seed))
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    material = Material({"id": "ribbon", "kind": "arch"}, modules, {"tokenizer": clip_files(1000)}, scheduler)
    return save(assemble(material), tmp_path_factory.mktemp("ribbon") / "model")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exported, which proves every part and a trajectory."""
    from diffship.export import export

    return export(source, "onnx", tmp_path_factory.mktemp("ribbon") / "onnx", trajectory=3)


def opened(bundle: Bundle) -> Any:
    from diffship.runtimes.engines.model import BundleModel

    return BundleModel(bundle)


def test_the_page_shows_the_file_that_runs_here() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == 2
    squeezed = "".join(
        Path(ribbon.__file__).read_text(encoding="utf-8").split()
    )  # a formatter indents the page's otherwise
    assert all("".join(block.split()) in squeezed for block in blocks)


def test_a_saved_folder_is_opened_as_its_kind(source: Path) -> None:
    from diffship.models.sources.opening import open_source

    pipeline = open_source(str(source))
    assert pipeline.family.name == "ribbon" and list(pipeline.components) == list(CONFIGS)
    assert pipeline.denoiser.name == "transformer" and list(pipeline.texts) == ["words"]
    assert {file.name for file in (source / "words").iterdir()} == {"config.json", "model.safetensors"}


def test_a_folder_that_lacks_a_part_says_which(source: Path, tmp_path: Path) -> None:
    import shutil

    from diffship.core.errors import SourceError
    from diffship.models.sources.opening import open_source

    shutil.copytree(source, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "painter")
    with pytest.raises(SourceError, match="has no painter"):
        open_source(str(tmp_path / "part"))


def test_every_part_and_the_trajectory_are_proved(bundle: Bundle) -> None:
    assert {part.name: part.proof["status"] for part in bundle.manifest.parts} == dict.fromkeys(CONFIGS, "proved")
    assert bundle.manifest.trajectory is not None and bundle.manifest.family.kind is not None


def test_verify_draws_the_golden_trajectory_again(bundle: Bundle) -> None:
    from diffship.runtimes.proof.verify import verify

    report = verify(bundle)
    assert report.passed, report.text()
    assert report.trajectory is not None and report.trajectory.status == "passed"


def test_verify_hears_a_part_that_computes_something_else(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    from diffship.runtimes.proof.verify import check_part, make_engine

    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    data = next((copy / "transformer").glob("*_data"))
    bent = np.frombuffer(data.read_bytes(), "<f4").copy()
    bent[: len(bent) // 2] *= 1.05
    data.write_bytes(bent.tobytes())
    assert check_part(Bundle(copy, bundle.manifest), bundle.part("transformer"), make_engine("onnxruntime")).status == (
        "failed"
    )


def test_torch_and_the_engine_draw_the_same_ribbon(source: Path, bundle: Bundle) -> None:
    from diffship.models.model import PipelineModel
    from diffship.models.sources.opening import open_source

    pictures = []
    for model in (PipelineModel(open_source(str(source))), opened(bundle)):
        with model:
            (made,) = generate(model, Request(**ASKED, size=(192, 64)))
            (low,) = generate(model, Request(**ASKED, size=(192, 64), memory="low"))
            assert np.array_equal(made.pixels, low.pixels)
        pictures.append(made.pixels.astype(int))
    assert pictures[0].shape == (64, 192, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_what_only_the_kind_knows_is_refused_in_its_words(bundle: Bundle) -> None:
    with opened(bundle) as model, pytest.raises(ConfigError, match="a ribbon is 64 pixels high"):
        generate(model, Request(**ASKED, size=(128, 128)))


def test_a_split_over_the_wire_is_the_whole(bundle: Bundle) -> None:
    from diffship.runtimes.handoff.arrival import check_arrival
    from diffship.runtimes.handoff.router import Router, begin, draw

    with opened(bundle) as first, opened(bundle) as second:
        (whole,) = generate(first, Request(**ASKED))
        router = Router([first, second], (2, 2))
        (split,) = draw(router, begin(router, Request(**ASKED)))
        assert np.array_equal(whole.pixels, split.pixels)
        half = denoise(start(first, Request(**ASKED)), denoiser_of(first), until=2)[0]
        arrived = unpack(pack(half))
        assert arrived.latents.shape == (4, 16) and list(arrived.positive) == ["encoder_hidden_states"]
        assert check_arrival(arrived, second) == ()
        (end,) = denoise([arrived], denoiser_of(second))
        assert np.array_equal(end.latents, whole.trajectory.latents)


def test_another_kind_does_not_take_its_trajectory(bundle: Bundle) -> None:
    from diffship.runtimes.handoff.arrival import check_arrival
    from diffship.runtimes.handoff.pair import ModelFacts, check_pair

    with opened(bundle) as model:
        half = denoise(start(model, Request(**ASKED)), denoiser_of(model), until=2)[0]
        other = ModelFacts("other", replace(model.family, name="sd"), dict(model.scheduler))
        with pytest.raises(ConfigError, match=r"the denoiser is transformer \(ribbon\) and unet \(sd\)"):
            check_pair([model, other])
    with pytest.raises(HandoffError, match="does not fit this model"):
        check_arrival(unpack(pack(half)), other)


def test_the_server_draws_what_generate_draws(bundle: Bundle) -> None:
    import io

    from PIL import Image

    from diffship.runtimes.serve.forms import GenerateForm
    from diffship.runtimes.serve.jobs import Generation
    from diffship.runtimes.serve.options import ServeOptions
    from diffship.runtimes.serve.order import generate_order
    from diffship.runtimes.serve.worker import Served, Worker

    with opened(bundle) as model:
        (alone,) = generate(model, Request(**ASKED))
        worker = Worker(Served("ribbon", model), ServeOptions())
        worker.load()
        form = GenerateForm(prompt=ASKED["prompt"], response="json", negative_prompt=ASKED["negative"], seed=3, steps=4)
        generation = Generation("ribbon", generate_order(form, model), time.monotonic() + 60)
        worker.submit(generation)
        while worker.turn():
            pass
        ((png, settings),) = generation.result(0).pictures
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), alone.pixels) and settings["seed"] == 3


def test_a_bundle_of_a_kind_that_is_not_known_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KINDS, "ribbon")
    with pytest.raises((BundleError, ConfigError), match="kind of model 'ribbon'"):
        opened(bundle)
