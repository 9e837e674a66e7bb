"""Packages made by coremltools itself from torch modules that the exporter never saw."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffship.runtimes.engines.mil.blobs import Blobs
from diffship.runtimes.engines.mil.interpreter import Interpreter
from diffship.targets.coreml.package import MODEL, WEIGHTS
from diffship.targets.coreml.program import read_program

Outputs = dict[str, np.ndarray]


def coremltools() -> Any:
    """The package; it warns of every torch that is newer than itself."""
    pytest.importorskip("coremltools")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        import coremltools
        import coremltools.optimize.coreml

        return coremltools


Pair = tuple[Callable[..., Any], Callable[..., torch.Tensor]]


def built(pairs: Sequence[Pair], feeds: Sequence[torch.Tensor], target: str = "iOS17") -> Any:
    """coremltools' model of a program whose outputs `out_0`, ... are what the first of each pair builds.

    No pass touches it, so the operations are those that were asked for.
    """
    tools = coremltools()
    from coremltools.converters.mil import Builder as builder
    from coremltools.converters.mil.mil import types

    kinds = {torch.float32: types.fp32, torch.int32: types.int32, torch.bool: types.bool}
    specs = [builder.TensorSpec(shape=tuple(x.shape), dtype=kinds[x.dtype]) for x in feeds]

    def body(inputs: Sequence[Any]) -> tuple[Any, ...]:
        results = [one(builder, *inputs) for one, _ in pairs]
        return tuple(builder.identity(x=result, name=f"out_{i}") for i, result in enumerate(results))

    names = ", ".join(f"in_{i}" for i in range(len(feeds)))
    scope: dict[str, Any] = {"body": body}
    exec(f"def made({names}):\n return body(({names},))", scope)  # the builder reads the names of the arguments
    oldest = getattr(tools.target, target)
    program = builder.program(input_specs=specs, opset_version=oldest)(scope["made"])
    with warnings.catch_warnings():  # of a temporary folder that coremltools leaves behind
        warnings.simplefilter("ignore")
        return tools.convert(
            program,
            minimum_deployment_target=oldest,
            compute_precision=tools.precision.FLOAT32,
            pass_pipeline=tools.PassPipeline.EMPTY,
            skip_model_load=True,
        )


def convert(module: torch.nn.Module, feeds: Sequence[torch.Tensor], half: bool = False, target: str = "iOS17") -> Any:
    """coremltools' model of a module, with the inputs `in_0`, ... and the outputs `out_0`, ..."""
    tools = coremltools()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), tuple(feeds), strict=False)
        made = program.run_decompositions({})
        count = len(module(*feeds)) if isinstance(module(*feeds), tuple) else 1
        kinds = {torch.float32: np.float32, torch.int32: np.int32}
        return tools.convert(
            made,
            inputs=[
                tools.TensorType(name=f"in_{i}", shape=tuple(x.shape), dtype=kinds[x.dtype])
                for i, x in enumerate(feeds)
            ],
            outputs=[tools.TensorType(name=f"out_{i}") for i in range(count)],
            compute_precision=tools.precision.FLOAT16 if half else tools.precision.FLOAT32,
            minimum_deployment_target=getattr(tools.target, target),
            skip_model_load=True,
        )


def opened(model: Any, folder: Path, half: bool = False) -> Interpreter:
    """`model` saved as a package in `folder` and opened by the interpreter."""
    package = folder / "part.mlpackage"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(str(package))
    (package / WEIGHTS).parent.mkdir(exist_ok=True)
    (package / WEIGHTS).touch()  # there is none where no weight is large
    return Interpreter(read_program(package / MODEL), Blobs(package / WEIGHTS), half)


def compare(
    pairs: Sequence[Pair], feeds: Sequence[torch.Tensor], folder: Path, at_most: float = 2e-6, target: str = "iOS17"
) -> set[str]:
    """Require that the interpreter gives for each pair what torch gives by its second half, to `at_most` of the peak;
    returns the kinds of operations that it ran."""
    interpreter = opened(built(pairs, feeds, target), folder)
    found = interpreter.run({f"in_{i}": x.numpy() for i, x in enumerate(feeds)})
    for i, (_, function) in enumerate(pairs):
        require_near(found[f"out_{i}"], function(*feeds), at_most, f"pair {i}")
    return {operation.kind for operation in interpreter.program.operations}


def require_near(found: np.ndarray, wanted: torch.Tensor, at_most: float, label: str = "") -> None:
    """Require equal shapes, and values that differ by `at_most` of the peak (of 1 if that is smaller)."""
    right = wanted.detach().numpy()
    assert found.shape == right.shape, label
    worst = float(np.abs(found.astype(np.float64) - right).max(initial=0.0))
    assert worst <= at_most * max(1.0, float(np.abs(right).max(initial=0.0))), f"{label}: {worst}"
