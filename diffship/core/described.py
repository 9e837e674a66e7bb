"""Weights that know the names, types and shapes of all their tensors before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from diffship.core.dtype import TensorMeta
from diffship.core.errors import SourceError

T = TypeVar("T")


class Described:
    """Weights whose names, types and shapes are known from the start; a subclass says how a tensor is read."""

    def __init__(self, metas: Mapping[str, TensorMeta]) -> None:
        self._metas = dict(metas)

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self._metas.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._metas)

    def meta(self, name: str) -> TensorMeta:
        return find(self._metas, name)


def find(table: Mapping[str, T], name: str) -> T:
    """The entry of a tensor. Raises SourceError if there is none."""
    if name not in table:
        raise SourceError(f"there is no tensor {name!r} among {len(table)}")
    return table[name]
