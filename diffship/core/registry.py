"""Plain tables name -> "module:Class", so that listing what exists imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffship.core.errors import ConfigError
from diffship.core.lazy import need
from diffship.core.strict import unknown

EXPORTERS: dict[str, str] = {
    "onnx": "diffship.exporters.onnx:Onnx",
    "tensorrt": "diffship.exporters.tensorrt:TensorRt",
}
RUNNERS: dict[str, str] = {
    "onnxruntime": "diffship.runtimes.onnxruntime:OnnxRuntimeRunner",
    "openvino": "diffship.runtimes.openvino:OpenVinoRunner",
    "tensorrt": "diffship.runtimes.tensorrt:TensorRtRunner",
    "torch": "diffship.runtimes.torch:TorchRunner",
}
PASSES: dict[str, str] = {
    "distill": "diffship.compression.distill:DistillPass",
    "layout": "diffship.compression.layout:LayoutPass",
    "lcm": "diffship.compression.lcm:LcmPass",
    "lora": "diffship.compression.lora:LoraPass",
    "significance": "diffship.compression.significance:SignificancePass",
    "prune": "diffship.compression.structural:PrunePass",
    "swap-vae": "diffship.compression.swap_vae:SwapVaePass",
    "vae": "diffship.compression.vae:VaePass",
}


def load(table: Mapping[str, str], name: str, what: str = "name") -> Any:
    """The class that `table[name]` points to, imported now.

    Raises:
        ConfigError: `name` is not in the table; the nearest legal one is named.
        MissingExtra: an optional dependency is not installed.
    """
    if name not in table:
        raise ConfigError(unknown(what, name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(need(module), attribute)
