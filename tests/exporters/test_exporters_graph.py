"""Facts of the exported files: operators, names, axes, where the bytes are."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.job import Job
from diffship.core.precision import FP32
from diffship.core.weights import source_digest
from diffship.exporters.onnx import Onnx
from diffship.exporters.onnx.exporter import _code_digest
from diffship.exporters.onnx.retrace import retraced
from diffship.models.pipeline import Pipeline

PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
AXES = {
    "text_encoder": {
        "input_ids": ("batch_size", "sequence_length"),
        "last_hidden_state": ("batch_size", "sequence_length", 32),
        "pooler_output": ("batch_size", 32),
    },
    "unet": {
        "sample": ("batch_size", 4, "height", "width"),
        "timestep": ("timesteps",),
        "encoder_hidden_states": ("batch_size", "sequence_length", 32),
        "out_sample": ("batch_size", 4, "height", "width"),
    },
    "vae_encoder": {
        "sample": ("batch_size", 3, "sample_height", "sample_width"),
        "latent_parameters": ("batch_size", 8, "sample_height / 8", "sample_width / 8"),
    },
    "vae_decoder": {
        "latent_sample": ("batch_size", 4, "latent_height", "latent_width"),
        "sample": ("batch_size", 3, "latent_height * 8", "latent_width * 8"),
    },
}


def graph_of(bundle: Bundle, part: str) -> onnx.ModelProto:
    return onnx.load(str(bundle.file(f"{part}/model.onnx")), load_external_data=False)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def axes(ports: Iterable[Any]) -> dict[str, tuple[str | int, ...]]:
    return {
        port.name: tuple(dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim) for port in ports
    }


@pytest.mark.parametrize("part", PARTS)
def test_names_and_axes_are_those_that_clients_evaluate(tiny_sd_bundle: Bundle, part: str) -> None:
    graph = graph_of(tiny_sd_bundle, part).graph
    assert axes([*graph.input, *graph.output]) == AXES[part]


@pytest.mark.parametrize("part", PARTS)
def test_the_checker_accepts_the_file_with_its_data(tiny_sd_bundle: Bundle, part: str) -> None:
    onnx.checker.check_model(str(tiny_sd_bundle.file(f"{part}/model.onnx")), full_check=True)
    model = graph_of(tiny_sd_bundle, part)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]


def test_the_unet_has_native_operators_and_no_leftovers(tiny_sd_bundle: Bundle) -> None:
    found = operators(graph_of(tiny_sd_bundle, "unet"))
    # SD's topology: 22 resnets with two norms each, 16 transformers with one norm and two attentions, conv_norm_out
    assert (found["GroupNormalization"], found["Attention"], found["Gelu"]) == (61, 32, 16)
    assert found["Expand"] == 1, "one timestep for all samples"
    leftovers = {"Constant", "Identity", "Cast", "SequenceAt", "Squeeze", "InstanceNormalization", "Erf", "Dropout"}
    assert not leftovers & set(found)
    assert found["Shape"] <= 12


def test_linear_weights_need_no_transpose_at_load(tiny_sd_bundle: Bundle) -> None:
    for part in PARTS:
        graph = graph_of(tiny_sd_bundle, part).graph
        weights = {tensor.name for tensor in graph.initializer}
        assert not [n.name for n in graph.node if n.op_type in ("Transpose", "Reshape") and n.input[0] in weights]


@pytest.mark.parametrize("part", PARTS)
def test_weights_lie_in_one_data_file_without_overlap(tiny_sd_bundle: Bundle, part: str) -> None:
    graph = graph_of(tiny_sd_bundle, part).graph
    inline = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(len(tensor.raw_data) for tensor in inline) < 4096
    spans = []
    for tensor in graph.initializer:
        claims = {entry.key: entry.value for entry in tensor.external_data}
        if claims:
            assert claims["location"] == "model.onnx_data"
            spans.append((int(claims["offset"]), int(claims["offset"]) + int(claims["length"])))
            assert spans[-1][0] % 64 == 0
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == tiny_sd_bundle.file(f"{part}/model.onnx_data").stat().st_size
    assert {file.name for file in tiny_sd_bundle.file(f"{part}/model.onnx").parent.iterdir()} == {
        "model.onnx",
        "model.onnx_data",
        "config.json",
    }


def test_nodes_are_named_after_the_modules_they_came_from(tiny_sd_bundle: Bundle) -> None:
    names = {node.name for node in graph_of(tiny_sd_bundle, "unet").graph.node}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q/MatMul" in names
    assert "mid_block.resnets.1.conv2/Conv" in names
    assert len(names) == len(graph_of(tiny_sd_bundle, "unet").graph.node)


def test_stored_weights_are_the_source_bits(tiny_sd: Pipeline, tiny_sd_bundle: Bundle) -> None:
    weights = tiny_sd.components["text_encoder"].weights
    model = onnx.load(str(tiny_sd_bundle.file("text_encoder/model.onnx")))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert np.array_equal(stored[f"{name}.transposed"], weights.read(name).T)
    name = "text_model.final_layer_norm.bias"
    assert np.array_equal(stored[name], weights.read(name))


def test_source_digests_are_those_of_the_components(tiny_sd: Pipeline, tiny_sd_bundle: Bundle) -> None:
    for part in tiny_sd_bundle.manifest.parts:
        assert part.source_digest == source_digest(tiny_sd.components[part.name].weights)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21])
def test_lower_opsets_get_plain_operators(tiny_sd: Pipeline, opset: int) -> None:
    model = onnx.load_from_string(Onnx(opset=opset).graph(tiny_sd.components["vae_decoder"]))
    found = operators(model)
    assert "Attention" not in found
    assert ("GroupNormalization" in found) == (opset >= 21)
    assert model.opset_import[0].version == opset


@pytest.mark.slow
def test_a_cached_graph_is_not_made_again(tiny_sd: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, component, job = Onnx(), tiny_sd.components["text_encoder"], Job(tmp_path / "job")
    first = exporter.export(component, tmp_path / "a", job)
    monkeypatch.setattr(Onnx, "graph", lambda *_: pytest.fail("the graph was made again"))
    second = exporter.export(component, tmp_path / "b", job)
    assert first == second
    for name in first.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_options_change_the_digest_of_a_graph(tiny_sd: Pipeline) -> None:
    component = tiny_sd.components["text_encoder"]
    made = {Onnx(p, o).graph_digest(component) for p, o in (("fp32", 23), ("fp16", 23), ("fp32", 18))}
    assert len(made) == 3


@pytest.mark.parametrize("file", ["operators/layers.py", "capture.py", "unet.py", "core/precision.py"])
def test_code_that_makes_a_graph_changes_its_digest(
    file: str, tiny_sd: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that people must remember to raise was never raised."""
    component, read = tiny_sd.components["unet"], Path.read_bytes
    before = Onnx().graph_digest(component)
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * path.as_posix().endswith(file))
    _code_digest.cache_clear()
    changed = Onnx().graph_digest(component)
    monkeypatch.undo()
    _code_digest.cache_clear()
    assert changed != before == Onnx().graph_digest(component)


