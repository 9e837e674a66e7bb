"""Latent consistency distillation (Luo et al., arXiv 2310.04378, algorithm 1): the loss, apart from any network.

A consistency model maps a noisy latent at any time straight to the clean one, so that a few calls draw a picture. It
learns this from two neighbouring points of the teacher's guided trajectory: what it says at the noisier one is to be
what it says (without gradient) at the other.

`Path` is all that depends on the kind of teacher. `Diffusion` is that of noise and v prediction; a teacher of flow
matching needs a path of its own and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from diffship.core.lazy import lazy
from diffship.sampling.process import Level, cumulative

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
HUBER_C = 0.001
LOSSES = ("huber", "l2")
PREDICTIONS = ("epsilon", "v_prediction")  # of `Diffusion`

Predict: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"  # (latents, timesteps) -> output of a network
PredictBoth: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"  # with the caption, and without it


class Path(Protocol):
    """How clean latents and noise mix over time, and what a network's output says of both."""

    def mix(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noisy latents at `times` (n,)."""
        ...

    def split(self, output: Tensor, noisy: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(clean, noise) as the network's `output` has them; `mix` puts them together again."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. `alphas` is a, (timesteps,) float32; `prediction` epsilon or v."""

    alphas: Tensor
    prediction: str

    def mix(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        mixed: Tensor = self._at(times, clean).mix(clean, noise)
        return mixed

    def split(self, output: Tensor, noisy: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(times, noisy).split(self.prediction, noisy, output)

    def _at(self, times: Tensor, like: Tensor) -> Level:
        return cumulative(per_sample(self.alphas.to(times.device)[times], like))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, ...) with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def boundary(times: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of the consistency function at `times` (n,): exactly 1 and 0 at time 0 (LCM, eq. 9)."""
    scaled = times.float() * TIMESTEP_SCALING
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def distance(first: Tensor, second: Tensor, kind: str) -> Tensor:
    """Mean over all elements of the squared difference (`l2`), or of the pseudo-Huber sqrt(d^2 + c^2) - c."""
    squared = (first.float() - second.float()).square()
    return squared.mean() if kind == "l2" else ((squared + HUBER_C**2).sqrt() - HUBER_C).mean()


@dataclass(frozen=True)
class Consistency:
    """The loss. `span` timesteps lie between the two points (1000 / 50 as published); `kind` is one of LOSSES."""

    path: Path
    span: int
    kind: str = "huber"

    def clean(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """What the model says the clean latents are: c_skip x + c_out x_0(output)."""
        skip, out = (per_sample(values, noisy) for values in boundary(times))
        return skip * noisy + out * self.path.split(output, noisy, times)[0]

    def step(self, outputs: tuple[Tensor, Tensor], noisy: Tensor, times: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, timesteps) `span` earlier on the guided trajectory, by one step of DDIM (or of Euler on a flow).

        `outputs` are the teacher's with the caption and without; p = p_c + w (p_c - p_u) for clean latents and noise.
        """
        weight, earlier = per_sample(w, noisy), (times - self.span).clamp(min=0)
        pairs = zip(*(self.path.split(output, noisy, times) for output in outputs), strict=True)
        clean, noise = (given + weight * (given - without) for given, without in pairs)
        return self.path.mix(clean, noise, earlier), earlier

    def loss(
        self, noisy: Tensor, times: Tensor, w: Tensor, student: Predict, teacher: PredictBoth, target: Predict
    ) -> Tensor:
        """A scalar with the gradient of `student`; `noisy` (n, ...), `times` (n,) integers, `w` (n,)."""
        # the student comes first: autocast keeps the halves of weights that it meets, and these need their gradient
        said = self.clean(student(noisy, times), noisy, times)
        with torch.no_grad():
            before, earlier = self.step(teacher(noisy, times), noisy, times, w)
            wanted = self.clean(target(before, earlier), before, earlier)
        return distance(said, wanted, self.kind)
