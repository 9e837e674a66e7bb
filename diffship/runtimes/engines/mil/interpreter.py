"""A MIL program run operation by operation in float32, or with every tensor rounded to the type that it states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import BundleError, RunnerError, UnsupportedError
from diffship.runtimes.engines.mil.blobs import Blobs
from diffship.runtimes.engines.mil.operators import OPERATORS, parameters
from diffship.targets.coreml.program import Blob, Named, Operation, Program, Reference

Array: TypeAlias = NDArray[Any]
_CONSTANT = ("const", "constexpr_")  # beginnings of the kinds that are computed when a file is opened
_ALWAYS_LISTS = ("values",)  # arguments that take several tensors, also if there is one
_NAME = ("name",)  # attributes that mean nothing to a computation


@dataclass(frozen=True)
class Step:
    """An operation made ready: its function, its arguments (references or values), and what is not needed after it."""

    operation: Operation
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    done: tuple[str, ...]


class Interpreter:
    """A program with its constants read. Stateless between runs; threads may share it.

    half: round what the program calls float16 to float16 after every operation, as a device does that accumulates in
    float32. Otherwise such tensors are float32, and only weights are rounded, as they are stored.
    """

    def __init__(self, program: Program, blobs: Blobs, half: bool) -> None:
        """Looks at every operation before the first one runs.

        Raises:
            UnsupportedError: an operation, or an argument of one, is not known; it is named.
            BundleError: the program names a tensor that is not there, or the weight file does not fit.
        """
        self.program, self.half = program, half
        _refuse_unknown(program)
        self._constants: dict[str, Any] = {}
        steps = []
        for operation in program.operations:
            if operation.kind.startswith(_CONSTANT):
                self._constants[operation.name] = self._constant(operation, blobs)
            else:
                steps.append(operation)
        self._steps = self._ready(steps, blobs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Results by name. Raises RunnerError, naming the operation, for one that cannot be computed as stated."""
        walk = self.walk(feeds)
        while True:
            try:
                next(walk)
            except StopIteration as stop:
                found: dict[str, Array] = stop.value
                return found

    def walk(self, feeds: Mapping[str, Array]) -> Generator[tuple[Operation, Sequence[Array]], None, dict[str, Array]]:
        """(operation, its results) one by one; what the generator returns at its end are the results of the program."""
        values: dict[str, Any] = {
            port.name: self._rounded(np.asarray(feeds[port.name]), port) for port in self.program.inputs
        }
        for step in self._steps:
            results = self._results(step, values)
            values.update(zip((port.name for port in step.operation.outputs), results, strict=True))
            yield step.operation, results
            for name in step.done:
                del values[name]
        return {name: values[name] if name in values else self._constants[name] for name in self.program.outputs}

    def _results(self, step: Step, values: Mapping[str, Any]) -> list[Array]:
        operation = step.operation
        arguments = {name: self._given(held, values) for name, held in step.arguments.items()}
        try:
            with np.errstate(all="ignore"):
                found = step.function(**arguments)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, MemoryError) as fault:
            raise RunnerError(f"{operation.kind} {operation.name!r} cannot be computed: {str(fault)[:160]}") from None
        results = found if isinstance(found, list) else [found]
        if len(results) != len(operation.outputs):
            raise RunnerError(f"{operation.kind} {operation.name!r} gives {len(results)} results, not as stated")
        return [self._stated(operation, array, port) for array, port in zip(results, operation.outputs, strict=True)]

    def _given(self, held: Any, values: Mapping[str, Any]) -> Any:
        if isinstance(held, list):
            return [self._given(one, values) for one in held]
        if isinstance(held, Reference):
            return values[held.name] if held.name in values else self._constants[held.name]
        return held

    def _stated(self, operation: Operation, array: Array, port: Named) -> Array:
        """A result in the type that the program states, if it has the shape that it states."""
        if port.type is not None and tuple(array.shape) != port.type.shape:
            raise RunnerError(
                f"{operation.kind} {operation.name!r} gives the shape {tuple(array.shape)}; "
                f"the program states {port.type.shape}"
            )
        return self._rounded(array, port)

    def _rounded(self, array: Array, port: Named) -> Array:
        dtype = port.type.dtype if port.type is not None else ""
        if dtype == "float16" and self.half:
            with np.errstate(over="ignore"):
                return array.astype(np.float16).astype(np.float32)
        if dtype in ("float16", "float32"):
            return array.astype(np.float32, copy=False)
        return array if dtype in ("", "string") else array.astype(dtype, copy=False)

    def _constant(self, operation: Operation, blobs: Blobs) -> Any:
        if operation.kind == "const":
            if "val" not in operation.attributes:
                raise BundleError(f"the constant {operation.name[:80]!a} has no value")
            return _value(operation.attributes["val"], blobs)
        held = {name: self._argument(name, given, blobs) for name, given in operation.arguments.items()}
        held |= {n: _value(value, blobs) for n, value in operation.attributes.items() if n not in _NAME}
        arguments = {name: self._given(one, {}) for name, one in held.items()}
        return np.asarray(OPERATORS[operation.kind](**arguments))

    def _ready(self, operations: Sequence[Operation], blobs: Blobs) -> tuple[Step, ...]:
        known = {port.name for port in self.program.inputs} | set(self._constants)
        last: dict[str, int] = {}
        arguments = []
        for index, operation in enumerate(operations):
            held = {name: self._argument(name, given, blobs) for name, given in operation.arguments.items()}
            for name in _references(held):
                if name not in known:
                    raise BundleError(f"{operation.kind} {operation.name!r} takes {name[:80]!r}, which is not made yet")
                last[name] = index
            made = [port.name for port in operation.outputs]
            if known & set(made):
                raise BundleError(f"two tensors are called {sorted(known & set(made))[0][:80]!r}")
            known.update(made)
            last.update(dict.fromkeys(made, index))
            arguments.append(held)
        _require(self.program.outputs, known)
        kept = set(self.program.outputs) | set(self._constants)
        done: list[list[str]] = [[] for _ in operations]
        for name, index in last.items():
            if name not in kept:
                done[index].append(name)
        steps = zip(operations, arguments, done, strict=True)
        return tuple(Step(one, OPERATORS[one.kind], held, tuple(gone)) for one, held, gone in steps)

    def _argument(self, name: str, given: tuple[Any, ...], blobs: Blobs) -> Any:
        held = [one if isinstance(one, Reference) else _value(one, blobs) for one in given]
        return held if name in _ALWAYS_LISTS or len(held) != 1 else held[0]


def _refuse_unknown(program: Program) -> None:
    kinds = Counter(operation.kind for operation in program.operations if operation.kind != "const")
    unknown = sorted(kind for kind in kinds if kind not in OPERATORS)
    if unknown:
        counted = ", ".join(f"{kind[:60]} ({kinds[kind]})" for kind in unknown[:8])
        raise UnsupportedError(f"engine mil does not know the operations {counted}; Core ML on a Mac may")
    for operation in program.operations:
        odd = set() if operation.kind == "const" else set(operation.arguments) - parameters(operation.kind)
        if odd:
            raise UnsupportedError(
                f"engine mil does not know the argument {sorted(odd)[0][:60]!r} of {operation.kind} {operation.name!r}"
            )


def _require(names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise BundleError(f"the program gives {name[:80]!r}, which no operation makes")


def _references(held: Mapping[str, Any]) -> Iterator[str]:
    for value in held.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Reference):
                yield one.name


def _value(value: Any, blobs: Blobs) -> Any:
    """A stored value as operations take it: float16 and float64 become float32."""
    array = blobs.read(value) if isinstance(value, Blob) else value
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        return array.astype(np.float32)
    return array
