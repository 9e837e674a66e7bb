"""The one protocol that every engine meets: canonical names in, canonical names out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from diffship.core.spec import TensorSpec

Array = Any  # numpy, or anything with __dlpack__, which comes back as it came


class Handle:
    """A constant that an engine keeps on its device (text embeddings, say); may stand wherever a feed may."""

    __slots__ = ("shape", "value")

    def __init__(self, value: Any, shape: tuple[int, ...]) -> None:
        self.value = value
        self.shape = shape


@runtime_checkable
class Runner(Protocol):
    """A loaded part. Stateless between calls, and shared by threads.

    `inputs` and `outputs` are the canonical specs of the part; native names, dtypes and ranks stay inside.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array | Handle]) -> dict[str, Array]:
        """One call. Raises RunnerError for a missing, unknown or misshapen feed, before the engine is entered."""
        ...

    def put(self, array: Array) -> Handle:
        """Keep a constant on the device."""
        ...

    def close(self) -> None:
        """Release the engine; the runner is not used afterwards."""
        ...
