from __future__ import annotations

import numpy as np
import pytest

from diffship.core.errors import SourceError
from diffship.core.pieces import Piece, Pieced
from diffship.core.weights import MemoryWeights, identity_of, source_digest

FUSED = np.arange(24, dtype=np.float32).reshape(6, 4)


def weights(**arrays: np.ndarray) -> MemoryWeights:  # type: ignore[type-arg]
    return MemoryWeights({"fused": FUSED, "conv": FUSED[:, :, None, None], **arrays})


def test_shares_turns_and_matrices() -> None:
    made = Pieced(
        weights(),
        {
            "second": Piece("fused", 1, 3),
            "turned": Piece("fused", turned=True),
            "both": Piece("fused", 0, 2, turned=True),
            "linear": Piece("conv", matrix=True),
        },
    )
    wanted = {"second": FUSED[2:4], "turned": FUSED.T, "both": FUSED[:3].T, "linear": FUSED}
    for name, array in wanted.items():
        read = made.read(name)
        assert np.array_equal(read, array) and read.flags.c_contiguous
        assert made.meta(name).shape == read.shape
    assert made.nbytes == sum(array.nbytes for array in wanted.values())
    assert source_digest(made) == source_digest(MemoryWeights({k: np.ascontiguousarray(v) for k, v in wanted.items()}))
    assert identity_of(made) is None


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (Piece("fused", 0, 4), "4 equal shares cannot"),
        (Piece("conv", turned=True), "cannot be made"),
        (Piece("wide", matrix=True), "a matrix cannot"),
        (Piece("none"), "no tensor 'none'"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_it_is_read(piece: Piece, told: str) -> None:
    with pytest.raises(SourceError, match=told):
        Pieced(weights(wide=FUSED.reshape(3, 2, 2, 2)), {"a": piece})
