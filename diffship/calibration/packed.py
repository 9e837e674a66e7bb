"""Weights as small integers: rounded to the nearest, with one scale for each output channel or for each block of it.

8 bits are symmetric: scale = max |w| / 127 (Krishnamoorthi 2018, arXiv 1806.08342, section 2.2). 4 bits are affine
over blocks (section 2.1 there), and every range holds 0. Every engine computes value = (code - zero) * scale in
float32, as ONNX's DequantizeLinear does, so the values here are theirs to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.core.precision import Packing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

_BLOCKS = (64, 32, 16)  # engines have kernels for powers of two from 16 on
_CHUNK = 1 << 20  # weights that are packed at a time, so that intermediate arrays stay small
_ODD = Packing(8)  # of tensors whose rows no block divides


@dataclass(frozen=True, eq=False)
class Packed:
    """One weight as integers; rows are output channels, columns everything else.

    codes: int8 or uint8 (rows, columns). scales: float32 (rows, blocks). zeros: uint8 (rows, blocks), None for 8 bits.
    """

    codes: NDArray[np.generic]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None

    def values(self) -> NDArray[np.float32]:
        """What an engine computes with: float32 (rows, columns)."""
        made = np.empty(self.codes.shape, np.float32)
        size = self.codes.shape[1] // self.scales.shape[1]
        for rows in _chunks(*self.codes.shape):
            codes = _blocks(self.codes[rows], size).astype(np.float32)
            if self.zeros is not None:
                codes -= self.zeros[rows, :, None]
            made[rows] = (codes * self.scales[rows, :, None]).reshape(made[rows].shape)
        return made


def fitting(packing: Packing, shape: tuple[int, ...]) -> Packing:
    """How a weight of `shape` (output channels first) is packed if `packing` is asked for.

    That is with the largest block, up to the one asked for, that divides its rows; if none does, with 8 bits.
    """
    if not packing.block:
        return packing
    columns = math.prod(shape[1:])
    block = next((size for size in _BLOCKS if size <= packing.block and columns % size == 0), 0)
    return Packing(packing.bits, block) if block else _ODD


def packed_bytes(packing: Packing, shape: tuple[int, ...]) -> int:
    """Bytes of codes, scales and zeros of a weight of `shape`, whose `packing` fits it."""
    count = math.prod(shape)
    scales = count // packing.block if packing.block else shape[0]
    bits = packing.bits if packing.block else 8
    zeros = -(-scales * bits // 8) if packing.block else 0
    return -(-count * bits // 8) + 4 * scales + zeros


def pack(weight: NDArray[np.float32], packing: Packing) -> Packed:
    """`weight` (float32 and finite, output channels first) as integers; `packing` fits its shape.

    The codes are those nearest to the weights, given the scales.
    """
    rows = weight.shape[0]
    table = weight.reshape(rows, -1)
    columns = table.shape[1]
    size = packing.block or columns
    codes = np.empty((rows, columns), np.uint8 if packing.block else np.int8)
    scales = np.empty((rows, columns // size), np.float32)
    zeros = np.zeros(scales.shape, np.uint8) if packing.block else None
    for part in _chunks(rows, columns):
        blocks = _blocks(table[part], size)
        if zeros is None:
            found, scales[part] = _symmetric(blocks, packing.bits)
        else:
            found, scales[part], zeros[part] = _affine(blocks, packing.bits)
        codes[part] = found.reshape(codes[part].shape)
    return Packed(codes, scales, zeros)


def _symmetric(blocks: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    most = np.float32(2 ** (bits - 1) - 1)
    scales = _legal(np.abs(blocks).max(axis=2) / most)
    return np.clip(np.rint(blocks / scales[..., None]), -most, most), scales


def _affine(
    blocks: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    most = np.float32(2**bits - 1)
    low = np.minimum(blocks.min(axis=2), 0)
    # shares, so that a difference of large values cannot become infinite
    scales = _legal(np.maximum(blocks.max(axis=2), 0) / most - low / most)
    zeros = np.clip(np.rint(-low / scales), 0, most)
    return np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, most), scales, zeros


def _legal(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """`scales`, with 1 for blocks whose weights are all 0, or so small that float32 has no normal scale for them."""
    legal: NDArray[np.float32] = np.where(scales >= np.finfo(np.float32).tiny, scales, 1).astype(np.float32)
    return legal


def _blocks(table: NDArray[Any], size: int) -> NDArray[Any]:
    return table.reshape(table.shape[0], -1, size)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))
