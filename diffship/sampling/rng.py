"""Explicit noise: torch's CPU generator without torch, and Philox keyed by (seed, image, step).

A source of noise is an immutable value: `draw` returns the noise and the source that stands after it, so a Trajectory
that holds one can be copied, packed and resumed without sharing hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS, check_range

Floats = NDArray[np.float32]
INITIAL = 0  # the `step` of the first latents; call i draws at step i + 1
VAE_STEP = 1 << 32  # the `step` of the VAE's posterior sample of a masked image
WHOLE_STEP = VAE_STEP + 1  # and of the whole image, where strength is below 1
_WORDS = 624  # of MT19937's state
_VECTOR = 16  # from this size on, torch fills in blocks of 16


class Noise(Protocol):
    """A source of standard normal float32 noise."""

    def draw(self, shape: Sequence[int], step: int) -> tuple[Floats, Noise]:
        """Noise of `shape`, and the source after the draw; `step` names the draw for sources that need no order."""
        ...


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`; `randn` equals `torch.randn` to 5e-7, draw after draw.

    MT19937 (Matsumoto and Nishimura 1998) seeded with the low 32 bits of the seed; Box-Muller as in ATen's
    `DistributionTemplates.h`, in float32 blocks of 16 from 16 elements on, in double and one by one below.
    """

    def __init__(self, seed: int) -> None:
        check_range("seed", seed, *LIMITS.seed)
        self._bits = np.random.MT19937(0)
        np.random.RandomState(self._bits).seed(seed & 0xFFFFFFFF)  # init_genrand, as torch seeds
        self._spare: float | None = None

    @classmethod
    def from_state(cls, key: NDArray[np.uint32], pos: int, spare: float | None) -> TorchGenerator:
        """The generator whose `state()` this was; raises ConfigError for anything that cannot be one."""
        check_range("position in MT19937's state", pos, 0, _WORDS)
        if key.shape != (_WORDS,) or key.dtype != np.uint32:
            raise ConfigError(f"MT19937's state is 624 words of uint32, got {key.dtype} {key.shape}")
        if spare is not None and not math.isfinite(spare):
            raise ConfigError(f"the spare normal is {spare}; it must be finite")
        generator = cls.__new__(cls)
        generator._bits = np.random.MT19937(0)
        generator._bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": pos}}
        generator._spare = spare
        return generator

    def state(self) -> tuple[NDArray[np.uint32], int, float | None]:
        """MT19937's 624 words, the position in them, and the second half of the last double Box-Muller pair."""
        inner = self._bits.state["state"]
        return np.array(inner["key"], np.uint32), int(inner["pos"]), self._spare

    def randn(self, shape: Sequence[int]) -> Floats:
        """float32 noise, as `torch.randn(shape, generator=...)` would give now."""
        size = math.prod(shape)
        flat = self._blocks(size) if size >= _VECTOR else self._singly(size)
        return flat.reshape(tuple(shape))

    def _blocks(self, size: int) -> Floats:
        uniform = self._uniform24(size)
        whole = size - size % _VECTOR
        uniform[:whole] = _box_muller16(uniform[:whole])
        if whole < size:  # the last 16 are drawn anew, over normals that are already there
            uniform[-_VECTOR:] = _box_muller16(self._uniform24(_VECTOR))
        return uniform

    def _singly(self, size: int) -> Floats:
        return np.array([self._normal() for _ in range(size)], np.float32)

    def _normal(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u1, u2 = self._uniform53(), self._uniform53()
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform24(self, size: int) -> Floats:
        words = self._bits.random_raw(size)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _uniform53(self) -> float:
        high, low = self._bits.random_raw(2).tolist()
        return float(((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53)


def _box_muller16(uniform: Floats) -> Floats:
    blocks = uniform.reshape(-1, 2, 8)
    # float32 where torch rounds and it matters (the angle), float64 elsewhere, so that math libraries hardly differ
    radius = np.sqrt(-2.0 * np.log(1.0 - blocks[:, 0].astype(np.float64)))
    theta = (np.float32(2.0 * math.pi) * blocks[:, 1]).astype(np.float64)
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], 1).astype(np.float32).reshape(-1)


def torch_randn(seed: int, shape: Sequence[int]) -> Floats:
    """`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`, to 5e-7."""
    return TorchGenerator(seed).randn(shape)


@brief
@dataclass(frozen=True, eq=False)
class TorchNoise:
    """A TorchGenerator frozen at one place of its stream: torch's order matters, `step` does not."""

    key: NDArray[np.uint32]
    pos: int
    spare: float | None = None

    @classmethod
    def seeded(cls, seed: int) -> TorchNoise:
        return cls(*TorchGenerator(seed).state())

    def draw(self, shape: Sequence[int], step: int = 0) -> tuple[Floats, TorchNoise]:
        generator = TorchGenerator.from_state(self.key, self.pos, self.spare)
        return generator.randn(shape), TorchNoise(*generator.state())


@brief
@dataclass(frozen=True)
class Philox:
    """Philox4x64-10 (Salmon et al. 2011) with key (seed, image) and counter (0, 0, step, 0).

    Any step's noise is computable without the earlier ones, on any device: word n gives normals 2n and 2n + 1 by
    Box-Muller, radius from its high 32 bits as (h + 1) / 2**32, angle from its low 32 bits as 2 pi l / 2**32.
    """

    seed: int
    image: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, *LIMITS.seed)
        check_range("image", self.image, 0, (1 << 31) - 1)

    def draw(self, shape: Sequence[int], step: int) -> tuple[Floats, Philox]:
        return self.normal(shape, step), self

    def normal(self, shape: Sequence[int], step: int) -> Floats:
        """float32 noise of `shape` for `step`."""
        size = math.prod(shape)
        key, counter = np.array([self.seed, self.image], np.uint64), np.array([0, 0, step, 0], np.uint64)
        words = np.random.Philox(counter=counter, key=key).random_raw((size + 1) // 2)
        radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)) + np.uint64(1)).astype(np.float64) * 2.0**-32))
        theta = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * math.pi * 2.0**-32)
        pairs = np.stack([radius * np.cos(theta), radius * np.sin(theta)], 1).astype(np.float32)
        return pairs.reshape(-1)[:size].reshape(tuple(shape))


NOISES = ("torch", "philox")


def make_noise(kind: str, seed: int, image: int = 0) -> Noise:
    """Image `image` of a request: `torch` seeds a generator with seed + image, `philox` keys one with both.

    Raises:
        ConfigError: another kind, or a seed out of range.
    """
    check_range("seed", seed, *LIMITS.seed)
    if kind == "torch":
        return TorchNoise.seeded(seed + image)
    if kind == "philox":
        return Philox(seed, image)
    raise ConfigError(f"rng is {kind!r}; legal is {' or '.join(NOISES)}")
