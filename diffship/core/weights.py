"""Weights: name -> tensor, one at a time. Renaming, casting and digests are maps over it; nothing holds it all."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from diffship.core.described import Described, find
from diffship.core.dtype import FLOATS, TensorMeta, as_bytes, convert, meta_of, stored, to_float32
from diffship.core.errors import ConfigError, SourceError
from diffship.core.lazy import lazy
from diffship.core.safetensors_file import Header, read_header, read_tensor
from diffship.core.seeded import SeededWeights
from diffship.core.sniff import refuse_unsafe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
else:
    np = lazy("numpy")

__all__ = [
    "Derived",
    "MemoryWeights",
    "SafetensorsWeights",
    "SeededWeights",
    "TensorMeta",
    "Weights",
    "cast",
    "count_parameters",
    "identity_of",
    "joined",
    "renamed",
    "source_digest",
    "subset",
    "taken",
    "to_float32",
]

T = TypeVar("T")
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system


class Weights(Protocol):
    """Named tensors, read one by one. `read` gives a fresh or read-only array that the caller must not write to."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        ...

    def names(self) -> tuple[str, ...]: ...

    def meta(self, name: str) -> TensorMeta:
        """Raises SourceError if there is no such tensor."""
        ...

    def read(self, name: str) -> Array:
        """The tensor in the storage type of its meta: raw uint16 for bfloat16, raw uint8 for float8."""
        ...


class SafetensorsWeights:
    """Tensors of one file, or of many (a sharded checkpoint), by offset; headers are checked now, tensors read later.

    `paths` is one path, several, or a map of tensor name to path (the `weight_map` of an index file; tensors that it
    does not name are left out). `rename` maps a name in the file to the name it goes by here.
    Raises SourceError for pickles, archives, damaged headers, names that stand twice or are missing.
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path] | Mapping[str, str | Path],
        rename: Mapping[str, str] | None = None,
    ) -> None:
        self._where: dict[str, tuple[Header, str]] = {}
        headers = {path: _checked_header(path) for path in _unique_paths(paths)}
        if isinstance(paths, Mapping):
            for name, path in paths.items():
                self._add(name, name, headers[Path(path)], rename or {})
        else:
            for header in headers.values():
                for name in header.entries:
                    self._add(name, name, header, rename or {})
        self.metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}

    @property
    def nbytes(self) -> int:
        return _nbytes(self)

    def names(self) -> tuple[str, ...]:
        return tuple(self._where)

    def meta(self, name: str) -> TensorMeta:
        header, stored_name = find(self._where, name)
        return header.entries[stored_name].meta

    def read(self, name: str) -> Array:
        header, stored_name = find(self._where, name)
        return read_tensor(header, stored_name)

    def identity(self) -> str | None:
        """A digest of which tensors of which files these are. None if a file is so new that its time of change would
        not show another change."""
        files = {header.path: header.identity for header, _ in self._where.values()}
        if any(time.time_ns() - identity[-1] < _SETTLED_NS for identity in files.values()):
            return None
        facts = sorted((name, stored_name, *header.identity) for name, (header, stored_name) in self._where.items())
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _add(self, name: str, stored_name: str, header: Header, rename: Mapping[str, str]) -> None:
        name = rename.get(name, name)
        if stored_name not in header.entries:
            raise SourceError(f"{header.path}: there is no tensor {stored_name!r}, though the index says so")
        if name in self._where:
            raise SourceError(f"{header.path}: the tensor {name!r} also stands in {self._where[name][0].path}")
        self._where[name] = (header, stored_name)


class MemoryWeights(Described):
    """Tensors that are arrays already, read-only; `dtypes` names the true type of raw bits (bfloat16 in uint16)."""

    def __init__(self, arrays: Mapping[str, Array], dtypes: Mapping[str, str] | None = None) -> None:
        known = dtypes or {}
        super().__init__(
            {
                name: TensorMeta(known[name], tuple(array.shape)) if name in known else meta_of(array)
                for name, array in arrays.items()
            }
        )
        self._arrays: dict[str, Array] = {}
        for name, array in arrays.items():
            self._arrays[name] = stored(array, self._metas[name]).view()
            self._arrays[name].flags.writeable = False

    def read(self, name: str) -> Array:
        return find(self._arrays, name)


class Derived:
    """Weights that pass on what other weights give; a subclass changes `meta` or `read`."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @property
    def nbytes(self) -> int:
        return _nbytes(self)

    def names(self) -> tuple[str, ...]:
        return self._weights.names()

    def meta(self, name: str) -> TensorMeta:
        return self._weights.meta(name)

    def read(self, name: str) -> Array:
        return self._weights.read(name)


class _Joined:
    def __init__(self, parts: Sequence[Weights]) -> None:
        self._owner = {name: part for part in parts for name in part.names()}

    @property
    def nbytes(self) -> int:
        return _nbytes(self)

    def names(self) -> tuple[str, ...]:
        return tuple(self._owner)

    def meta(self, name: str) -> TensorMeta:
        return find(self._owner, name).meta(name)

    def read(self, name: str) -> Array:
        return find(self._owner, name).read(name)


