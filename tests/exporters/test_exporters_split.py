"""Stretches of a model compute what the whole computes, and hold no more weights than they may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError, RunnerError
from diffship.models.pipeline import Pipeline
from diffship.runtimes.proof.onnx_split import SplitStage, split


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def run_chain(stages: list[SplitStage], feeds: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    values = dict(feeds)
    for stage in stages:
        session = session_of(stage.path)
        results = session.run(list(stage.outputs), {name: values[name] for name in stage.inputs})
        values.update(zip(stage.outputs, results, strict=True))
    return {name: values[name] for name in outputs}


@pytest.mark.slow
def test_a_unet_in_stretches_equals_the_whole(tiny_sd: Pipeline, tiny_sd_bundle: Bundle, tmp_path: Path) -> None:
    path = tiny_sd_bundle.file("unet/model.onnx")
    feeds = tiny_sd.components["unet"].example(0, {"batch_size": 2})
    whole = session_of(path).run(["out_sample"], feeds)[0]
    stages = split(path, 600_000, tmp_path)
    assert len(stages) >= 5
    assert all(stage.weight_bytes <= 600_000 for stage in stages)
    chained = run_chain(stages, feeds, ["out_sample"])["out_sample"]
    assert np.abs(chained - whole).max() < 1e-5


def test_only_one_stretch_lies_on_the_disk(tiny_sd_bundle: Bundle, tmp_path: Path) -> None:
    stages = split(tiny_sd_bundle.file("text_encoder/model.onnx"), 150_000, tmp_path)
    assert len(stages) > 1 and not list(tmp_path.iterdir())
    for stage in stages:
        first, written = stage.path, stage.path.stat().st_mtime_ns
        assert (stage.path, stage.path.stat().st_mtime_ns) == (first, written), "it is written once"
        assert len(list(tmp_path.iterdir())) == 2
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 400_000


def test_every_output_of_the_whole_comes_out(tiny_sd: Pipeline, tiny_sd_bundle: Bundle, tmp_path: Path) -> None:
    stages = split(tiny_sd_bundle.file("text_encoder/model.onnx"), 150_000, tmp_path)
    component = tiny_sd.components["text_encoder"]
    feeds = component.example(0)
    reference = component.load().run(feeds)
    found = run_chain(stages, feeds, list(reference))
    for name, array in reference.items():
        assert np.abs(found[name] - array).max() < 1e-4


def chain_model(path: Path, location: str | None = None) -> None:
    """y = ((x W0) W1) W2 without types of the tensors in between; W1 is also used at the end."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((32, 32)).astype(np.float32), f"w{i}") for i in range(3)]
    if location:
        weights[2].ClearField("raw_data")
        weights[2].data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "4096")):
            entry = weights[2].external_data.add()
            entry.key, entry.value = key, value
    names = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{(0, 1, 2, 1)[i]}"], [names[i + 1]]) for i in range(4)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_models_of_others_are_cut_by_inferred_types(tmp_path: Path) -> None:
    chain_model(tmp_path / "model.onnx")
    feeds = {"x": np.ones((3, 32), np.float32)}
    whole = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(["y"], feeds)[0]
    (tmp_path / "stages").mkdir()
    stages = split(tmp_path / "model.onnx", 5000, tmp_path / "stages")
    assert [stage.inputs for stage in stages] == [("x",), ("a",), ("b",), ("c",)]
    assert np.allclose(run_chain(stages, feeds, ["y"])["y"], whole, rtol=1e-5)


def test_an_operator_larger_than_the_bound_is_named(tmp_path: Path) -> None:
    chain_model(tmp_path / "model.onnx")
    with pytest.raises(RunnerError, match="4096 bytes of weights; 1000"):
        split(tmp_path / "model.onnx", 1000, tmp_path)


@pytest.mark.parametrize("location", ["../outside", "/etc/passwd", "folder/data"])
def test_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    chain_model(tmp_path / "model.onnx", location)
    (tmp_path / "stages").mkdir()
    with pytest.raises(BundleError, match="not beside the model"):
        [stage.path for stage in split(tmp_path / "model.onnx", 5000, tmp_path / "stages")]


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x80\x04\x95 not a model")
    with pytest.raises(BundleError, match="not an ONNX model"):
        split(tmp_path / "model.onnx", 1000, tmp_path)


def test_stage_files_are_plain_onnx(tiny_sd_bundle: Bundle, tmp_path: Path) -> None:
    for stage in split(tiny_sd_bundle.file("text_encoder/model.onnx"), 150_000, tmp_path):
        onnx.checker.check_model(str(stage.path), full_check=True)
