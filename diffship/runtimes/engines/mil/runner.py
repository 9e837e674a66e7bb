"""Core ML bundles computed with numpy: slow, exact about what a package says, and the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffship.core.errors import BundleError, RunnerError, UnsupportedError
from diffship.core.strict import bounded, choices
from diffship.runtimes.engines.engine import Probe, Session, package_version
from diffship.runtimes.engines.mil.blobs import Blobs
from diffship.runtimes.engines.mil.interpreter import Interpreter
from diffship.targets.coreml.program import Named, TensorType, read_program

DECLARED, WIDE = "declared", "fp32"


@dataclass(frozen=True)
@bounded
class MilRunner:
    """Options of the interpreter.

    arithmetic: "declared" rounds each tensor to the type that the package states, float16 as a rule; "fp32" computes
    all of them in float32, with the weights as they are stored.
    """

    name: ClassVar[str] = "mil"
    extra: ClassVar[str] = "coreml"
    targets: ClassVar[frozenset[str]] = frozenset({"coreml"})

    device: str = field(default="cpu", metadata=choices("cpu"))
    arithmetic: str = field(default=DECLARED, metadata=choices(DECLARED, WIDE))

    def open(self, files: Sequence[Path]) -> Session:
        """Open `files[0]`, the model.mlmodel of a package, with its weight file `files[1]`."""
        package = files[0].parents[2].name
        try:
            program = read_program(files[0])
            return MilSession(Interpreter(program, Blobs(files[1]), self.arithmetic == DECLARED))
        except (BundleError, RunnerError) as fault:
            raise RunnerError(f"mil refuses {package}: {fault}") from None

    def gate_bytes(self, file_bytes: int, precision: str) -> int:
        """A package is never cut into stretches, so it is always opened whole."""
        return 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe(cls.name, True, package_version("numpy"), ("cpu",))


class MilSession:
    """One opened package. A call of more samples than the package has rows is several calls of it."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter: Interpreter | None = interpreter
        program = interpreter.program
        made = {port.name: port for operation in program.operations for port in operation.outputs}
        self._ports = {port.name: _typed(port) for port in program.inputs}
        results = {name: _typed(made[name]) for name in program.outputs if name in made}
        self.inputs: Mapping[str, str] = {name: port.dtype for name, port in self._ports.items()}
        self.outputs: Mapping[str, str] = {name: port.dtype for name, port in results.items()}
        self._rows = next(iter(self._ports.values())).shape[0]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        interpreter = self._interpreter
        if interpreter is None:
            raise RunnerError("the package is closed; open it again")
        samples = len(next(iter(feeds.values())))
        for name, port in self._ports.items():
            if feeds[name].shape != (samples, *port.shape[1:]):
                raise UnsupportedError(
                    f"{name} has the shape {feeds[name].shape}; this package has fixed sizes and takes {port.shape}. "
                    "Draw at its own size (diffship inspect DIR), or export it with --width and --height"
                )
        found = [interpreter.run(self._block(feeds, start)) for start in range(0, samples, self._rows)]
        return [np.concatenate([one[name] for one in found])[:samples] for name in outputs]

    def keep(self, array: np.ndarray) -> Any:
        return array

    def close(self) -> None:
        self._interpreter = None

    def _block(self, feeds: Mapping[str, Any], start: int) -> dict[str, np.ndarray]:
        """The samples of one call from `start` on; the last one is repeated if there are too few."""
        cut = {name: np.asarray(array[start : start + self._rows]) for name, array in feeds.items()}
        lacking = self._rows - len(next(iter(cut.values())))
        return {name: np.concatenate([a, *[a[-1:]] * lacking]) if lacking else a for name, a in cut.items()}


def _typed(port: Named) -> TensorType:
    if port.type is None or not port.type.shape:
        raise UnsupportedError(f"{port.name[:80]!r} of the package is no tensor with a batch axis")
    return port.type
