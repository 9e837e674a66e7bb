from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diffship.core.bundle import Bundle
from diffship.core.spec import TensorSpec

DIGEST = "0" * 64
INPUTS = (
    TensorSpec("sample", "float32", ("batch_size", 4, "height", "width")),
    TensorSpec("timestep", "float32", ("batch_size",)),
    TensorSpec("encoder_hidden_states", "float32", ("batch_size", "sequence_length", 8)),
)
OUTPUTS = (TensorSpec("out_sample", "float32", ("batch_size", 4, "height", "width")),)


def expected(sample: np.ndarray, timestep: Any, states: np.ndarray) -> np.ndarray:
    """What the hand-made graph computes: 2 sample + timestep / 1000 + the mean of the states."""
    steps = np.asarray(timestep, np.float32).reshape(-1, 1, 1, 1) / 1000
    return 2 * sample + steps + states.mean((1, 2)).reshape(-1, 1, 1, 1)


def unet_like(weight: float = 2.0, dtype: str = "FLOAT") -> Any:
    onnx = pytest.importorskip("onnx")
    kind = getattr(onnx.TensorProto, dtype)
    helper = onnx.helper
    nodes = [
        helper.make_node("Mul", ["sample", "weight"], ["scaled"]),
        helper.make_node("Reshape", ["timestep", "column"], ["steps32"]),
        helper.make_node("Mul", ["steps32", "thousandth"], ["small32"]),
        helper.make_node("Cast", ["small32"], ["small"], to=kind),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"], keepdims=1),
        helper.make_node("Unsqueeze", ["mean", "last"], ["mean4"]),
        helper.make_node("Add", ["scaled", "small"], ["sum"]),
        helper.make_node("Add", ["sum", "mean4"], ["out_sample"]),
    ]
    constants = [
        helper.make_tensor("weight", kind, [1], [weight]),
        helper.make_tensor("column", onnx.TensorProto.INT64, [4], [-1, 1, 1, 1]),
        helper.make_tensor("thousandth", onnx.TensorProto.FLOAT, [1], [0.001]),
        helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("last", onnx.TensorProto.INT64, [1], [3]),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("sample", kind, ["batch_size", 4, "height", "width"]),
        value("timestep", onnx.TensorProto.FLOAT, None),
        value("encoder_hidden_states", kind, ["batch_size", "sequence_length", 8]),
    ]
    outputs = [value("out_sample", kind, ["batch_size", 4, "height", "width"])]
    graph = helper.make_graph(nodes, "unet", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def feeds(batch: int = 2, size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "sample": draw.standard_normal((batch, 4, size, size), np.float32),
        "timestep": draw.uniform(0, 999, batch).astype(np.float32),
        "encoder_hidden_states": draw.standard_normal((batch, 5, 8), np.float32),
    }


MakeBundle = Callable[..., Bundle]
