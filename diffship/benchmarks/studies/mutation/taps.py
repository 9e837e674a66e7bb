"""What every tensor of a sound graph holds on the golden feeds, and what one node would give if it were another one.

A fault that changes nothing where it is made is no mutant, so nodes are tried alone, on real values, before they are
drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.studies.mutation.values import change
from diffship.core.bundle import Bundle
from diffship.core.lazy import lazy
from diffship.core.manifest import Part
from diffship.runtimes.proof.verify import read_golden

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper
else:
    onnx, helper, numpy_helper = lazy("onnx"), lazy("onnx.helper"), lazy("onnx.numpy_helper")
    onnxruntime = lazy("onnxruntime")

Arrays = Mapping[str, NDArray[np.generic]]


class Taps:
    """The fp32 graph of a proved part, with the values of all its tensors on the first golden call."""

    def __init__(self, bundle: Bundle, part: Part) -> None:
        self._path = bundle.file(part.files[0])
        assert part.golden is not None
        self._feeds = read_golden(bundle, part.golden)[0][0]
        self.model = onnx.load(str(self._path), load_external_data=False)

    @cached_property
    def weights(self) -> Arrays:
        """The initializers whose bytes lie in the data file."""
        model = onnx.load(str(self._path))
        return {
            tensor.name: numpy_helper.to_array(full)
            for tensor, full in zip(self.model.graph.initializer, model.graph.initializer, strict=True)
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }

    @cached_property
    def values(self) -> Arrays:
        """All tensors by name: inputs, initializers and what nodes give."""
        model = onnx.load(str(self._path))
        ports = {port.name for port in model.graph.output}
        made = [name for node in model.graph.node for name in node.output if name]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in made if name not in ports)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        found = dict(zip(made, _session(model).run(made, self._feeds), strict=True))
        return {**self._feeds, **stored, **found}

    def effect(self, changed: onnx.NodeProto, more: Arrays | None = None) -> float:
        """By how much `changed` gives something else than the node of its name, relative to that (root mean square).

        0 if it gives the same, is refused, or gives another shape. `more` holds tensors that are not in the graph.
        """
        known = {**self.values, **(more or {})}
        names = list(dict.fromkeys(name for name in changed.input if name))
        if any(name not in known for name in names):
            return 0.0
        try:
            found = _session(_alone(changed, {name: known[name] for name in names}, self.model)).run(
                [changed.output[0]], {name: known[name] for name in names}
            )[0]
        except Exception:  # the engine's own kinds; such a node cannot stand in a graph
            return 0.0
        own = self.values[changed.output[0]]
        alike = found.shape == own.shape and found.dtype == own.dtype and np.isfinite(found).all()
        return change(own, found) if alike else 0.0


def _alone(node: onnx.NodeProto, values: Arrays, whole: onnx.ModelProto) -> onnx.ModelProto:
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in values.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in values.items()]
    outputs = [helper.make_empty_tensor_value_info(node.output[0])]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=whole.opset_import)
    model.ir_version = whole.ir_version
    return model


def _session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
