"""What this machine can do at best: a matrix product and a copy, which figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 2048
_COPY_BYTES = 256 << 20
Product = Callable[[], object]


def ceilings(device: str = "cpu", repeats: int = 5) -> dict[str, float]:
    """Best rates of a device: a float32 matrix product (FLOP/s) and a copy in its memory (bytes/s, read and written).

    On a CPU the product is that of the fastest library which is installed: numpy's, torch's, ONNX Runtime's or
    OpenVINO's, as they differ by more than twice on one processor. On a GPU both are torch's, the product in float16
    as well: a roofline needs the two ceilings of one device.
    """
    makers = [_torch(device, "float32")] if device != "cpu" else [make() for make in (_numpy, *_installed())]
    found = {"matrix_product_flops": max(2 * SIDE**3 / _best(product, repeats) for product in makers)}
    if device != "cpu":
        found["matrix_product_flops_fp16"] = 2 * SIDE**3 / _best(_torch(device, "float16"), repeats)
    copy = _numpy_copy() if device == "cpu" else _torch_copy(device)
    found["copy_bytes_per_second"] = 2 * _COPY_BYTES / _best(copy, repeats)
    return found


def _numpy_copy() -> Product:
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def _torch_copy(device: str) -> Product:
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def once() -> object:
        target.copy_(source)
        return int(target[-1])  # reading an element waits for the device

    return once


def _installed() -> list[Callable[[], Product]]:
    known: dict[str, Callable[[], Product]] = {"torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}
    needs = {"onnxruntime": ("onnxruntime", "onnx")}
    return [make for name, make in known.items() if all(map(find_spec, needs.get(name, (name,))))]


def _matrix() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)


def _numpy() -> Product:
    matrix = _matrix()
    return lambda: matrix @ matrix


def _torch(device: str = "cpu", dtype: str = "float32") -> Product:
    import torch

    tensor = torch.randn(SIDE, SIDE, device=device, dtype=getattr(torch, dtype))

    def once() -> object:
        result = tensor @ tensor
        return result if device == "cpu" else float(result[0, 0])  # reading an element waits for the device

    return once


def _onnxruntime() -> Product:
    import onnxruntime
    from onnx import TensorProto, helper

    shaped = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", shaped[:2], shaped[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    matrix = _matrix()
    return lambda: session.run(None, {"a": matrix, "b": matrix})[0]


def _openvino() -> Product:
    import openvino
    from openvino import opset13

    sides = [opset13.parameter([SIDE, SIDE], np.float32) for _ in range(2)]
    model = openvino.Model([opset13.matmul(*sides, False, False)], sides, "product")
    # the plugin computes in bfloat16 where a processor has it, unless it is told the precision
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request, matrix = compiled.create_infer_request(), _matrix()
    return lambda: request.infer([matrix, matrix])[0]


def _best(call: Product, repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
