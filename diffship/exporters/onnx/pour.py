"""Weights into an ONNX file's data: one tensor in memory at a time, checked, converted, and hashed on the way."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from diffship.calibration.packed import Packed, pack
from diffship.core.dtype import FLOATS, TensorMeta, as_bytes, convert, to_float32
from diffship.core.errors import ConfigError, SourceError
from diffship.core.lazy import lazy
from diffship.core.precision import Packing
from diffship.core.weights import Weights, source_digest
from diffship.exporters.onnx.graph import NAMES
from diffship.exporters.onnx.layout import DATA_FILE
from diffship.exporters.onnx.stored import CODES, SCALES, ZEROS, Stored

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
else:
    np = lazy("numpy")
    onnx = lazy("onnx")

OnTensor = Callable[[int], None]


def pour(
    model: onnx.ModelProto,
    weights: Weights,
    folder: Path,
    part: str,
    on_bytes: OnTensor | None = None,
    held: Mapping[str, str] = MappingProxyType({}),
    packed: Mapping[str, Packing] = MappingProxyType({}),
) -> str:
    """Write DATA_FILE into `folder` at the offsets that `model` states; returns the source digest of all `weights`.

    `on_bytes(n)` follows each tensor of n bytes. `held` is the name in `weights` of a tensor that has another one in
    the graph. `packed` says how weights are stored as integers.

    Raises:
        SourceError: a tensor is missing, of another shape, or holds NaN or infinity.
        ConfigError: a value does not fit the model's type.
    """
    places = {held.get(source, source): found for source, found in _places(model).items()}
    known = set(weights.names())
    for source in places:
        if source not in known:
            raise SourceError(f"{part}: its weights have no tensor {source!r}")
    with open(folder / DATA_FILE, "wb") as file:
        file.truncate(max((place.end for group in places.values() for place in group), default=0))
        return source_digest(_Poured(weights, places, file, part, on_bytes, packed))


def data_bytes(model: onnx.ModelProto) -> int:
    """Size of the data file that `pour` will write."""
    return max((place.end for group in _places(model).values() for place in group), default=0)


def place_in(model: onnx.ModelProto, whole: onnx.ModelProto, part: str) -> None:
    """Let the weights of `model` lie where those of the same names and forms of `whole` do.

    Raises:
        SourceError: `whole` has no such one.
    """
    held = {tensor.name: tensor for tensor in whole.graph.initializer if tensor.external_data}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        other = held.get(tensor.name)
        if other is None or (other.data_type, list(other.dims)) != (tensor.data_type, list(tensor.dims)):
            raise SourceError(f"{part}: its graph holds {tensor.name} in a form that the data of the other graph lacks")
        del tensor.external_data[:]
        tensor.external_data.extend(other.external_data)


class _Place:
    """Where and how one initialiser is stored."""

    def __init__(self, tensor: onnx.TensorProto) -> None:
        claims = {entry.key: entry.value for entry in tensor.external_data}
        self.stored = Stored.of(tensor.name)
        self.dtype = NAMES[tensor.data_type]
        self.shape = tuple(tensor.dims)
        self.offset = int(claims["offset"])
        self.end = self.offset + int(claims["length"])


def _places(model: onnx.ModelProto) -> dict[str, list[_Place]]:
    places: dict[str, list[_Place]] = defaultdict(list)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = _Place(tensor)
            places[place.stored.source].append(place)
    return places


class _Poured:
    """Weights that are written to the file as they are read, so that hashing them needs no second pass."""

    def __init__(
        self,
        weights: Weights,
        places: dict[str, list[_Place]],
        file: BinaryIO,
        part: str,
        on_bytes: OnTensor | None,
        packed: Mapping[str, Packing],
    ) -> None:
        self._weights = weights
        self._places = places
        self._file = file
        self._part = part
        self._on_bytes = on_bytes
        self._packed = packed

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes

    def names(self) -> tuple[str, ...]:
        return self._weights.names()

    def meta(self, name: str) -> TensorMeta:
        return self._weights.meta(name)

    def read(self, name: str) -> NDArray[np.generic]:
        array = self._weights.read(name)
        places = self._places.get(name, ())
        whole = [place for place in places if not place.stored.form.packed]
        label, meta = f"{self._part}: {name}", self._weights.meta(name)
        for place in whole:
            self._write(place, _converted(array, meta, place, label))
        if len(whole) < len(places):
            made = pack(to_float32(_as_float(array, meta.dtype, "float32", label), "float32"), self._packed[name])
            for place in places:
                if place.stored.form.packed:
                    self._write(place, _integers(made, meta, place, label))
        if self._on_bytes is not None:
            self._on_bytes(array.nbytes)
        return array

    def _write(self, place: _Place, array: NDArray[np.generic]) -> None:
        self._file.seek(place.offset)
        self._file.write(as_bytes(array))


def _converted(array: NDArray[np.generic], meta: TensorMeta, place: _Place, label: str) -> NDArray[np.generic]:
    if meta.dtype in FLOATS:
        array = _as_float(array, meta.dtype, place.dtype, label)
    form = place.stored.form
    if form.shape(tuple(array.shape)) != place.shape:
        raise SourceError(f"{label} has shape {meta.shape}; its config asks for {form.shape(place.shape)}")
    return np.ascontiguousarray(form.values(array), TensorMeta(place.dtype, place.shape).storage)


def _integers(made: Packed, meta: TensorMeta, place: _Place, label: str) -> NDArray[np.generic]:
    """What is stored at `place` of a packed weight."""
    form = place.stored.form
    found = {CODES: made.codes, SCALES: made.scales, ZEROS: made.zeros}[form.packed]
    rows = place.shape[-1 if form.reversed else 0]
    if found is None or found.size != math.prod(place.shape) or rows != meta.shape[0]:
        raise SourceError(f"{label} has shape {meta.shape}; packed, that is not the {place.shape} of the graph")
    flat = np.ascontiguousarray(form.values(found)).reshape(-1)
    return flat if place.dtype != "uint4" else _pairs(flat)


def _pairs(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes (uint8) below 16, two to a byte, the first one in the low half (onnx.proto3, TensorProto.raw_data)."""
    even: NDArray[np.uint8] = codes[0::2].copy()
    even[: codes.size // 2] |= codes[1::2] << 4
    return even


def _as_float(array: NDArray[np.generic], dtype: str, wanted: str, label: str) -> NDArray[np.generic]:
    plain = array if dtype in (wanted, "float64") else to_float32(array, dtype)
    if not np.isfinite(plain).all():
        bad = int(plain.size - np.isfinite(plain).sum())
        raise SourceError(f"{label} holds {bad} NaN or infinite of {plain.size} values; the source is damaged")
    try:
        return convert(array, dtype, wanted)
    except ConfigError as fault:
        raise ConfigError(f"{label}: {fault}. Run with: --precision fp32") from None
