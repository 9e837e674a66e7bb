"""Case 19 and its kin: weights that are damaged, missing or out of range stop the export, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.cli.export import _warn_of_unused
from diffship.core.errors import ConfigError, DiffshipError, SourceError, UnsupportedError
from diffship.core.job import Job
from diffship.core.weights import MemoryWeights, Weights
from diffship.export import export
from diffship.exporters.onnx import Onnx
from diffship.models.pipeline import Pipeline

NAME = "text_model.encoder.layers.1.mlp.fc2.weight"


def changed(weights: Weights, name: str, value: Any) -> Weights:
    arrays = {known: np.array(weights.read(known)) for known in weights.names()}
    if value is None:
        del arrays[name]
    elif np.ndim(value):
        arrays[name] = value
    else:
        arrays[name].flat[5] = value
    return MemoryWeights(arrays)


def with_text(pipeline: Pipeline, name: str, value: Any) -> Pipeline:
    component = pipeline.components["text_encoder"]
    broken = replace(component, weights=changed(component.weights, name, value))
    return replace(pipeline, components={"text_encoder": broken})


def refused(pipeline: Pipeline, tmp_path: Path, graphs: Job, error: type[DiffshipError], **options: Any) -> str:
    with pytest.raises(error) as fault:
        export(pipeline, out=tmp_path / "bundle", job=graphs, **options)
    assert not list(tmp_path.iterdir()), "nothing may be left"
    assert len(str(fault.value).splitlines()) <= 2
    return str(fault.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_the_weights_names_part_and_tensor(tiny_sd: Pipeline, tmp_path: Path, graphs: Job, value: float) -> None:
    text = refused(with_text(tiny_sd, NAME, value), tmp_path, graphs, SourceError)
    assert "text_encoder" in text and NAME in text and "NaN or infinite" in text


def test_a_missing_tensor_is_found_before_any_work(
    tiny_sd: Pipeline, tmp_path: Path, graphs: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Onnx, "export", lambda *_: pytest.fail("work was started"))
    text = refused(with_text(tiny_sd, NAME, None), tmp_path, graphs, UnsupportedError)
    assert "text_encoder" in text and NAME in text


def test_a_misshapen_tensor_is_found_before_any_work(
    tiny_sd: Pipeline, tmp_path: Path, graphs: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Onnx, "export", lambda *_: pytest.fail("work was started"))
    wrong = with_text(tiny_sd, NAME, np.zeros((3, 5), np.float32))
    assert "(3, 5)" in refused(wrong, tmp_path, graphs, UnsupportedError)


def test_problems_of_all_parts_are_reported_together(tiny_sd: Pipeline) -> None:
    empty = {name: replace(component, weights=MemoryWeights({})) for name, component in tiny_sd.components.items()}
    found = Onnx().check(replace(tiny_sd, components=empty))
    assert {problem.part for problem in found} == set(tiny_sd.components)


@pytest.mark.slow
def test_values_that_fp16_cannot_hold_are_refused(tiny_sd: Pipeline, tmp_path: Path, graphs: Job) -> None:
    text = refused(with_text(tiny_sd, NAME, 70000.0), tmp_path, graphs, ConfigError, precision="fp16")
    assert NAME in text and "--precision fp32" in text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_become_fp32_graphs(tiny_sd: Pipeline, tmp_path: Path, graphs: Job, dtype: str) -> None:
    from diffship.core.weights import cast

    component = tiny_sd.components["text_encoder"]
    half = replace(tiny_sd, components={"text_encoder": replace(component, weights=cast(component.weights, dtype))})
    bundle = export(half, out=tmp_path / "bundle", job=graphs)
    assert bundle.part("text_encoder").proof["psnr_db"] > 100
    assert bundle.part("text_encoder").precision == "fp32"


def test_tensors_that_a_part_does_not_take_are_counted_and_told(
    tiny_sd: Pipeline, tmp_path: Path, graphs: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note of the training, or weights of another form: the graph knows nothing of them."""
    more = with_text(tiny_sd, "text_model.lora_scale", np.ones((1, 2), np.float32))
    bundle = export(more, out=tmp_path / "bundle", job=graphs, verify=False)
    assert bundle.part("text_encoder").extra["unused_tensors"] == {"count": 1, "first": ["text_model.lora_scale"]}
    _warn_of_unused(bundle.manifest.parts)
    said = "text_encoder does not take 1 tensors of its weight files: text_model.lora_scale"
    assert said in capsys.readouterr().err
    whole = export(with_text(tiny_sd, NAME, 0.5), out=tmp_path / "whole", job=graphs, verify=False)
    assert "unused_tensors" not in whole.part("text_encoder").extra
