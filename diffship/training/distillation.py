"""Distil a U-Net into a smaller one, or train it without a teacher: the task that the training loop runs.

Loss (BK-SDM, arXiv 2305.15798, eq. 1-4; Hybrid SD and KOALA alike), e the student's output, e_T the teacher's, y the
target of plain training (the noise, or v), f_j and f_Tj paired features:

    w_task MSE(e, y) + w_out MSE(e, e_T) + w_feat sum_j MSE(f_j, f_Tj)

The first term alone is the loss of diffusion models (Ho et al., arXiv 2006.11239, eq. 14), which needs no teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.sampling.process import Level, cumulative
from diffship.training.diffusion import loss_weight
from diffship.training.distillation_data import Captions, Latents
from diffship.training.distillation_pairs import Pair, Taps
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


@dataclass(frozen=True)
class Draw:
    """The choices of one sample; `caption` None is a dropped one. `posterior` and `noise` are unit normal."""

    row: int
    flip: bool
    caption: str | None
    step: int
    posterior: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Draws:
    """Draws samples one after the other, so that two batches from one generator are the samples of one twice as large.

    timesteps: those to choose from. drop: share of dropped captions. flip: mirror every other picture. shape: of one
    latent, (channels, height, width).
    """

    pictures: PairedPictures
    timesteps: Sequence[int]
    shape: tuple[int, int, int]
    drop: float = 0.1
    flip: bool = False

    def __call__(self, count: int, generator: torch.Generator) -> list[Draw]:
        return [self._one(generator) for _ in range(count)]

    def _one(self, generator: torch.Generator) -> Draw:
        row = _choose(len(self.pictures), generator)
        flip = self.flip and _choose(2, generator) == 1
        kept = float(torch.rand((), generator=generator)) >= self.drop
        caption = self._caption(row, generator) if kept else None
        step = self.timesteps[_choose(len(self.timesteps), generator)]
        posterior, noise = (torch.randn(self.shape, generator=generator) for _ in range(2))
        return Draw(row, flip, caption, step, posterior, noise)

    def _caption(self, row: int, generator: torch.Generator) -> str:
        choices = self.pictures.captions(row)
        # the plain caption half of the time, one of its variants otherwise
        pick = int(torch.randint(-len(choices) + 1, len(choices), (), generator=generator))
        return choices[max(0, pick)]


def _choose(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


@dataclass(frozen=True)
class Losses:
    """Weights of the three terms; `min_snr` weighs samples as the emoji family does (`diffusion.loss_weight`)."""

    task: float = 1.0
    out: float = 1.0
    feat: float = 1.0
    min_snr: bool = False


@dataclass(frozen=True)
class Forward:
    """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020); `alphas` is a, float32."""

    alphas: Tensor
    prediction: str

    def noisy(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        mixed: Tensor = self._at(steps).mix(clean, noise)
        return mixed

    def target(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What the U-Net is to give: noise, v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022), or x_0."""
        wanted: Tensor = self._at(steps).target(self.prediction, clean, noise)
        return wanted

    def weight(self, steps: Tensor) -> Tensor:
        """(n,) min-SNR weights of the squared noise error."""
        alpha = self.alphas.to(steps.device)[steps]
        return loss_weight(alpha / (1 - alpha))

    def _at(self, steps: Tensor) -> Level:
        return cumulative(self.alphas.to(steps.device)[steps][:, None, None, None])


class DistillationTask:
    """One loss per batch. `student` and `teacher` are U-Nets as `Component.module` makes them, the teacher frozen.

    Of the student's parameters those are trained that require a gradient. The teacher is not called if no term needs
    it, and may be None then. part: what checkpoints call the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        pairs: Sequence[Pair],
        draws: Draws,
        latents: Latents,
        captions: Captions,
        forward: Forward,
        losses: Losses,
        part: str,
    ) -> None:
        self.student: Any = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules = {part: self.student.inner}
        self.draws, self.latents, self.captions, self.forward, self.losses = draws, latents, captions, forward, losses
        pairs = pairs if losses.feat else ()
        self.taps = Taps(self.student.inner, [pair.student for pair in pairs])
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.teacher.requires_grad_(False)
            self.modules["teacher"] = self.teacher.inner
            self.teacher_taps = Taps(self.teacher.inner, [pair.teacher for pair in pairs])

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        samples = self.draws(batch, generator)
        feeds, target, steps = self._feeds(samples)
        output, features = self.taps.gather(lambda: self.student(*feeds)[0].float())
        terms = {}
        if self.losses.task:
            terms["task"] = self.losses.task * self._error(output, target, steps)
        if self.losses.out or features:
            expected, wanted = self._taught(feeds)
            if self.losses.out:
                terms["out"] = self.losses.out * self._error(output, expected, steps)
            if features:
                terms["feat"] = self.losses.feat * feature_error(features, wanted)
        total = torch.stack(list(terms.values())).sum()
        return total, {name: term.item() for name, term in terms.items()}

    def _feeds(self, samples: Sequence[Draw]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """What both U-Nets take, the target of plain training, and the timesteps."""
        device = next(self.student.parameters()).device
        mean, deviation = self.latents.take([s.row for s in samples], [s.flip for s in samples])
        clean = mean.to(device) + deviation.to(device) * torch.stack([s.posterior for s in samples]).to(device)
        noise = torch.stack([s.noise for s in samples]).to(device)
        steps = torch.tensor([s.step for s in samples], device=device)
        noisy = self.forward.noisy(clean, noise, steps).contiguous(memory_format=torch.channels_last)
        conditions = self.captions([s.caption for s in samples])
        return (noisy, steps.float(), *conditions), self.forward.target(clean, noise, steps), steps

    def _taught(self, feeds: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        given = fitted(self.teacher, feeds)
        with torch.no_grad(), exactly(self.teacher):
            return self.teacher_taps.gather(lambda: self.teacher(*given)[0].float())

    def _error(self, output: Tensor, wanted: Tensor, steps: Tensor) -> Tensor:
        if not self.losses.min_snr:
            return F.mse_loss(output, wanted)
        errors = F.mse_loss(output, wanted, reduction="none").mean((1, 2, 3))
        return (self.forward.weight(steps) * errors).mean()


def fitted(teacher: nn.Module, feeds: Sequence[Tensor]) -> list[Tensor]:
    """Feeds of a U-Net in the type of its weights, but for timesteps and size conditions, which 16 bits do not hold.

    The U-Net casts these behind their sinusoids.
    """
    kind = next(teacher.parameters()).dtype
    return [feed.to(kind) if place in (0, 2, 3) else feed for place, feed in enumerate(feeds)]


def exactly(teacher: nn.Module) -> AbstractContextManager[Any]:
    """While open, a teacher in 16 bits computes in its own kind of them: under autocast it would meet the student's."""
    first = next(teacher.parameters())
    return nullcontext() if first.dtype == torch.float32 else torch.autocast(first.device.type, enabled=False)


def feature_error(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Sum over pairs of the mean squared difference, in float32."""
    return torch.stack([F.mse_loss(f.float(), w.float()) for f, w in zip(features, wanted, strict=True)]).sum()
