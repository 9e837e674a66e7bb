"""Modules of other families through the real exporter: T5, SD3's transformer and rotary tables, beside torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_parts import foreign

from diffship.core.job import Job
from diffship.core.manifest import Part
from diffship.exporters.onnx import Onnx
from diffship.models.parts.component import Component

# unlike every size that is traced; the second has odd numbers of patches and another crop of the position table
SIZES = (
    {"batch_size": 2, "height": 4, "width": 12, "sequence_length": 9},
    {"batch_size": 1, "height": 14, "width": 10, "sequence_length": 24},
)
SLOW = pytest.mark.slow
KINDS = [
    ("rotary", "fp32", 23),
    *(pytest.param(name, "fp32", 23, marks=SLOW) for name in ("t5", "sd3")),
    *(pytest.param(name, "fp16", 18, marks=SLOW) for name in ("rotary", "t5", "sd3")),
]


def run(part: Part, folder: Path, feeds: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / part.files[0]))
    given = {spec.name: feeds[spec.name].astype(spec.dtype) for spec in part.inputs}
    return np.asarray(session.run(None, given)[0]).astype(np.float32)


def graph_of(part: Part, folder: Path) -> onnx.GraphProto:
    return onnx.load(str(folder / part.files[0]), load_external_data=False).graph


@pytest.mark.parametrize(("name", "precision", "opset"), KINDS)
def test_it_computes_what_the_library_computes(name: str, precision: str, opset: int, tmp_path: Path) -> None:
    component = foreign(name).component
    part = Onnx(precision=precision, opset=opset).export(component, tmp_path, Job())
    for sizes in SIZES:
        feeds = component.example(4, sizes)
        expected = np.asarray(next(iter(component.load().run(feeds).values())))
        found = run(part, tmp_path, feeds)
        assert found.shape == expected.shape
        # 2**-11 is half a unit in the last place of float16; a few dozen roundings add up
        limit = 2e-6 if precision == "fp32" else 10 * 2.0**-11
        assert np.abs(found - expected).max() < limit * np.abs(expected).max(), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "t5", "sd3"])
def test_it_has_a_bfloat16_graph(name: str, tmp_path: Path) -> None:
    part = Onnx(precision="bf16").export(foreign(name).component, tmp_path, Job())
    assert {spec.dtype for spec in part.outputs} == {"float32"}
    onnx.checker.check_model(str(tmp_path / part.files[0]), full_check=True)


@pytest.mark.slow
def test_tied_weights_lie_in_the_file_once_and_computed_buffers_in_the_graph(tmp_path: Path) -> None:
    parts: dict[str, tuple[Component, Part]] = {}
    for name in ("t5", "rotary"):
        component = foreign(name).component
        parts[name] = component, Onnx().export(component, tmp_path, Job())
    component, part = parts["t5"]
    tables = [t for t in graph_of(part, tmp_path).initializer if list(t.dims) == [64, 16]]
    assert len(tables) == 1, "one initialiser of the shape of the vocabulary"
    assert part.source_digest == component.digest
    component, part = parts["rotary"]
    names = {tensor.name for tensor in graph_of(part, tmp_path).initializer}
    assert not [name for name in names if "inv_freq" in name]
    assert "project.weight.transposed" in names
