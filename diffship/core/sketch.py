"""A short vector that stands for a tensor of any size, so that hundreds of references fit in a bundle.

Count sketch (Charikar, Chen and Farach-Colton 2002, "Finding frequent items in data streams"): every value gets a sign
from a stream that its name fixes, and values at equal places modulo SIZE are added. Sums keep the energy of an error,
so PSNR of two sketches is that of the tensors, to a few per cent; tensors of at most SIZE values are kept as they are.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

SIZE = 4096


def sketch(name: str, array: NDArray[np.generic]) -> NDArray[np.float32]:
    """At most SIZE float32 values of `array`, in C order; equal names and sizes have equal signs on every machine."""
    values = np.asarray(array, np.float64).reshape(-1)
    if values.size <= SIZE:
        return values.astype(np.float32)
    rows = -(-values.size // SIZE)
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(-(-values.size // 8)), np.uint8)
    signs = np.unpackbits(bits, count=values.size).astype(np.int8)
    padded = np.zeros(rows * SIZE)
    np.multiply(values, 1 - 2 * signs, out=padded[: values.size])
    total: NDArray[np.float32] = padded.reshape(rows, SIZE).sum(0).astype(np.float32)
    return total
