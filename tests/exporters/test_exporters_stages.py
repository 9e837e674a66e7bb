"""A stage cut inside a transformer exports: its tokens are a product of the picture's axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from diffship.core.job import Job
from diffship.exporters.onnx import Onnx
from diffship.models.pipeline import Pipeline
from diffship.models.walks.stages import Stage, cut

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
