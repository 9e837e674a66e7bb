"""A bfloat16 graph as float32 with the weights as they were rounded: what engines without bfloat16 can prove of it.

Everything but the rounding of activations is the same: nodes, their order, shapes, and the value of every weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from diffship.core.dtype import as_bytes, to_float32
from diffship.core.lazy import lazy
from diffship.exporters.onnx.graph import TYPES
from diffship.exporters.onnx.layout import DATA_FILE, MODEL_FILE

if TYPE_CHECKING:
    import onnx
    from onnx import numpy_helper
else:
    onnx, numpy_helper = lazy("onnx"), lazy("onnx.numpy_helper")

_NARROW, _WIDE = TYPES["bfloat16"], TYPES["float32"]
_ALIGN = 64


def widen(source: Path, folder: Path) -> None:
    """Write MODEL_FILE and DATA_FILE into `folder`; of the weights, one at a time is in memory."""
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.elem_type == _NARROW:
            port.type.tensor_type.elem_type = _WIDE
    for node in graph.node:
        for attribute in node.attribute:
            _widen_attribute(node.op_type, attribute)
    with open(source.parent / DATA_FILE, "rb") as taken, open(folder / DATA_FILE, "wb") as given:
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _move(tensor, taken, given)
            else:
                _widen_inline(tensor)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))


def _widen_attribute(op: str, attribute: Any) -> None:
    if op == "Cast" and attribute.name == "to" and attribute.i == _NARROW:
        attribute.i = _WIDE
    if attribute.HasField("t"):
        _widen_inline(attribute.t)


def _widen_inline(tensor: Any) -> None:
    if tensor.data_type == _NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _move(tensor: Any, taken: BinaryIO, given: BinaryIO) -> None:
    """Copy one weight to the next place in the other file."""
    claims = {entry.key: entry for entry in tensor.external_data}
    taken.seek(int(claims["offset"].value))
    raw = taken.read(int(claims["length"].value))
    data = memoryview(raw)
    if tensor.data_type == _NARROW:
        tensor.data_type = _WIDE
        data = as_bytes(to_float32(np.frombuffer(raw, "<u2"), "bfloat16"))
    given.seek(-given.tell() % _ALIGN, 1)
    claims["offset"].value, claims["length"].value = str(given.tell()), str(data.nbytes)
    given.write(data)
