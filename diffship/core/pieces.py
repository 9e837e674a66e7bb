"""Weights made of shares of other weights: what other formats fuse, turn or pad, told apart again as it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from diffship.core.described import find
from diffship.core.dtype import TensorMeta
from diffship.core.errors import SourceError
from diffship.core.lazy import lazy
from diffship.core.weights import Derived, Weights, identity_of

if TYPE_CHECKING:
    import numpy as np

    from diffship.core.weights import Array
else:
    np = lazy("numpy")


@dataclass(frozen=True)
class Piece:
    """How one tensor is made of the stored tensor `name`.

    share, shares: which of how many equal shares of its first axis; by default all of it. matrix: whether its axes
    after the second, all of length 1, are dropped (a 1x1 convolution becomes a linear layer). turned: whether its two
    axes change places.
    """

    name: str
    share: int = 0
    shares: int = 1
    matrix: bool = False
    turned: bool = False


class Pieced(Derived):
    """The tensors `{new name: piece}` of `weights`, each read and cut when it is asked for.

    Raises SourceError if a stored tensor does not exist, or has a shape that cannot be cut so.
    """

    def __init__(self, weights: Weights, pieces: Mapping[str, Piece]) -> None:
        super().__init__(weights)
        self.pieces = dict(pieces)
        for new in self.pieces:
            self.meta(new)

    def identity(self) -> str | None:
        inner = identity_of(self._weights)
        facts = [inner, sorted((new, *astuple(piece)) for new, piece in self.pieces.items())]
        return inner and hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def names(self) -> tuple[str, ...]:
        return tuple(self.pieces)

    def meta(self, name: str) -> TensorMeta:
        piece = find(self.pieces, name)
        meta = self._weights.meta(piece.name)
        return TensorMeta(meta.dtype, _shape(piece, meta.shape))

    def read(self, name: str) -> Array:
        piece = find(self.pieces, name)
        array = self._weights.read(piece.name)
        if piece.shares > 1:
            rows = array.shape[0] // piece.shares
            array = array[piece.share * rows : (piece.share + 1) * rows].copy()  # a view would keep the whole alive
        if piece.turned:
            array = np.ascontiguousarray(array.T)
        return array.reshape(_shape(piece, self._weights.meta(piece.name).shape))


def _shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    cut = len(shape) > 0 and shape[0] % piece.shares == 0
    flat = not piece.matrix or all(length == 1 for length in shape[2:])
    if (piece.shares > 1 and not cut) or not flat or (piece.turned and len(shape) != 2):
        wanted = f"{piece.shares} equal shares" if piece.shares > 1 else "a matrix"
        raise SourceError(f"tensor {piece.name!r} has shape {list(shape)}, of which {wanted} cannot be made")
    rows = (shape[0] // piece.shares, *shape[1:]) if piece.shares > 1 else shape
    rows = rows[:2] if piece.matrix else rows
    return rows[::-1] if piece.turned else rows
