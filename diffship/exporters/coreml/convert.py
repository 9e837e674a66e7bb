"""From a torch module to the files of an .mlpackage, through torch.export and coremltools."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.manifest import Binding
from diffship.exporters.coreml.lowering import norms_in_four_axes
from diffship.targets.coreml.package import FILES, MANIFEST, MODEL, WEIGHTS, manifest

if TYPE_CHECKING:
    import coremltools
    import numpy as np
    import torch
    from torch import nn
else:
    torch, coremltools, np = lazy("torch"), lazy("coremltools"), lazy("numpy")

_NEAR = 4  # operators between a timestep and its sinusoid, at the most


@dataclass(frozen=True)
class Order:
    """How a module is converted. inputs and outputs: native names and types; shapes: of the inputs.

    half: compute in float16, but for what becomes sinusoids. oldest: the oldest system that opens the package, as
    coremltools names it (`iOS16`). metadata: texts that lie in the package.
    """

    inputs: Sequence[Binding]
    outputs: Sequence[Binding]
    shapes: Sequence[tuple[int, ...]]
    half: bool
    oldest: str
    metadata: Mapping[str, str]


def converted(module: nn.Module, order: Order) -> Any:
    """The module as coremltools' MLModel, a program of MIL.

    Raises:
        UnsupportedError: torch.export cannot follow the module, or an operation has no form in Core ML.
    """
    feeds = tuple(torch.zeros(shape) for shape in order.shapes)
    with quiet(), torch.no_grad():
        try:
            with norms_in_four_axes():
                program = torch.export.export(module, feeds, strict=False)
            program = program.run_decompositions({})
        except Exception as fault:
            raise UnsupportedError(f"torch.export cannot follow this part: {_short(fault)}") from fault
        try:
            model = coremltools.convert(program, **_arguments(order))
        except Exception as fault:
            raise UnsupportedError(f"coremltools cannot convert this part: {_short(fault)}") from fault
    for key, text in order.metadata.items():
        model.user_defined_metadata[key] = text
    return model


def save(model: Any, folder: Path) -> None:
    """Write the files of a package below `folder`, which is made. Equal models give equal bytes."""
    with tempfile.TemporaryDirectory(prefix="diffship-coreml-") as made, quiet():
        saved = Path(made) / "part.mlpackage"
        model.save(str(saved))
        data = model.get_spec().SerializeToString(deterministic=True)
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(data)
        weights = saved / WEIGHTS
        (folder / WEIGHTS).write_bytes(weights.read_bytes() if weights.exists() else b"")
        (folder / MANIFEST).write_bytes(manifest(hashlib.sha256(data).hexdigest()))


def histogram(model: Any) -> dict[str, int]:
    """How many operations of each type the program has, constants left out."""
    (function,) = model._mil_program.functions.values()
    counts = Counter(op.op_type for op in function.operations)
    return {name: counts[name] for name in sorted(counts) if name != "const"}


def _arguments(order: Order) -> dict[str, Any]:
    inputs = [
        coremltools.TensorType(name=port.native, shape=shape, dtype=np.dtype(port.dtype).type)
        for port, shape in zip(order.inputs, order.shapes, strict=True)
    ]
    outputs = [coremltools.TensorType(name=port.native, dtype=np.dtype(port.dtype).type) for port in order.outputs]
    precision = coremltools.precision.FLOAT32
    if order.half:
        precision = coremltools.transform.FP16ComputePrecision(op_selector=lambda op: not feeds_sinusoid(op))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "compute_precision": precision,
        "minimum_deployment_target": getattr(coremltools.target, order.oldest),
        "convert_to": "mlprogram",
        "skip_model_load": True,
    }


def feeds_sinusoid(op: Any, near: int = _NEAR) -> bool:
    """Whether an operation is a sine or cosine, or computes what one takes.

    In float16 a timestep of 999 times its frequency is off by up to a quarter, and its sine is another number.
    """
    if op.op_type in ("sin", "cos"):
        return True
    return near > 0 and any(feeds_sinusoid(user, near - 1) for made in op.outputs for user in made.child_ops)


@contextmanager
def quiet() -> Iterator[None]:
    """coremltools warns of every torch that is newer than itself, and shows bars; neither is of this export."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared with processes, and lies in the file system
    shown, tqdm.__init__ = tqdm.__init__, _without_bar(tqdm.__init__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = shown
        log.setLevel(level)


def _without_bar(made: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "disable": True})

    return init


def _short(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:240] or type(fault).__name__
