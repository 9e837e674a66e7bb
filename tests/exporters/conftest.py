"""One graph per tiny architecture for the whole run; weights are poured again where a test wants other ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from diffship.core.bundle import Bundle
from diffship.core.job import Job
from diffship.export import export
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source

Export = Callable[..., Bundle]


@pytest.fixture(scope="session")
def graphs(graphs_folder: Path) -> Job:
    """A Job that keeps graphs."""
    return Job(graphs_folder)


@pytest.fixture(scope="session")
def tiny_sd() -> Pipeline:
    return open_source("arch:tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd_bundle(tiny_bundle: Path) -> Bundle:
    """All parts of `arch:tiny-sd`, fp32, proved."""
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="session")
def tiny_sd_fp16(tiny_sd: Pipeline, graphs: Job, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Text encoder and VAE decoder of `arch:tiny-sd` in fp16, proved."""
    parts = ["text_encoder", "vae_decoder"]
    return export(tiny_sd, out=tmp_path_factory.mktemp("onnx") / "fp16", parts=parts, precision="fp16", job=graphs)


@pytest.fixture
def only() -> Callable[[Pipeline, str], Pipeline]:
    """A pipeline of one part."""

    def choose(pipeline: Pipeline, part: str) -> Pipeline:
        return replace(pipeline, components={part: pipeline.components[part]})

    return choose


def folder_names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
