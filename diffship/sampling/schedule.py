"""The noise schedule of training: betas, cumulative alphas and sigmas, bit for bit as diffusers (float32) has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError
from diffship.core.registry import SPACINGS
from diffship.core.strict import bounded, bounds, choices

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
PREDICTIONS_OF_BETAS = ("epsilon", "v_prediction", "sample")
_ALMOST_ZERO_SNR = np.float32(2.0**-24)
R = TypeVar("R")


@dataclass(frozen=True)
@bounded
class Schedule:
    """What every scheduler_config.json says of training and of the timestep grid; keys and defaults are diffusers'."""

    num_train_timesteps: int = field(default=1000, metadata=bounds(2, 10_000))
    beta_start: float = field(default=0.0001, metadata=bounds(1e-12, 0.999))
    beta_end: float = field(default=0.02, metadata=bounds(1e-12, 0.999))
    beta_schedule: str = field(default="linear", metadata=choices("linear", "scaled_linear", "squaredcos_cap_v2"))
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = field(default="epsilon", metadata=choices(*PREDICTIONS_OF_BETAS))
    timestep_spacing: str = field(default="leading", metadata=choices(*SPACINGS))
    steps_offset: int = field(default=0, metadata=bounds(0, 1000))

    def __post_init__(self) -> None:
        betas = self.trained_betas
        if betas is None:
            return
        if len(betas) != self.num_train_timesteps:
            raise ConfigError(f"trained_betas has {len(betas)} entries for {self.num_train_timesteps} timesteps")
        if not all(0.0 < beta < 1.0 for beta in betas):
            raise ConfigError("trained_betas has an entry that is not between 0 and 1")

    @property
    def zero_snr(self) -> bool:
        """Whether the betas are rescaled to zero terminal SNR (Lin et al. 2023, algorithm 1)."""
        return bool(getattr(self, "rescale_betas_zero_snr", False))

    def alphas_cumprod(self) -> F32:
        """Product of (1 - beta) up to each timestep, float32 (num_train_timesteps,); read-only."""
        return remembered(_alphas_cumprod, self)

    def sigmas(self) -> F32:
        """sqrt((1 - a) / a) for each timestep, float32; finite even at zero terminal SNR, as in diffusers."""
        alphas = self.alphas_cumprod()
        if self.zero_snr:
            alphas = alphas.copy()
            alphas[-1] = _ALMOST_ZERO_SNR
        return np.asarray(np.sqrt((np.float32(1) - alphas) / alphas), np.float32)

    def grid(self, points: int, ratio: float, last: int | None = None) -> F64:
        """Timesteps, largest first (Lin et al. 2023, table 2); linspace unrounded, `ratio` is trailing's stride."""
        last = self.num_train_timesteps if last is None else last
        if self.timestep_spacing == "linspace":
            return np.asarray(np.linspace(0, last - 1, points)[::-1], np.float64)
        if self.timestep_spacing == "leading":
            return np.arange(points, dtype=np.float64)[::-1] * (last // points) + self.steps_offset
        return np.asarray(np.round(np.arange(last, 0, -ratio)) - 1.0, np.float64)


def remembered(compute: Callable[..., R], owner: Hashable, *numbers: int) -> R:
    """`compute(owner, *numbers)`, cached; `owner` is a schedule or a sampler, and `compute` has an `lru_cache`.

    An owner with `trained_betas` keeps its own results instead, which are freed with it: such schedules are large and
    slow to hash, and a client may send as many of them as it likes.
    """
    if getattr(owner, "trained_betas", None) is None:
        return compute(owner, *numbers)
    own: dict[Hashable, R] = owner.__dict__.setdefault("_remembered", {})
    key = (compute, numbers, tuple(map(type, numbers)))
    if key not in own:
        own[key] = compute.__wrapped__(owner, *numbers)  # type: ignore[attr-defined]
    return own[key]


@lru_cache(maxsize=64)
def _alphas_cumprod(schedule: Schedule) -> F32:
    betas = _betas(schedule)
    if schedule.zero_snr:
        betas = _zero_terminal_snr(betas)
    alphas = _cumprod(np.float32(1) - betas)
    if alphas[0] >= 1 or alphas[-2] <= 0 or (alphas[-1] <= 0 and not schedule.zero_snr):
        raise ConfigError(
            f"these betas run from {betas[0]:g} to {betas[-1]:g}: no noise at first, or no signal at last"
        )
    alphas.flags.writeable = False
    return alphas


def _betas(schedule: Schedule) -> F32:
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, np.float32)
    if schedule.beta_schedule == "linear":
        return linspace(start, end, count)
    if schedule.beta_schedule == "scaled_linear":
        return linspace(start**0.5, end**0.5, count) ** 2
    cosine = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - cosine[i + 1] / cosine[i], 0.999) for i in range(count)], np.float32)


def linspace(start: float, end: float, count: int) -> F32:
    """torch.linspace in float32, bit for bit."""
    # torch counts from both ends in float32 with fused multiply-add; one float64 rounding is the same
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _cumprod(values: F32) -> F32:
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: F32) -> F32:
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    bar = root**2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def known(config: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The entries of a scheduler config that a sampler has fields for, `-Infinity` as if it were absent."""
    return {key: value for key, value in config.items() if key in names and value != -math.inf}
