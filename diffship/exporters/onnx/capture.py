"""torch.export of a component whose weights do not exist: every tensor is fake, only shapes and dtypes are real."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffship.core.errors import UnsupportedError
from diffship.core.spec import TensorSpec


def capture(
    module: torch.nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], dtype: torch.dtype
) -> torch.export.ExportedProgram:
    """The program of `module` (on the meta device), dynamic in every named axis.

    Parameters and float inputs take `dtype`; `timestep` stays float32. `sizes` must be legal for the module, with
    every axis above 1 and no two of them equal by accident: torch.export takes 0, 1 and equal sizes as facts.

    Raises:
        UnsupportedError: torch.export cannot follow the module's Python code.
    """
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = _as_fake(module, dtype)
        feeds = tuple(_feed(spec, sizes, dtype) for spec in inputs)
        dynamic = tuple(
            {i: torch.export.Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in inputs
        )
        try:
            return torch.export.export(_Positional(fake), feeds, dynamic_shapes=(dynamic,), strict=False)
        except Exception as fault:
            reason = " ".join(str(fault).split())[:240]
            raise UnsupportedError(f"torch.export cannot follow {type(module).__name__}: {reason}") from fault


class _Positional(torch.nn.Module):
    """Names of the wrapped module's parameters get the prefix `part.`; buffers and inputs keep their order."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *feeds: torch.Tensor) -> Any:
        return self.part(*feeds)


def _as_fake(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of `module` with fake CPU tensors; called inside a FakeTensorMode."""
    fake = copy.deepcopy(module).eval().requires_grad_(False)
    for owner in fake.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = torch.nn.Parameter(_blank(parameter, dtype), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _blank(buffer, dtype)
    return fake


def _blank(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _feed(spec: TensorSpec, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
    own = torch.float32 if spec.name == "timestep" else dtype
    if not spec.dtype.startswith(("float", "bfloat")):
        own = getattr(torch, spec.dtype)
    return torch.zeros(spec.resolve(sizes), dtype=own)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
