"""Targets whose engine is elsewhere, targets built from graphs, and sources that no bundle could hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from diffship.core import registry
from diffship.core.bundle import Bundle
from diffship.core.errors import MissingExtra, SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.core.job import Job
from diffship.core.manifest import Part
from diffship.core.problem import Problem
from diffship.core.safetensors_file import read_header
from diffship.export import export
from diffship.exporters.onnx import Onnx
from diffship.exporters.protocol import BuiltFromGraph, Exporter
from diffship.exporters.tensorrt import TensorRt
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.runtimes.engines.onnxruntime import OnnxRuntimeRunner


@dataclass(frozen=True)
class Elsewhere(Onnx):
    """A target that no engine of this version reads, as Core ML's on Linux."""

    name: ClassVar[str] = "elsewhere"
    proved_here: ClassVar[bool] = False


@dataclass(frozen=True)
class Built:
    """A target that copies the graph it is built from, and notes where that lay."""

    name: ClassVar[str] = "built"
    extra: ClassVar[str] = "onnx"
    trajectory_steps: ClassVar[int] = 0
    seen: ClassVar[list[list[str]]] = []

    def check(self, pipeline: Pipeline) -> list[Problem]:
        return []

    def golden_sizes(self, component: Component, family: Family, batch: int) -> dict[str, int]:
        return Onnx().golden_sizes(component, family, batch)

    def disk_bytes(self, component: Component) -> int:
        return Onnx().disk_bytes(component)

    def memory_bytes(self, component: Component) -> int:
        return 0

    def finish(self, pipeline: Pipeline, out: Path) -> None:
        pass

    def through(self, component: Component) -> Exporter:
        return Onnx()

    def build(self, component: Component, pipeline: Pipeline, graph: Part, folder: Path, out: Path, job: Job) -> Part:
        assert (folder / graph.files[0]).is_file()
        self.seen.append(sorted(os.path.relpath(path, out.parent) for path in out.parent.iterdir()))
        (out / "text_encoder").mkdir()
        (out / "text_encoder" / "engine.plan").write_bytes(b"plan")
        return replace(graph, files=("text_encoder/engine.plan",))


@pytest.fixture
def text_only(graphs_folder: Path) -> Pipeline:
    pipeline = open_source("arch:tiny-sd")
    return replace(pipeline, components={"text_encoder": pipeline.components["text_encoder"]})


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    return lambda cls: monkeypatch.setitem(registry.EXPORTERS, cls.name, f"{__name__}:{cls.__name__}")  # type: ignore[attr-defined]


def test_exporters_are_of_one_kind_or_the_other() -> None:
    ours: list[Exporter | BuiltFromGraph] = [Onnx(), TensorRt(), Elsewhere(), Built()]
    assert [isinstance(exporter, BuiltFromGraph) for exporter in ours] == [False, True, False, True]


def test_a_part_whose_engine_is_elsewhere_is_unproven_and_has_golden_vectors(
    text_only: Pipeline, add: Callable[[type], None], tmp_path: Path, graphs_folder: Path
) -> None:
    add(Elsewhere)
    export(text_only, "elsewhere", tmp_path / "b", job=Job(graphs_folder))
    part = Bundle.open(tmp_path / "b").part("text_encoder")
    assert part.proof["status"] == "unproven" and "no engine of this machine" in part.proof["reason"]
    assert part.golden is not None
    names = read_header(tmp_path / "b" / part.golden.file).entries
    assert {"0.in.input_ids", "0.out.last_hidden_state"} <= set(names)


def test_a_missing_engine_of_a_target_that_is_proved_here_is_said_before_work(
    text_only: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = replace(OnnxRuntimeRunner.probe(), available=False)
    for name in ("onnxruntime", "openvino"):
        cls = registry.load(registry.RUNNERS, name)
        monkeypatch.setattr(cls, "probe", classmethod(lambda _: probe))
    monkeypatch.setattr(Onnx, "export", lambda *_: pytest.fail("work began"))
    with pytest.raises((MissingExtra, UnsupportedError)):
        export(text_only, out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_graph_that_a_target_is_built_from_lies_in_the_draft_and_goes(
    text_only: Pipeline, add: Callable[[type], None], tmp_path: Path, graphs_folder: Path
) -> None:
    add(Built)
    Built.seen.clear()
    made = export(text_only, "built", tmp_path / "b", job=Job(graphs_folder))
    # beside the place there is the draft alone, which the next export sweeps up if this one is killed
    ((draft,),) = Built.seen
    assert draft.startswith(".b.partial-")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    part = made.part("text_encoder")
    assert part.proof["status"] == "unproven" and part.proof["graph"]["status"] == "proved"
    assert set(made.manifest.files) == {"README.md", "golden/text_encoder.safetensors", "text_encoder/engine.plan"}


@pytest.mark.parametrize("what", ["source", "licence", "scheduler"])
def test_what_no_manifest_can_hold_is_refused_before_work(
    what: str, text_only: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Onnx, "export", lambda *_: pytest.fail("work began"))
    odd = replace(text_only, **{what: {**getattr(text_only, what), "odd": float("nan")}})
    with pytest.raises(SourceError, match=r"no bundle could be opened with what it says: .*JSON"):
        export(odd, out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
