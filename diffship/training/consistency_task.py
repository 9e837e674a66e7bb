"""The task of latent consistency distillation for U-Nets: what the training loop runs.

`full` trains a U-Net that takes guidance as an embedding, against the average of its own weights. `lora` trains
low-rank changes: the target is the student itself, the teacher the same U-Net without them, or another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.core.lazy import lazy
from diffship.sampling.guidance import guidance_embedding
from diffship.training.adapters import switched_off
from diffship.training.consistency import Consistency
from diffship.training.distillation import Draw, Draws, exactly, fitted
from diffship.training.distillation_data import Captions, Latents

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class GuidedDraws:
    """Samples, each with its guidance: w evenly from [w_min, w_max]. Drawn one after the other, as `Draws` does."""

    draws: Draws
    w_min: float
    w_max: float

    def __call__(self, count: int, generator: torch.Generator) -> tuple[list[Draw], list[float]]:
        samples, guidances = [], []
        for _ in range(count):
            samples += self.draws(1, generator)
            share = float(torch.rand((), generator=generator))
            guidances.append(self.w_min + share * (self.w_max - self.w_min))
        return samples, guidances


class ConsistencyTask:
    """One loss per batch. `student` and `teacher` are U-Nets as `Component.module` makes them.

    student: with LoRA layers, or with `embedding` (the width of the guidance embedding) taking that as its last input.
    teacher: None is the student with its LoRA layers switched off. Of the student's parameters those are trained that
    require a gradient. part: what checkpoints call the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        draws: GuidedDraws,
        latents: Latents,
        captions: Captions,
        consistency: Consistency,
        embedding: int | None,
        part: str,
    ) -> None:
        self.student: Any = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules: dict[str, Any] = {part: self.student.inner}
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.teacher.requires_grad_(False)
            self.modules["teacher"] = self.teacher.inner
        self.draws, self.latents, self.captions = draws, latents, captions
        self.consistency, self.embedding = consistency, embedding
        self._target: dict[str, Tensor] = {}

    def follow(self, averages: Mapping[str, Tensor]) -> None:
        """The loop's averaged weights, which change in place, become the target of the full form."""
        if self.embedding is not None:
            self._target = {f"inner.{name.removeprefix('unet/')}": value for name, value in averages.items()}

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        samples, guidances = self.draws(batch, generator)
        noisy, times = self._noisy(samples)
        w = torch.tensor(guidances, device=noisy.device)
        given, dropped = self.captions([s.caption for s in samples]), self.captions([None] * batch)
        more = () if self.embedding is None else (self._embedded(guidances),)

        def student(latents: Tensor, at: Tensor) -> Tensor:
            output: Tensor = self.student(_laid(latents), at.float(), *given, *more)[0].float()
            return output

        def teacher(latents: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            return self._taught(latents, at, given), self._taught(latents, at, dropped)

        def target(latents: Tensor, at: Tensor) -> Tensor:
            feeds = (_laid(latents), at.float(), *given, *more)
            return torch.func.functional_call(self.student, self._target, feeds)[0].float()  # type: ignore[no-any-return]

        return self.consistency.loss(noisy, times, w, student, teacher, target), {}

    def _noisy(self, samples: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        device = next(self.student.parameters()).device
        mean, deviation = self.latents.take([s.row for s in samples], [s.flip for s in samples])
        clean = mean.to(device) + deviation.to(device) * torch.stack([s.posterior for s in samples]).to(device)
        noise = torch.stack([s.noise for s in samples]).to(device)
        times = torch.tensor([s.step for s in samples], device=device)
        return self.consistency.path.mix(clean, noise, times), times

    def _embedded(self, guidances: Sequence[float]) -> Tensor:
        assert self.embedding is not None
        rows = np.stack([guidance_embedding(w, self.embedding) for w in guidances])
        return torch.from_numpy(rows).to(next(self.student.parameters()).device)

    def _taught(self, latents: Tensor, times: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        feeds = (_laid(latents), times.float(), *conditions)
        if self.teacher is None:
            with switched_off(self.student):
                output: Tensor = self.student(*feeds)[0].float()
            return output
        with exactly(self.teacher):
            output = self.teacher(*fitted(self.teacher, feeds))[0].float()
        return output


def _laid(latents: Tensor) -> Tensor:
    return latents.contiguous(memory_format=torch.channels_last)
