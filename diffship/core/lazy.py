"""Optional packages, imported when they are first used, so that every module here imports without them.

A module that needs one says so once, for the type checker and for the interpreter:

    if TYPE_CHECKING:
        import torch
        from torch.nn import Module
    else:
        torch, Module = lazy("torch"), lazy_base("torch.nn", "Module")

From there on both read as ever. The first use imports the package, or names the extra that installs it. numpy, which
is always there, is asked for so in what `--help` imports: it would be a third of its time.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

from diffship.core.errors import MissingExtra

# import name -> (what to call it, the extra that installs it)
EXTRAS: dict[str, tuple[str, str]] = {
    "torch": ("torch", "torch"),
    "diffusers": ("diffusers", "torch"),
    "transformers": ("transformers", "torch"),
    "accelerate": ("accelerate", "torch"),
    "peft": ("peft", "torch"),
    "huggingface_hub": ("huggingface_hub", "torch"),
    "yaml": ("pyyaml", "torch"),
    "coremltools": ("coremltools", "coreml"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx"),
    "torch_pruning": ("torch-pruning", "prune"),
    "fastapi": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "httpx": ("httpx", "edge"),
    "matplotlib": ("matplotlib", "plots"),
}
# These import without torch, and then offer classes that only complain.
_NEED_TORCH = ("diffusers", "transformers")


def need(name: str) -> ModuleType:
    """The module `name`, imported now.

    Raises:
        MissingExtra: it, or an optional package that it stands on, is not installed.
        KeyboardInterrupt: it was stopped while it started, whatever it made of that.
    """
    try:
        if name.partition(".")[0] in _NEED_TORCH:
            importlib.import_module("torch")
        return importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as fault:
        _reraise_interrupt(fault)
        package = (getattr(fault, "name", None) or "").partition(".")[0]
        if not isinstance(fault, ModuleNotFoundError) or package not in EXTRAS:
            raise
        raise MissingExtra(*EXTRAS[package]) from fault


class _Lazy:
    """Stands for a module; each attribute is that module's own."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_loaded(self._name), attribute)

    def __repr__(self) -> str:
        return f"<lazy module {self._name!r}>"


_loaded = cache(need)


def lazy(name: str) -> Any:
    """A stand-in for the module `name`, which is imported when an attribute of it is first asked for."""
    return _Lazy(name)


def lazy_base(module: str, name: str) -> Any:
    """A stand-in for the base class `name` of `module`, which joins a derived class when its first instance is made.

    Instances are of the derived class and of the real base; the derived class itself is not a subclass of the base.
    """

    def new(cls: type, *_: object, **__: object) -> object:
        real = getattr(need(module), name)
        return object.__new__(cls if issubclass(cls, real) else _joined(cls, real))

    return type(name, (), {"__new__": new})


@cache
def _joined(cls: type, real: type) -> type:
    place = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(real)(cls.__name__, (cls, real), place)


def _reraise_interrupt(fault: BaseException) -> None:
    """Raises KeyboardInterrupt if `fault` was caused by one. A native module that the user stops while it is imported
    raises ImportError, which does not mean that it cannot be imported."""
    seen: BaseException | None = fault
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        seen = seen.__cause__ or seen.__context__


def installed(module: str) -> bool:
    """Whether `import module` would find something, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
