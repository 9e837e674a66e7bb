"""Plain tables name -> "module:Class", so that listing what exists imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from diffship.core.errors import ConfigError, MissingExtra
from diffship.core.strict import unknown

EXPORTERS: dict[str, str] = {"onnx": "diffship.exporters.onnx:Onnx"}
RUNNERS: dict[str, str] = {
    "onnxruntime": "diffship.runtimes.onnxruntime:OnnxRuntimeRunner",
    "openvino": "diffship.runtimes.openvino:OpenVinoRunner",
    "torch": "diffship.runtimes.torch:TorchRunner",
}
PASSES: dict[str, str] = {}

# import name -> (what to call it, the extra that installs it)
EXTRAS: dict[str, tuple[str, str]] = {
    "torch": ("torch", "torch"),
    "diffusers": ("diffusers", "torch"),
    "transformers": ("transformers", "torch"),
    "accelerate": ("accelerate", "torch"),
    "peft": ("peft", "torch"),
    "huggingface_hub": ("huggingface_hub", "torch"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx"),
    "coremltools": ("coremltools", "coreml"),
    "torch_pruning": ("torch-pruning", "prune"),
    "fastapi": ("fastapi", "serve"),
    "httpx": ("httpx", "edge"),
    "lpips": ("lpips", "quality"),
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
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as fault:
        package = (fault.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtra(*EXTRAS[package]) from fault
