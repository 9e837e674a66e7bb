"""An encoder's states of weighted chunks, as A1111 and compel scale them; pure functions over arrays.

`encode` maps ids int64 (77,) to states float32 (77, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from diffship.sampling.text.chunks import Chunk, compel_chunks
from diffship.sampling.text.pieces import Piece
from diffship.sampling.tokenizer import ClipTokenizer

Floats = NDArray[np.float32]
States = Callable[[NDArray[np.int64]], Floats]
_NO_MEAN = 1e-4
_LEAST = 1e-5  # compel's stand-in for the weight 0, whose tangent would be infinite


def a1111_states(tokenizer: ClipTokenizer, chunks: Sequence[Chunk], encode: States) -> Floats:
    """States of all chunks, float32 (77 * chunks, width), each scaled by its token's weight, with the mean of the chunk
    kept (A1111's emphasis "Original")."""
    rows = [chunk.rows(tokenizer) for chunk in chunks]
    return np.concatenate([_emphasised(encode(ids), weights) for ids, weights in rows])


def compel_states(tokenizer: ClipTokenizer, pieces: Sequence[Piece], encode: States) -> Floats:
    """States of all pieces, float32 (77 * chunks, width).

    A weight scales the difference to the states of the empty prompt. For each piece of weight w below 1, the states of
    the prompt without that piece are mixed in with the share tan((1 - w) pi / 2) to 1, as compel's
    `DownweightMode.REMOVE` does.
    """
    empty = encode(Chunk().rows(tokenizer)[0])
    whole = _pulled(tokenizer, pieces, empty, encode)
    mixed, shares = whole.astype(np.float64), 1.0
    for place, piece in enumerate(pieces):
        if piece.weight < 1:
            share = math.tan((1 - max(_LEAST, piece.weight)) * math.pi / 2)
            others = [*pieces[:place], *pieces[place + 1 :]]
            mixed += share * filled(_pulled(tokenizer, others, empty, encode), empty, len(whole))
            shares += share
    return (mixed / shares).astype(np.float32) if shares != 1.0 else whole


def filled(states: Floats, empty: Floats, length: int) -> Floats:
    """`states` (tokens, width), with the states of empty chunks behind them up to `length` tokens."""
    return np.concatenate([states, *[empty] * ((length - len(states)) // len(empty))])


def _emphasised(states: Floats, weights: NDArray[np.float32]) -> Floats:
    if np.all(weights == 1):
        return states
    scaled = states * weights[:, None]
    before, after = states.mean(dtype=np.float64), scaled.mean(dtype=np.float64)
    if min(abs(before), abs(after)) < _NO_MEAN * np.abs(states).mean(dtype=np.float64):
        return scaled  # a norm without shift leaves means of rounding errors, whose ratio is noise
    return scaled * np.float32(before / after)


def _pulled(tokenizer: ClipTokenizer, pieces: Sequence[Piece], empty: Floats, encode: States) -> Floats:
    made = []
    for chunk in compel_chunks(tokenizer, pieces):
        ids, weights = chunk.rows(tokenizer)
        states, factors = encode(ids), weights[:, None]
        made.append(np.where(factors == 1, states, empty + (states - empty) * factors))
    return np.concatenate(made)
