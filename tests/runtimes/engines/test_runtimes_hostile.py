from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from handmade import INPUTS, OUTPUTS, MakeBundle, unet_like

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError
from diffship.core.spec import TensorSpec

onnx = pytest.importorskip("onnx")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
ENGINES = ("onnxruntime", "openvino")


def with_external(**claims: str) -> Any:
    model = unet_like()
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in claims.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model


@pytest.mark.parametrize(
    "claims",
    [
        {"location": "../../../etc/passwd"},
        {"location": "/etc/passwd"},
        {"location": "model.onnx", "offset": "-8"},
        {"location": "model.onnx", "length": str(2**60)},
        {"location": "model.onnx", "__class__": "x"},
        {"location": "other.bin"},
    ],
    ids=str,
)
def test_external_data_outside_is_refused_before_an_engine_sees_it(
    bundle: Bundle, claims: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import json

    data = with_external(**claims).SerializeToString()
    (bundle.path / "unet" / "model.onnx").write_bytes(data)
    manifest = json.loads((bundle.path / "diffship.json").read_text())
    manifest["files"]["unet/model.onnx"]["size"] = len(data)
    (bundle.path / "diffship.json").write_text(json.dumps(manifest))
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the engine saw it"))
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Bundle.open(bundle.path)


def cyclic() -> Any:
    model = unet_like()
    model.graph.node[0].input[0] = "sum"
    return model


def without_opset() -> Any:
    model = unet_like()
    del model.opset_import[:]
    return model


def future_opset() -> Any:
    model = unet_like()
    model.opset_import[0].version = 9999
    return model


def unknown_operator() -> Any:
    model = unet_like()
    model.graph.node[0].op_type = "Exfiltrate"
    model.graph.node[0].domain = "evil.example"
    return model


def wrong_shape() -> Any:
    model = unet_like()
    model.graph.initializer[0].dims[0] = 1 << 40
    return model


def no_graph() -> bytes:
    return bytes(helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString())


def chain(length: int = 10_000) -> Any:
    names = ["sample", *(f"t{i}" for i in range(length - 1)), "out_sample"]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]
    shape = list(OUTPUTS[0].shape)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("sample", FLOAT, shape)], [value("out_sample", FLOAT, shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def endless() -> Any:
    """A Loop of 2**62 rounds."""
    value = helper.make_tensor_value_info
    shape = list(OUTPUTS[0].shape)
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Neg", ["x"], ["y"])],
        "body",
        [value("i", onnx.TensorProto.INT64, []), value("c", onnx.TensorProto.BOOL, []), value("x", FLOAT, shape)],
        [value("d", onnx.TensorProto.BOOL, []), value("y", FLOAT, shape)],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["rounds", "go", "sample"], ["out_sample"], body=body)],
        "g",
        [value("sample", FLOAT, shape)],
        [value("out_sample", FLOAT, shape)],
        [
            helper.make_tensor("rounds", onnx.TensorProto.INT64, [], [1 << 62]),
            helper.make_tensor("go", onnx.TensorProto.BOOL, [], [True]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


CHILD = """
import sys
import numpy as np
from diffship.core.bundle import Bundle
from diffship.core.errors import DiffshipError
from diffship.runtimes.engines.shell import open_runner
bundle = Bundle.open(sys.argv[1])
try:
    with open_runner(bundle, "unet", sys.argv[2]) as runner:
        sizes = {"batch_size": 1, "height": 8, "width": 8, "sequence_length": 5}
        runner.run({spec.name: np.ones(spec.resolve(sizes), np.float32) for spec in runner.inputs})
        print("ran")
except DiffshipError as fault:
    print("refused", "\\n" in str(fault), fault)
"""


def in_child(bundle: Bundle, engine: str, seconds: float) -> str:
    """What a child process that opens the bundle says; "timeout" where it had to be stopped."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(bundle.path), engine],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-800:]}"
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "make", [cyclic, without_opset, future_opset, unknown_operator, wrong_shape], ids=lambda make: make.__name__
)
def test_unsound_models_are_refused_in_one_line(make_bundle: MakeBundle, make: Any, engine: str) -> None:
    if (make, engine) == (future_opset, "openvino"):
        pytest.skip("OpenVINO reads operators of opsets to come as those of the last it knows")
    bundle = make_bundle(make(), golden=False)
    assert in_child(bundle, engine, 60).startswith("refused False")


def test_unsound_models_raise_here_too(make_bundle: MakeBundle) -> None:
    from diffship.core.errors import DiffshipError
    from diffship.runtimes.engines.shell import open_runner

    for made in (without_opset(), future_opset(), unknown_operator()):
        bundle = make_bundle(made, golden=False)
        with pytest.raises(DiffshipError) as caught:
            open_runner(bundle, "unet", "onnxruntime")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_chain_of_ten_thousand_nodes_does_not_kill_the_parent(make_bundle: MakeBundle, engine: str) -> None:
    bundle = make_bundle(chain(), (INPUTS[0],), golden=False)
    assert in_child(bundle, engine, 20) in ("ran", "timeout")


@pytest.mark.slow
def test_a_loop_without_end_meets_its_deadline(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(endless(), (INPUTS[0],), golden=False)
    assert in_child(bundle, "onnxruntime", 8) == "timeout"


def test_specs_of_a_hostile_manifest_are_checked_against_the_file(make_bundle: MakeBundle) -> None:
    from diffship.runtimes.engines.shell import open_runner

    more = (*INPUTS, TensorSpec("secret", "float32", ("batch_size", 1)))
    with pytest.raises(BundleError, match="the model has no 'secret'"):
        open_runner(make_bundle(unet_like(), more, golden=False), "unet", "onnxruntime")
