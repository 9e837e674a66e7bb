"""Element types: their names in safetensors files, how numpy stores them, and the way to float32.

numpy has no bfloat16 and no float8: these travel as raw bits (uint16, uint8) beside a TensorMeta that names them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

# name -> (safetensors code, numpy storage type)
_TYPES: dict[str, tuple[str, str]] = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "|u1"),
    "float8_e5m2": ("F8_E5M2", "|u1"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "|i1"),
    "uint64": ("U64", "<u8"),
    "uint32": ("U32", "<u4"),
    "uint16": ("U16", "<u2"),
    "uint8": ("U8", "|u1"),
    "bool": ("BOOL", "|b1"),
}
CODES = {name: code for name, (code, _) in _TYPES.items()}
NAMES = {code: name for name, code in CODES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class TensorMeta:
    """Type and shape of a stored tensor; `dtype` is a name such as `float32` or `bfloat16`."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; legal: {', '.join(_TYPES)}")

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.storage.itemsize

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The little-endian numpy type that holds it: uint16 for bfloat16, uint8 for float8."""
        return np.dtype(_TYPES[self.dtype][1])


def meta_of(array: NDArray[np.generic]) -> TensorMeta:
    """TensorMeta of a numpy array (ml_dtypes arrays included); raises ConfigError for other types."""
    return TensorMeta(array.dtype.name, tuple(array.shape))


def stored(array: NDArray[np.generic], meta: TensorMeta) -> NDArray[np.generic]:
    """`array` as contiguous little-endian storage of `meta`, viewed, not converted, if numpy lacks the type.

    Raises:
        ConfigError: shape or type is another one than `meta` says.
    """
    same_type = array.dtype == meta.storage or array.dtype.name == meta.dtype
    if not same_type or tuple(array.shape) != meta.shape:
        raise ConfigError(f"got {array.dtype} {tuple(array.shape)}, expected {meta.dtype} {meta.shape}")
    flat = np.ascontiguousarray(array).reshape(meta.shape)
    if flat.dtype.name == meta.dtype and flat.dtype.kind != "V":
        return (
            flat.astype(meta.storage, copy=False) if meta.storage.kind == flat.dtype.kind else flat.view(meta.storage)
        )
    return flat.view(meta.storage)


def as_bytes(array: NDArray[np.generic]) -> memoryview:
    """The bytes of a contiguous array, in C order, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def to_float32(array: NDArray[np.generic], dtype: str | None = None) -> NDArray[np.float32]:
    """Values as float32; `dtype` names the true type if `array` holds raw bits (exact for 16 and 8 bit floats).

    Raises:
        ConfigError: a finite float64 value that would become infinite.
    """
    name = dtype or array.dtype.name
    raw = array
    if name == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name in ("float8_e4m3fn", "float8_e5m2"):
        return _float8_table(name)[raw.view(np.uint8)]
    with np.errstate(over="ignore"):
        cast = raw.astype(np.float32)
    if name == "float64":
        _refuse_overflow(raw, cast, "float32")
    return cast


def convert(array: NDArray[np.generic], dtype: str, wanted: str) -> NDArray[np.generic]:
    """Stored values of type `dtype` in the storage of `wanted` (a float type of 16 bits or more), rounded once, to
    nearest even.

    Raises:
        ConfigError: another `wanted`, or a finite value that would become infinite.
    """
    if dtype != "float64" or wanted == "float64":
        return from_float32(to_float32(array, dtype), wanted) if dtype != wanted else array
    if wanted == "bfloat16":
        return from_float32(_odd_float32(array), wanted)
    if wanted not in FLOATS:
        raise ConfigError(f"cannot cast to {wanted}; legal: {', '.join(FLOATS[:4])}")
    with np.errstate(over="ignore"):
        cast: NDArray[np.generic] = array.astype(_TYPES[wanted][1])
    _refuse_overflow(array, cast, wanted)
    return cast


def from_float32(array: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Values rounded to nearest even into the storage type of `dtype` (float64, float32, float16 or bfloat16).

    Raises:
        ConfigError: another dtype, or a finite value that would become infinite.
    """
    if dtype not in FLOATS[:4]:
        raise ConfigError(f"cannot cast to {dtype}; legal: {', '.join(FLOATS[:4])}")
    storage = np.dtype(_TYPES[dtype][1])
    if dtype == "bfloat16":
        cast: NDArray[np.generic] = _to_bfloat16(array)
    else:
        with np.errstate(over="ignore"):
            cast = array.astype(storage)
    _refuse_overflow(array, to_float32(cast, dtype) if dtype == "bfloat16" else cast, dtype)
    return cast


def _refuse_overflow(array: NDArray[Any], cast: NDArray[Any], dtype: str) -> None:
    """Raises ConfigError if a finite value of `array` became infinite in `cast`."""
    if np.isfinite(cast).all():
        return
    lost = np.isinf(cast) & np.isfinite(array)
    if lost.any():
        peak = float(np.abs(array[lost]).max())
        raise ConfigError(f"the value {peak:.6g} does not fit {dtype}; keep this tensor in a wider type")


def _odd_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """float64 rounded to float32 "to odd": the last bit of an inexact value is set. A second rounding then gives what a
    single one would have given (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums")."""
    near = to_float32(array, "float64")
    with np.errstate(invalid="ignore"):
        away = np.abs(near.astype(np.float64)) > np.abs(array)
        toward = np.where(away, np.nextafter(near, np.float32(0)), near).astype(np.float32)
        inexact = toward.astype(np.float64) != array
    bits = np.ascontiguousarray(toward).view(np.uint32) | (inexact & np.isfinite(toward)).astype(np.uint32)
    odd: NDArray[np.float32] = bits.view(np.float32)
    return odd


def _to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    # rounding may carry a NaN's mantissa away: keep it a quiet NaN
    return np.where(np.isnan(array), ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded)


@cache
def _float8_table(name: str) -> NDArray[np.float32]:
    """All 256 values (Micikevicius et al. 2022, "FP8 formats for deep learning", table 1)."""
    exponent_bits, bias = (4, 7) if name == "float8_e4m3fn" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if name == "float8_e4m3fn":
        value[(code & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == (1 << exponent_bits) - 1
        value[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    return (sign * value).astype(np.float32)
