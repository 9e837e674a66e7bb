"""TensorSpec: name, dtype and symbolic shape of one tensor that crosses a part's boundary.

An axis is an int, a name (`batch_size`) or a name with one integer factor, spelt with single spaces
(`latent_height * 8`, `sample_width / 8`): the form that optimum's runtime evaluates, so graphs can carry it as it is.
Inside a transformer, where a picture is a row of tokens, an axis is a product of names (`height * width / 4`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from diffship.core.errors import ConfigError, RunnerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Axis = int | str
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
BATCH = "batch_size"
_NAME = r"[a-z][a-z0-9_]*"
_AXIS = re.compile(rf"({_NAME}(?: \* {_NAME})*)(?: ([*/]) ([1-9][0-9]{{0,3}}))?\Z")


@dataclass(frozen=True)
class TensorSpec:
    """`TensorSpec("sample", "float32", ("batch_size", 4, "height", "width"))`.

    exact: a float tensor that the network uses in float32 whatever its precision, so it is never rounded (timesteps,
    and the sizes of SDXL: diffusers widens both to float32 for their sinusoids). A part that is compiled states a dtype
    that holds the values instead.
    whole: an exact tensor of whole numbers up to 2048, which float16 holds, too. diffusers hands SDXL's `time_ids` to a
    U-Net in its own type, and an fp16 graph takes them so.
    """

    name: str
    dtype: str
    shape: tuple[Axis, ...]
    exact: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"tensor {self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.exact and self.dtype != "float32":
            raise ConfigError(f"tensor {self.name}: an exact tensor is float32, not {self.dtype}")
        if self.whole and not self.exact:
            raise ConfigError(f"tensor {self.name}: only an exact tensor is whole")
        for axis in self.shape:
            if isinstance(axis, str):
                _parse(axis)
            elif isinstance(axis, bool) or axis < 1:
                raise ConfigError(f"tensor {self.name}: axis {axis!r} is not positive")

    @property
    def is_float(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype in ("float32", "float16", "bfloat16")

    @property
    def batched(self) -> bool:
        """Whether its first axis counts samples; one without is the same for all samples of a call."""
        return self.shape[:1] == (BATCH,)

    @property
    def per_sample(self) -> bool:
        """Whether it has one value for each sample; a single value for all samples may stand for it."""
        return self.shape == (BATCH,)

    def bind(self, shape: Iterable[int], known: Mapping[str, int] | None = None) -> dict[str, int]:
        """Sizes of the named axes that make this spec equal `shape`.

        If no other axis tells the factors of a product apart, the product itself is a key (`height * width`).

        Raises:
            RunnerError: rank, a fixed axis, or an axis that `known` already holds does not fit.
        """
        actual = tuple(shape)
        sizes = dict(known or {})
        if len(actual) != len(self.shape):
            raise RunnerError(f"tensor {self.name}: got shape {actual}, expected {self.text()}")
        for axis, size in zip(self.shape, actual, strict=True):
            if not (axis == size if isinstance(axis, int) else _fits(axis, size, sizes)):
                raise RunnerError(f"tensor {self.name}: got shape {actual}, expected {self.text(sizes)}")
        if not all(_product(key, sizes) in (None, size) for key, size in sizes.items()):
            raise RunnerError(f"tensor {self.name}: got shape {actual}, expected {self.text(sizes)}")
        return sizes

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape as plain ints.

        Raises:
            ConfigError: an axis has no size, or does not divide.
        """
        return tuple(_evaluate(self.name, axis, sizes) for axis in self.shape)

    def nbytes(self, sizes: Mapping[str, int], width: int) -> int:
        """Bytes of the tensor where a value takes `width` of them. Raises as `resolve`."""
        return math.prod(self.resolve(sizes)) * width

    def axes(self) -> tuple[str, ...]:
        """Names of the free axes, in order of appearance."""
        names = [name for axis in self.shape if isinstance(axis, str) for name in _parse(axis)[0].split(" * ")]
        return tuple(dict.fromkeys(names))

    def text(self, sizes: Mapping[str, int] | None = None) -> str:
        """`(batch_size, 4, height, width)`, with known sizes filled in."""
        known = sizes or {}
        parts = []
        for axis in self.shape:
            if isinstance(axis, str) and _known(_parse(axis)[0], known):
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


def is_product(axis: Axis) -> TypeGuard[str]:
    """Whether an axis is a product of several named ones, as that of a picture's tokens is."""
    return isinstance(axis, str) and " * " in _parse(axis)[0]


def first_sample(
    specs: Iterable[TensorSpec], feeds: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]] | None:
    """The feeds of the first sample alone; None if they are of one sample already."""
    named = (spec.name for spec in specs if spec.batched and spec.name in feeds)
    batched = {name for name in named if len(feeds[name]) > 1}
    if not batched:
        return None
    return {name: array[:1] if name in batched else array for name, array in feeds.items()}


def _parse(axis: str) -> tuple[str, str, int]:
    """`height * width / 4` as ("height * width", "/", 4)."""
    match = _AXIS.match(axis)
    if match is None:
        raise ConfigError(f"axis {axis!r} is not a name, a product of names, 'name * N' or 'name / N'")
    return match[1], match[2] or "*", int(match[3] or 1)


def _fits(axis: str, size: int, sizes: dict[str, int]) -> bool:
    """Whether `axis` can be `size` beside the known `sizes`; what follows from it is added to them."""
    product, operator, factor = _parse(axis)
    if operator == "*" and size % factor:
        return False
    value = size * factor if operator == "/" else size // factor
    names = product.split(" * ")
    unknown = [name for name in names if name not in sizes]
    known = math.prod(sizes[name] for name in names if name in sizes)
    if len(unknown) == 1 and known > 0 and value % known == 0:
        sizes[unknown[0]] = value // known
        return True
    return known == value if not unknown else len(unknown) > 1 and sizes.setdefault(product, value) == value


def _known(product: str, sizes: Mapping[str, int]) -> bool:
    return product in sizes or all(name in sizes for name in product.split(" * "))


def _product(product: str, sizes: Mapping[str, int]) -> int | None:
    """The product of named sizes; None if one is not known."""
    names = product.split(" * ")
    return math.prod(sizes[name] for name in names) if all(name in sizes for name in names) else None


def _evaluate(tensor: str, axis: Axis, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    product, operator, factor = _parse(axis)
    value = _product(product, sizes)
    value = sizes.get(product) if value is None else value
    if value is None:
        raise ConfigError(f"tensor {tensor}: axis {product} has no size; known: {', '.join(sizes) or 'none'}")
    if operator == "*":
        return value * factor
    if value % factor:
        raise ConfigError(f"tensor {tensor}: {product} = {value} is not a multiple of {factor}")
    return value // factor
