"""A stage cut inside a transformer exports: its tokens are a product of the picture's axes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from diffship.core.bundle import Bundle
from diffship.core.errors import ParityError, RunnerError
from diffship.core.job import Job
from diffship.core.weights import MemoryWeights
from diffship.export import export
from diffship.exporters.onnx import Onnx
from diffship.models.pipeline import Pipeline
from diffship.models.walks.stages import Stage, cut
from diffship.runtimes.engines.shell import open_runner

ATTENTION = "down_blocks.1.attentions.0"
SIZES = {"batch_size": 2, "height": 16, "width": 24, "sequence_length": 9}


@pytest.fixture(scope="module")
def stages(tiny_sd: Pipeline) -> list[Stage]:
    layers = ("proj_in", "transformer_blocks.0", "proj_out")
    return cut(tiny_sd.components["unet"], [f"{ATTENTION}.{layer}" for layer in layers])


@pytest.mark.slow
@pytest.mark.parametrize("place", [1, 2])
def test_a_stage_inside_a_transformer_computes_what_torch_computes(
    place: int, stages: list[Stage], tmp_path: Path
) -> None:
    stage = stages[place]
    assert ("batch_size", "height * width / 4", 24) in [spec.shape for spec in stage.inputs]
    part = Onnx(opset=23).export(stage, tmp_path, Job())
    session = onnxruntime.InferenceSession(str(tmp_path / part.files[0]))
    feeds = stage.example(4, SIZES)
    expected = stage.load().run(feeds)
    found = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    for spec in stage.outputs:
        assert found[spec.name].shape == spec.resolve(SIZES)
        assert np.abs(found[spec.name] - expected[spec.name]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stage_that_takes_tokens_is_proved_and_checks_their_number(
    precision: str, tiny_sd: Pipeline, stages: list[Stage], tmp_path: Path
) -> None:
    stage = stages[1]  # the transformer block: tokens come in and go out
    alone = replace(tiny_sd, components={stage.name: stage})
    bundle = Bundle.open(export(alone, out=tmp_path / "b", precision=precision).path)
    part = bundle.part(stage.name)
    assert part.proof["status"] == "proved"
    tokens = next(spec for spec in part.inputs if spec.name == f"{ATTENTION}.proj_in.out")
    assert tokens.shape == ("batch_size", "height * width / 4", 24)
    graph = onnx.load(str(bundle.file(part.files[0])), load_external_data=False).graph
    names = {dim.dim_param for port in (*graph.input, *graph.output) for dim in port.type.tensor_type.shape.dim}
    assert {"batch_size", "height_times_width_over_4", "sequence_length"} == names - {""}
    assert all(name.isidentifier() for name in names - {""})
    feeds = stage.example(4, SIZES)
    with open_runner(bundle, part) as runner:
        (out,) = runner.run(feeds).values()
        assert out.shape == stage.outputs[0].resolve(SIZES)
        with pytest.raises(RunnerError, match=r"got shape \(2, 96, 23\)"):
            runner.run({**feeds, tokens.name: feeds[tokens.name][..., :23]})


@pytest.mark.slow
def test_a_stage_that_computes_something_else_is_refused(
    tiny_sd: Pipeline, stages: list[Stage], tmp_path: Path
) -> None:
    right = stages[1]
    alone = replace(tiny_sd, components={right.name: right})
    values = {name: np.array(right.weights.read(name)) for name in right.weights.names()}
    values[f"{ATTENTION}.transformer_blocks.0.ff.net.2.weight"] *= np.float32(1.01)
    odd = replace(right, weights=MemoryWeights(values))
    with pytest.raises(ParityError, match=right.name):
        export(replace(tiny_sd, components={right.name: odd}), out=tmp_path / "b", against=alone)
