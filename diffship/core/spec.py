"""TensorSpec: name, dtype and symbolic shape of one tensor that crosses a part's boundary.

An axis is an int, a name (`batch_size`) or a name with one integer factor, spelt with single spaces
(`latent_height * 8`, `sample_width / 8`): the form that optimum's runtime evaluates, so graphs can carry it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffship.core.errors import ConfigError, RunnerError

Axis = int | str
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as commands and manifests spell them
CAST_WITHIN = ("timestep", "time_ids")  # inputs in float32 at any precision: eleven bits are too few for them
_AXIS = re.compile(r"([a-z][a-z0-9_]*)(?: ([*/]) ([1-9][0-9]{0,3}))?\Z")


@dataclass(frozen=True)
class TensorSpec:
    """`TensorSpec("sample", "float32", ("batch_size", 4, "height", "width"))`."""

    name: str
    dtype: str
    shape: tuple[Axis, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"tensor {self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for axis in self.shape:
            if isinstance(axis, str):
                _parse(axis)
            elif isinstance(axis, bool) or axis < 1:
                raise ConfigError(f"tensor {self.name}: axis {axis!r} is not positive")

    def bind(self, shape: Iterable[int], known: Mapping[str, int] | None = None) -> dict[str, int]:
        """Sizes of the named axes that make this spec equal `shape`.

        Raises:
            RunnerError: rank, a fixed axis, or an axis that `known` already holds does not fit.
        """
        actual = tuple(shape)
        sizes = dict(known or {})
        if len(actual) != len(self.shape):
            raise RunnerError(f"tensor {self.name}: got shape {actual}, expected {self.text()}")
        for axis, size in zip(self.shape, actual, strict=True):
            if isinstance(axis, int):
                fits = axis == size
            else:
                name, value = _solve(axis, size)
                fits = value is not None and sizes.setdefault(name, value) == value
            if not fits:
                raise RunnerError(f"tensor {self.name}: got shape {actual}, expected {self.text(sizes)}")
        return sizes

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape as plain ints.

        Raises:
            ConfigError: an axis has no size, or does not divide.
        """
        return tuple(_evaluate(self.name, axis, sizes) for axis in self.shape)

    def axes(self) -> tuple[str, ...]:
        """Names of the free axes, in order of appearance."""
        names = [_parse(axis)[0] for axis in self.shape if isinstance(axis, str)]
        return tuple(dict.fromkeys(names))

    def text(self, sizes: Mapping[str, int] | None = None) -> str:
        """`(batch_size, 4, height, width)`, with known sizes filled in."""
        known = sizes or {}
        parts = []
        for axis in self.shape:
            if isinstance(axis, str) and _parse(axis)[0] in known:
                parts.append(f"{axis}={_evaluate(self.name, axis, known)}")
            else:
                parts.append(str(axis))
        return f"({', '.join(parts)})"

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> TensorSpec:
        """The inverse of `to_json`; raises ConfigError on anything else."""
        name, dtype, shape = data.get("name"), data.get("dtype"), data.get("shape")
        if set(data) != {"name", "dtype", "shape"} or not (
            isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)
        ):
            raise ConfigError(f"not a tensor spec: {str(data)[:200]}")
        if not all(isinstance(axis, (int, str)) for axis in shape):
            raise ConfigError(f"tensor {name}: an axis is an int or an expression, got {shape}")
        return cls(name, dtype, tuple(shape))


def _parse(axis: str) -> tuple[str, str, int]:
    match = _AXIS.match(axis)
    if match is None:
        raise ConfigError(f"axis {axis!r} is not a name or 'name * N' or 'name / N'")
    return match[1], match[2] or "*", int(match[3] or 1)


def _solve(axis: str, size: int) -> tuple[str, int | None]:
    name, operator, factor = _parse(axis)
    if operator == "/":
        return name, size * factor
    return name, size // factor if size % factor == 0 else None


def _evaluate(tensor: str, axis: Axis, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    name, operator, factor = _parse(axis)
    if name not in sizes:
        raise ConfigError(f"tensor {tensor}: axis {name} has no size; known: {', '.join(sizes) or 'none'}")
    if operator == "*":
        return sizes[name] * factor
    if sizes[name] % factor:
        raise ConfigError(f"tensor {tensor}: {name} = {sizes[name]} is not a multiple of {factor}")
    return sizes[name] // factor
