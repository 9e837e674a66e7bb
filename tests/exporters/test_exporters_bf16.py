"""bfloat16: which types the graph has, which weights, and what its float32 twin computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from diffship.core.bundle import Bundle
from diffship.core.compare import Tolerance, compare
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.manifest import Part
from diffship.core.precision import BF16
from diffship.exporters.formats import constants
from diffship.exporters.golden import simulated
from diffship.exporters.onnx import Onnx
from diffship.exporters.tensorrt import TensorRt
from diffship.exporters.tolerances import measured
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.runtimes.proof.onnx_split import split

PARTS = [
    "vae_decoder",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("text_encoder", "unet", "vae_encoder")),
]
NARROW, WIDE = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
Made = Callable[[str], tuple[Path, Part, Path]]


@pytest.fixture(scope="module")
def made(tiny_sd: Pipeline, graphs: Job, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A part of `arch:tiny-sd` in bfloat16: its file, its entry, and the file of its twin in float32."""
    folder, exporter = tmp_path_factory.mktemp("bf16"), Onnx(precision="bf16")

    @cache
    def make(name: str) -> tuple[Path, Part, Path]:
        part = exporter.export(tiny_sd.components[name], folder, graphs)
        (twin,) = split(folder / part.files[0], 1 << 30, tmp_path_factory.mktemp("twin"), widen=True)
        return folder / part.files[0], part, twin.path

    return make


def rounded(component: Component) -> torch.nn.Module:
    """torch's own rounding of the weights, computed with in float32."""
    return component.module("cpu", torch.bfloat16).float()


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_weights_are_bfloat16_and_boundaries_float32(made: Made, tiny_sd: Pipeline, name: str) -> None:
    path, part, _ = made(name)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == NARROW}
    kinds = {port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)}
    told, given = (
        [(s.name, s.dtype, s.shape) for s in specs] for specs in (part.inputs, tiny_sd.components[name].inputs)
    )
    assert kinds <= {WIDE, onnx.TensorProto.INT64} and told == given
    state = rounded(tiny_sd.components[name]).state_dict()
    found = {key: state.get(f"inner.{key}", state.get(key)) for key in stored}
    known = {key: tensor for key, tensor in found.items() if tensor is not None and tensor.dim() == 1}
    assert len(known) > 5
    for key, tensor in known.items():
        assert np.array_equal(numpy_helper.to_array(stored[key]).astype(np.float32), tensor.numpy()), key


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_the_twin_computes_what_torch_does_with_rounded_weights(made: Made, tiny_sd: Pipeline, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    component = tiny_sd.components[name]
    session = onnxruntime.InferenceSession(str(made(name)[2]))
    feeds = component.example(4, {"batch_size": 2})
    names = [spec.name for spec in component.outputs]
    module = rounded(component)
    with torch.no_grad(), constants(module, BF16):  # 1.702 of quick GELU is a number of the graph, so rounded too
        results = module(*(torch.from_numpy(feeds[spec.name]) for spec in component.inputs))
    expected = {key: tensor.numpy() for key, tensor in zip(names, results, strict=True)}
    compare(expected, dict(zip(names, session.run(names, feeds), strict=True)), Tolerance(psnr_db=100.0)).require(name)


@pytest.mark.slow
def test_times_stay_float32_until_the_part_casts_them(made: Made) -> None:
    graph = onnx.load(str(made("unet")[0]), load_external_data=False).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input)}
    waves = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    assert {node.op_type for node in waves} == {"Sin", "Cos"} and kinds["timestep"] == WIDE
    assert {kinds[name] for node in waves for name in (*node.input, *node.output)} == {WIDE}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_torch_in_bfloat16_is_within_the_tolerance_that_its_simulation_gives(name: str) -> None:
    component = open_source("emoji").components[name]
    feeds: Any = component.example(5, component.smallest_sizes())
    expected, format_alone = component.load().run(feeds), simulated(component, feeds, 1 << 30, BF16)
    limits = {key: measured(array, format_alone[key]) for key, array in expected.items()}
    compare(expected, component.load(dtype="bfloat16").run(feeds), limits).require(name)
    assert all((limit.psnr_db or 0) > 40 for limit in limits.values())


@pytest.mark.slow
def test_what_has_no_bfloat16_is_refused() -> None:
    with pytest.raises(ConfigError, match="opset 21 has no bfloat16 convolution; bf16 needs 22 or more"):
        Onnx(precision="bf16", opset=21)
    with pytest.raises(ConfigError, match="GPUs below SM 80 have no bfloat16: take --precision fp16"):
        TensorRt(precision="bf16", sm=(75, 89))
    assert TensorRt(precision="bf16").through(open_source("arch:sdxl").components["vae_decoder"]).precision == "bf16"


@pytest.mark.slow
def test_a_graph_in_bfloat16_is_proved_here_and_not_run_here(command: Any, tmp_path: Path) -> None:
    words = ("--to", "onnx", "--precision", "bf16", "--parts", "text_encoder")
    assert command("export", "arch:tiny-sd", *words, "-o", tmp_path / "b")["exit_code"] == 0
    report = command("verify", tmp_path / "b")
    assert report["exit_code"] == 0 and [block["kind"] for block in report["parts"][0]["blocks"]] == ["graph"]
    refused = command("run", tmp_path / "b", "a cat", "-o", tmp_path / "cat.png")
    assert refused["exit_code"] == 3 and "bfloat16, which no engine does on a CPU" in refused["error"]["message"]


@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_an_engine_of_emoji_in_bfloat16(command: Any, tmp_path: Path) -> None:
    words = ("emoji", "--to", "tensorrt", "--sm", "89", "--precision", "bf16", "--parts", "unet,vae_decoder")
    made = command("export", *words, "-o", tmp_path / "engines")
    assert made["exit_code"] == 0, made
    assert [(part["precision"], part["graph"]) for part in made["parts"]] == [("bf16", "proved")] * 2
    proof = Bundle.open(tmp_path / "engines").part("unet").proof
    assert proof["status"] == "unproven" and proof["graph"]["status"] == "proved"
    assert sorted(path.name for path in (tmp_path / "engines" / "unet").iterdir()) == [
        "config.json", "model_rtx_sm89_bf16.json", "model_rtx_sm89_bf16.plan",
    ]  # fmt: skip
