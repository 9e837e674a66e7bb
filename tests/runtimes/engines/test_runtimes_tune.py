from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core.errors import BundleError
from diffship.runtimes.engines.onnx_edit import read_graph
from diffship.runtimes.engines.onnx_tune import tuned
from diffship.runtimes.engines.onnxruntime import OnnxRuntimeRunner

onnx = pytest.importorskip("onnx")
FLOAT, HALF, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
helper = onnx.helper


def model(nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], constants: list[Any], kind: int) -> bytes:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, kind, shape) for name, shape in inputs.items()],
        [value(name, kind, None) for name in outputs],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return bytes(made.SerializeToString())


def group_norm(kind: int = FLOAT, channels: int = 12, groups: int = 4) -> bytes:
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=groups, epsilon=1e-3)
    constants = [
        helper.make_tensor("scale", kind, [channels], np.linspace(0.5, 2, channels)),
        helper.make_tensor("bias", kind, [channels], np.linspace(-1, 1, channels)),
    ]
    return model([node], {"x": ["n", channels, *(["h", "w"])]}, ["y"], constants, kind)


def attention(head: list[int] = [0, 0, 2, 8], extra: bool = False, **attributes: Any) -> bytes:  # noqa: B006
    nodes = []
    for name in ("q", "k", "v"):
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}4"]))
        nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=[0, 2, 1, 3]))
    nodes += [
        helper.make_node("Attention", ["qt", "kt", "vt"], ["heads"], **attributes),
        helper.make_node("Transpose", ["heads"], ["swapped"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["swapped", "merge"], ["y"]),
    ]
    constants = [
        helper.make_tensor("split", INT64, [4], head),
        helper.make_tensor("merge", INT64, [3], [0, 0, 16]),
    ]
    outputs = ["y", "heads"] if extra else ["y"]
    return model(nodes, {"q": ["b", "s", 16], "k": ["b", "t", 16], "v": ["b", "t", 16]}, outputs, constants, FLOAT)


def ops(data: bytes) -> Counter[str]:
    return Counter(node.op for node in read_graph(data).nodes)


def run(data: bytes, feeds: dict[str, np.ndarray], tmp_path: Path, tune: bool) -> np.ndarray:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    return OnnxRuntimeRunner(threads=1, tune=tune).open([path]).run(feeds, ["y"])[0]


@pytest.mark.parametrize("offset", [0, 30])
def test_group_norm_equals_torch_better_than_before(tmp_path: Path, offset: float) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 12, 16, 8)).astype(np.float32) + np.float32(offset)
    scale, bias = torch.linspace(0.5, 2, 12, dtype=torch.float64), torch.linspace(-1, 1, 12, dtype=torch.float64)
    right = torch.nn.functional.group_norm(torch.from_numpy(x).double(), 4, scale, bias, 1e-3).numpy()
    errors = [np.abs(run(group_norm(), {"x": x}, tmp_path, tune) - right).max() for tune in (True, False)]
    assert errors[0] <= 1e-5 * (1 + offset) and (offset == 0 or errors[0] <= errors[1])
    assert "GroupNormalization" not in ops(tuned(group_norm()) or b"")


def test_group_norm_in_half_precision(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 12, 8, 8)).astype(np.float16)
    native, ours = (run(group_norm(HALF), {"x": x}, tmp_path, tune) for tune in (False, True))
    assert ours.dtype == np.float16
    np.testing.assert_allclose(ours.astype(np.float32), native.astype(np.float32), atol=1e-2)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.5}], ids=str)
def test_attention_becomes_one_operator(tmp_path: Path, attributes: dict[str, float]) -> None:
    data = attention(**attributes)
    assert ops(tuned(data) or b"") == {"MultiHeadAttention": 1}
    draw = np.random.default_rng(0)
    feeds = {
        name: draw.standard_normal((2, size, 16)).astype(np.float32) for name, size in (("q", 9), ("k", 5), ("v", 5))
    }
    q, k, v = (array.reshape(2, -1, 2, 8).transpose(0, 2, 1, 3).astype(np.float64) for array in feeds.values())
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) * attributes.get("scale", 8**-0.5))
    right = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(2, 9, 16)
    np.testing.assert_allclose(run(data, feeds, tmp_path, True), right, atol=1e-5)


@pytest.mark.parametrize(
    "data",
    [attention(is_causal=1), attention(extra=True), attention(head=[0, 0, 1, 16]), attention(head=[0, 0, -1, 8])],
    ids=["causal", "heads are read elsewhere", "one head", "heads unknown"],
)
def test_what_is_not_the_same_stays(data: bytes) -> None:
    assert tuned(data) is None


def test_reading_and_writing_keeps_the_model() -> None:
    data = attention()
    kept = onnx.load_from_string(read_graph(data).encode())
    assert kept == onnx.load_from_string(data)


@pytest.mark.slow
def test_a_tuned_bundle_part_computes_the_same(tiny_bundle: Path) -> None:
    path = tiny_bundle / "unet" / "model.onnx"
    counts = ops(tuned(path.read_bytes()) or b"")
    assert counts["MultiHeadAttention"] == 32 and not counts["GroupNormalization"] and not counts["Attention"]
    inputs = {"sample": (2, 4, 16, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, 32)}
    draw = np.random.default_rng(0)
    feeds = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
    results = []
    for tune in (True, False):
        session = OnnxRuntimeRunner(threads=1, tune=tune).open([path])
        results.append(session.run(feeds, ["out_sample"])[0])
    np.testing.assert_allclose(results[0], results[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_mutated_models_are_refused_or_read(seed: int) -> None:
    draw = np.random.default_rng(seed)
    data = bytearray(attention() if seed % 2 else group_norm())
    for place in draw.integers(0, len(data), 4):
        data[place] = draw.integers(0, 256)
    try:
        tuned(bytes(data[: draw.integers(1, len(data) + 1)]))
    except BundleError as fault:
        assert "not a sound ONNX model" in str(fault)