@pytest.mark.parametrize("options", [{"precision": "int9"}, {"opset": 17}, {"opset": 24}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"legal|did you mean"):
        Onnx(**options)


@pytest.mark.slow
def test_a_module_that_branches_on_its_size_is_refused() -> None:
    import torch

    from diffship.core.spec import TensorSpec
    from diffship.exporters.onnx.capture import capture
    from diffship.exporters.onnx.operators import OPERATORS

    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.relu() if x.shape[0] > 5 else x.tanh(),)

    spec = TensorSpec("x", "float32", ("batch_size", 4))
    with pytest.raises(UnsupportedError, match="other operations at other sizes"):
        capture(Branching(), (spec,), ({"batch_size": 3}, {"batch_size": 17}), FP32, OPERATORS)


@pytest.mark.slow
def test_the_cheaper_traces_say_what_torch_export_says(tiny_sd: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffship.exporters.onnx import capture

    told = []
    monkeypatch.setattr(capture, "retraced", lambda *given: told.append(retraced(*given)) or told[-1])
    component = tiny_sd.components["vae_decoder"]
    quick = Onnx().graph(component)
    assert [found is not None for found in told] == [True, True]
    monkeypatch.setattr(capture, "retraced", lambda *given: None)
    assert Onnx().graph(component) == quick


def test_traces_that_read_other_tensors_are_not_taken_for_the_same() -> None:
    import torch
    from torch._subclasses import fake_tensor

    class Crossed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            one, other = x.relu(), x.tanh()
            return (one - other if x.shape[0] < 5 else other - one,)

    with fake_tensor.FakeTensorMode(), torch.no_grad():
        program = torch.export.export(Crossed(), (torch.zeros(3, 4),), strict=False)
        assert retraced(program, Crossed(), (torch.zeros(4, 4),)) is not None
        assert retraced(program, Crossed(), (torch.zeros(6, 4),)) is None


@pytest.mark.slow
def test_an_operation_without_a_form_is_named() -> None:
    import torch

    from diffship.core.spec import TensorSpec
    from diffship.exporters.onnx.capture import capture
    from diffship.exporters.onnx.operators import OPERATORS
    from diffship.exporters.onnx.translate import Translation

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.special.i0(x),)

    spec = TensorSpec("x", "float32", ("batch_size", 4))
    captured = capture(Odd(), (spec,), ({"batch_size": 3}, {"batch_size": 17}), FP32, OPERATORS)
    with pytest.raises(UnsupportedError, match=r"no ONNX form for aten\.\S*i0"):
        Translation(captured, 23, str).run((spec,), (TensorSpec("y", "float32", ("batch_size", 4)),), "test")


@pytest.mark.slow
def test_a_vae_that_overflows_in_half_precision_stays_in_float32(tiny_sd: Pipeline, tmp_path: Path) -> None:
    decoder = tiny_sd.components["vae_decoder"]
    wide = replace(decoder, config={**decoder.config, "force_upcast": True})
    assert [Onnx(kind).of(wide).precision for kind in ("fp32", "fp16", "bf16")] == ["fp32", "fp32", "bf16"]
    assert Onnx("fp16").of(decoder) == Onnx("fp16")
    made = Onnx("fp16").export(wide, tmp_path, Job())
    assert made.precision == "fp32" and {spec.dtype for spec in (*made.inputs, *made.outputs)} == {"float32"}
    assert Onnx("fp16").disk_bytes(wide) == Onnx().disk_bytes(wide) > Onnx("fp16").disk_bytes(decoder)