class _Renamed(Derived):
    def __init__(self, weights: Weights, old_names: Mapping[str, str]) -> None:
        super().__init__(weights)
        self._old = dict(old_names)

    def identity(self) -> str | None:
        inner = identity_of(self._weights)
        facts = [inner, sorted(self._old.items())]
        return inner and hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def names(self) -> tuple[str, ...]:
        return tuple(self._old)

    def meta(self, name: str) -> TensorMeta:
        return self._weights.meta(find(self._old, name))

    def read(self, name: str) -> Array:
        return self._weights.read(find(self._old, name))


class _Cast(Derived):
    def __init__(self, weights: Weights, dtype: str) -> None:
        super().__init__(weights)
        self._dtype = dtype

    def meta(self, name: str) -> TensorMeta:
        meta = self._weights.meta(name)
        return TensorMeta(self._dtype, meta.shape) if meta.dtype in FLOATS else meta

    def read(self, name: str) -> Array:
        meta, array = self._weights.meta(name), self._weights.read(name)
        if meta.dtype not in FLOATS or meta.dtype == self._dtype:
            return array
        try:
            return convert(array, meta.dtype, self._dtype)
        except ConfigError as fault:
            raise ConfigError(f"tensor {name}: {fault}") from None


class _Taken(Derived):
    def __init__(self, weights: Weights, kept: Mapping[str, Mapping[int, NDArray[np.intp]]]) -> None:
        super().__init__(weights)
        self._kept = kept

    def meta(self, name: str) -> TensorMeta:
        meta = self._weights.meta(name)
        shape = list(meta.shape)
        for axis, index in self._kept.get(name, {}).items():
            shape[axis] = len(index)
        return TensorMeta(meta.dtype, tuple(shape))

    def read(self, name: str) -> Array:
        array = self._weights.read(name)
        for axis, index in self._kept.get(name, {}).items():
            array = np.take(array, index, axis)
        return array


def identity_of(weights: Weights) -> str | None:
    """A digest that changes if a file behind `weights` changes, found without reading a tensor. None if there is none:
    for computed weights, and for files that were written in the last seconds."""
    identity = getattr(weights, "identity", None)
    found: str | None = identity() if identity is not None else None
    return found


def taken(weights: Weights, kept: Mapping[str, Mapping[int, NDArray[np.intp]]]) -> Weights:
    """Tensors cut to `{name: {axis: indices that stay}}`; those that it does not name are whole.

    Raises:
        SourceError: a name does not exist, or an index lies outside its axis.
    """
    for name, axes in kept.items():
        shape = weights.meta(name).shape
        for axis, index in axes.items():
            if not 0 <= axis < len(shape) or index.min() < 0 or index.max() >= shape[axis]:
                raise SourceError(f"tensor {name} has shape {shape}; axis {axis} cannot be cut as asked")
    return _Taken(weights, kept)


def renamed(weights: Weights, old_names: Mapping[str, str]) -> Weights:
    """The tensors under new names, `{new: old}`; those that the map does not mention are left out.

    Raises:
        SourceError: an old name does not exist.
    """
    known = set(weights.names())
    for old in old_names.values():
        if old not in known:
            raise SourceError(f"there is no tensor {old!r} among {len(known)}")
    return _Renamed(weights, old_names)


def joined(*parts: Weights) -> Weights:
    """The tensors of all `parts`; raises SourceError if two have one of the same name."""
    names = [name for part in parts for name in part.names()]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise SourceError(f"the tensor {twice[0]!r} stands in two of {len(parts)} sets of weights")
    return _Joined(parts)


def subset(weights: Weights, names: Iterable[str]) -> Weights:
    """Only `names`, in that order; raises SourceError if one does not exist."""
    return renamed(weights, {name: name for name in names})


def count_parameters(weights: Weights) -> int:
    """How many numbers all tensors hold together."""
    return sum(weights.meta(name).count for name in weights.names())


def cast(weights: Weights, dtype: str) -> Weights:
    """Float tensors as `dtype` (float32, float16, bfloat16, float64), rounded to nearest even; others as they are.

    Reading raises ConfigError for a finite value that `dtype` cannot hold.
    """
    if dtype not in FLOATS[:4]:
        raise ConfigError(f"cannot cast weights to {dtype!r}; legal: {', '.join(FLOATS[:4])}")
    return _Cast(weights, dtype)


def source_digest(weights: Weights) -> str:
    """sha256 (hex) over all tensors sorted by name (code points), so that two bundles prove a common origin.

    Per tensor: the JSON line `["NAME","DTYPE",[D0,D1]]` (no spaces, non-ASCII escaped, `\\n` at its end), then its
    elements in C order, little-endian. DTYPE is a name as in TensorMeta (`float32`, `bfloat16`).
    """
    digest = hashlib.sha256()
    for name in sorted(weights.names()):
        meta = weights.meta(name)
        line = json.dumps([name, meta.dtype, list(meta.shape)], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
        digest.update(as_bytes(stored(weights.read(name), meta)))
    return digest.hexdigest()


def _nbytes(weights: Weights) -> int:
    return sum(weights.meta(name).nbytes for name in weights.names())


def _unique_paths(paths: str | Path | Iterable[str | Path] | Mapping[str, str | Path]) -> list[Path]:
    if isinstance(paths, (str, Path)):
        return [Path(paths)]
    listed = paths.values() if isinstance(paths, Mapping) else paths
    return list(dict.fromkeys(Path(path) for path in listed))


def _checked_header(path: Path) -> Header:
    refuse_unsafe(path)
    return read_header(path)
