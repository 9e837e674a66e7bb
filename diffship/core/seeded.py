"""Weights drawn from a seed: an architecture of any size without a file, the same bits on every machine.

Only the generator's raw integers and one rounded multiplication and addition are used, so neither numpy's version nor
the processor's vector width changes a value (numpy does not promise that for its normal distributions).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffship.core.described import Described
from diffship.core.dtype import TensorMeta
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

_CHUNK = 1 << 16  # values per draw: stays in the second-level cache; a multiple of 4 keeps whole 64-bit words


@dataclass(frozen=True)
class Spread:
    """Values are uniform with this mean and standard deviation."""

    mean: float
    std: float


Init = Callable[[str, TensorMeta], Spread]


def usual_init(name: str, meta: TensorMeta) -> Spread:
    """Spreads that keep activations of order one through a deep network, also in float16.

    Linear and convolution kernels (out, in, ...) get std = sqrt(1 / fan_in) (LeCun et al. 1998, "Efficient BackProp"),
    norms a gain near 1, biases 0.02, token and position embeddings 0.02 as in CLIP.
    """
    last = name.rsplit(".", 1)[-1]
    if last in ("bias", "running_mean"):
        return Spread(0.0, 0.02)
    if len(meta.shape) < 2:
        return Spread(1.0, 0.05)
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return Spread(0.0, 0.02)
    return Spread(0.0, math.sqrt(1 / max(math.prod(meta.shape[1:]), 1)))


class SeededWeights(Described):
    """Tensors drawn when they are read, each by its own generator: sha256(seed, name) keys numpy's SFC64.

    `metas` may hold float32 and float16 tensors; integer ones become 0, 1, 2, ... along the last axis (position ids).
    The same seed and name give the same values, whatever else is read, and in which order.
    """

    def __init__(self, metas: Mapping[str, TensorMeta], seed: int, init: Init = usual_init) -> None:
        for name, meta in metas.items():
            if meta.dtype not in ("float32", "float16") and not _is_integer(meta):
                raise ConfigError(f"tensor {name}: seeded weights are float32 or float16, not {meta.dtype}")
        super().__init__(metas)
        self._seed = seed
        self._init = init

    def read(self, name: str) -> NDArray[np.generic]:
        meta = self.meta(name)
        if _is_integer(meta):
            row = np.arange(meta.shape[-1] if meta.shape else 1, dtype=meta.storage)
            return np.broadcast_to(row, meta.shape).copy() if meta.shape else row.reshape(())
        generator = np.random.SFC64(_key(self._seed, name))
        spread = self._init(name, meta)
        draw = _draw_float32 if meta.dtype == "float32" else _draw_float16
        return draw(generator, meta.count, spread).reshape(meta.shape)


def _is_integer(meta: TensorMeta) -> bool:
    return meta.dtype.startswith(("int", "uint"))


def _key(seed: int, name: str) -> list[int]:
    return list(struct.unpack("<8I", hashlib.sha256(f"{seed}\0{name}".encode()).digest()))


def _draw_float32(generator: np.random.SFC64, count: int, spread: Spread) -> NDArray[np.generic]:
    out = np.empty(count, np.float32)
    scale = np.float32(spread.std * math.sqrt(3) / 2**31)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        words = generator.random_raw(-(-part.size // 2)).astype("<u8", copy=False)
        np.multiply(words.view("<i4")[: part.size], scale, out=part, dtype=np.float32, casting="same_kind")
        if spread.mean:
            part += np.float32(spread.mean)
    return out


def _draw_float16(generator: np.random.SFC64, count: int, spread: Spread) -> NDArray[np.generic]:
    # 65 536 equally spaced values by table: numpy's conversion to float16 costs six times as much
    levels = np.arange(65536, dtype=np.float32) - np.float32(32767.5)
    table = (levels * np.float32(spread.std * math.sqrt(3) / 2**15) + np.float32(spread.mean)).astype(np.float16)
    out = np.empty(count, np.float16)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        words = generator.random_raw(-(-part.size // 4)).astype("<u8", copy=False)
        np.take(table, words.view("<u2")[: part.size].astype(np.intp), out=part, mode="wrap")
    return out
