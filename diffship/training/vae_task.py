"""The task of teaching a cheap auto-encoder the latents of a KL one: what the training loop runs.

Encoder and decoder learn apart, each against the frozen teacher, so that latents stay what a U-Net knows:

    encoder          mean |E(x) - z|,  z drawn from the teacher's posterior and scaled as the U-Net has it
    decoder          w_pixel mean |x - D(z')| + w_perceptual LPIPS(x, D(z')) + w_adversarial lambda (-mean C(D(z')))
    discriminator    hinge of C(x) and C(D(z')), both augmented

x is a picture, or what the teacher's decoder makes of its latents. z' = z (1 - u) with u from 0 to `shrink`: a decoder
that learnt this gives contrast and colour back to latents that are a little small, as a U-Net draws them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.core.weights import Weights
from diffship.models.pipeline import Pipeline
from diffship.training.adversarial import (
    Discriminator,
    adaptive_weight,
    augmented,
    hinge,
    last_weight,
    recoloured,
    worst_half,
)
from diffship.training.distillation_data import Encoder, Latents, signed
from diffship.training.paired import PairedPictures
from diffship.training.perceptual import Features, distance

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

ENCODER, DECODER, DISCRIMINATOR = "vae_encoder", "vae_decoder", "discriminator"


@dataclass(frozen=True)
class Turns:
    """Which modules learn when. Before step `start` encoder and decoder do, together; for the next `alone` steps the
    discriminator; then, over and over, the decoder once, the encoder once and the discriminator `updates` times.

    Without a `start` there is no discriminator. `encoder`: whether the student has one of its own.
    """

    start: int | None
    alone: int = 0
    updates: int = 5
    encoder: bool = True

    @property
    def cycle(self) -> tuple[str, ...]:
        """The modules that learn one after the other in the adversarial phase."""
        return (DECODER, *((ENCODER,) if self.encoder else ()), *(DISCRIMINATOR,) * self.updates)

    def at(self, step: int) -> tuple[str, ...]:
        """The modules that learn at `step`."""
        if self.start is None or step < self.start:
            return (ENCODER, DECODER) if self.encoder else (DECODER,)
        later = step - self.start - self.alone
        return (DISCRIMINATOR,) if later < 0 else (self.cycle[later % len(self.cycle)],)

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator has a say at `step`."""
        return self.start is not None and step >= self.start

    def learnt(self, module: str, step: int) -> int:
        """How often `module` has learnt before `step`."""
        if module not in (*self.cycle, *self.at(0)):
            return 0
        together = step if self.start is None else min(step, self.start)
        rounds, rest = divmod(max(0, step - together - self.alone), len(self.cycle))
        later = rounds * self.cycle.count(module) + self.cycle[:rest].count(module)
        return later + (min(step - together, self.alone) if module == DISCRIMINATOR else together)


@dataclass(frozen=True)
class Draw:
    """The choices of one sample: `posterior` is unit normal; `mix` (3, 3) and `blend` (3,) recolour it, if there."""

    row: int
    flip: bool
    posterior: Tensor
    mix: Tensor | None = None
    blend: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """Draws samples one after the other. shape: of one latent. flip: mirror every other picture. colour: the share of
    pictures that are recoloured."""

    count: int
    shape: tuple[int, int, int]
    flip: bool = False
    colour: float = 0.0

    def __call__(self, batch: int, generator: torch.Generator) -> list[Draw]:
        return [self._one(generator) for _ in range(batch)]

    def _one(self, generator: torch.Generator) -> Draw:
        row = int(torch.randint(self.count, (), generator=generator))
        flip = self.flip and int(torch.randint(2, (), generator=generator)) == 1
        posterior = torch.randn(self.shape, generator=generator)
        if float(torch.rand((), generator=generator)) >= self.colour:
            return Draw(row, flip, posterior)
        mix = 0.5 + torch.randn(3, 3, generator=generator)
        return Draw(row, flip, posterior, mix, torch.rand(3, generator=generator))


@dataclass(frozen=True)
class Losses:
    """Weights of the decoder's terms, and what it learns on. shrink: the most that latents are made smaller by.
    filter_every: how often the decoder learns on the worse half of the pixels, 0 for never. taught: the target is the
    teacher's picture. disc_augment: the discriminator sees augmented pictures."""

    pixel: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5
    shrink: float = 0.25
    filter_every: int = 3
    taught: bool = False
    disc_augment: bool = True


@dataclass(frozen=True)
class Half:
    """A half of an auto-encoder: `module` as `Component.module` makes it, and its own scale of latents.

    What a U-Net knows is (latents - shift) * scale, in `channels` channels.
    """

    module: Any
    channels: int
    scale: float
    shift: float = 0.0

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1], not clamped, of latents as a U-Net has them."""
        return torch.as_tensor(self.module(latents / self.scale + self.shift)[0].float())

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents as a U-Net has them; of a KL auto-encoder the posterior's mean."""
        return torch.as_tensor((self.module(pictures)[0][:, : self.channels].float() - self.shift) * self.scale)


@dataclass(frozen=True)
class Teacher:
    """The frozen KL auto-encoder: posteriors that are kept, an encoder for pictures that are changed, a decoder."""

    latents: Latents
    encoder: Encoder
    decoder: Half

    def decode(self, latents: Tensor) -> Tensor:
        """Its pictures, not clamped, in float32 also if the student computes in less."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return self.decoder.decode(latents)


class VaeTeaching:
    """One loss per turn. `encoder` is None if the student keeps its teacher's."""

    def __init__(
        self,
        encoder: Half | None,
        decoder: Half,
        discriminator: Discriminator | None,
        teacher: Teacher,
        pictures: PairedPictures,
        draws: Draws,
        features: Features | None,
        losses: Losses,
        turns: Turns,
        disc_rate: float,
    ) -> None:
        self.encoder, self.decoder, self.discriminator = encoder, decoder, discriminator
        self.teacher, self.pictures, self.draws, self.features = teacher, pictures, draws, features
        self.losses, self.turns = losses, turns
        self.modules: dict[str, nn.Module] = {DECODER: decoder.module.inner}
        if encoder is not None:
            self.modules[ENCODER] = encoder.module.inner
        if discriminator is not None:
            self.modules[DISCRIMINATOR] = discriminator
        for module in self.modules.values():
            module.requires_grad_(True)
        self.rates: Mapping[str, float] = {DISCRIMINATOR: disc_rate}
        self.last = last_weight(decoder.module.inner.decoder)
        self.step = 0

    def begin(self, step: int) -> Collection[str]:
        self.step = step
        return self.turns.at(step)

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pixels, latents = self.batch(batch, generator)
        terms: dict[str, Tensor] = {}
        learning = self.turns.at(self.step)
        if ENCODER in learning and self.encoder is not None:
            terms["latents"] = F.l1_loss(self.encoder.encode(pixels), latents)
        if DECODER in learning:
            every = self.losses.filter_every
            if every and self.turns.learnt(DECODER, self.step) % every == every - 1:
                pixels, latents = self._filtered(pixels, latents)
            terms |= self._decoder_terms(pixels, latents, generator)
        if DISCRIMINATOR in learning:
            terms["discriminator"] = self._discriminator_loss(pixels, latents, generator)
        total = torch.stack(list(terms.values())).sum()
        return total, {name: term.item() for name, term in terms.items()}

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(pictures, their latents as the U-Net has them), recoloured ones encoded anew."""
        samples = self.draws(count, generator)
        device = next(self.decoder.module.parameters()).device
        rows, flips = [s.row for s in samples], [s.flip for s in samples]
        pixels = signed(self.pictures.pixels(rows, flips)).to(device)
        mean, deviation = (tensor.to(device) for tensor in self.teacher.latents.take(rows, flips))
        for at, sample in enumerate(samples):
            if sample.mix is not None and sample.blend is not None:
                one = recoloured(pixels[at : at + 1], sample.mix[None].to(device), sample.blend[None].to(device))
                pixels[at : at + 1] = one
                mean[at : at + 1], deviation[at : at + 1] = self.teacher.encoder.encode(one)
        return pixels, mean + deviation * torch.stack([s.posterior for s in samples]).to(device)

    def _filtered(self, pixels: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ours, theirs = self.decoder.decode(latents), self.teacher.decode(latents)
            masked = worst_half(pixels, ours, theirs)
        return masked, self.teacher.encoder.encode(masked)[0]

    def _decoder_terms(self, pixels: Tensor, latents: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        wanted, drawn = self._target(pixels, latents), self.decoder.decode(self._shrunk(latents, generator))
        terms = {}
        if self.losses.pixel:
            terms["pixel"] = self.losses.pixel * F.l1_loss(drawn, wanted)
        if self.losses.perceptual and self.features is not None:
            terms["perceptual"] = self.losses.perceptual * distance(self.features, drawn, wanted).mean()
        if self.discriminator is not None and self.turns.adversarial(self.step):
            fooled = -self.discriminator(self._seen(drawn, generator)).mean()
            weight = adaptive_weight(torch.stack(list(terms.values())).sum(), fooled, self.last)
            terms["adversarial"] = self.losses.adversarial * weight * fooled
        return terms

    def _discriminator_loss(self, pixels: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        assert self.discriminator is not None  # Turns give it none of them
        with torch.no_grad():
            drawn = self.decoder.decode(self._shrunk(latents, generator))
            real = self._target(pixels, latents)
        real, fake = (self.discriminator(self._seen(side, generator)) for side in (real, drawn))
        return hinge(real, fake)

    def _target(self, pixels: Tensor, latents: Tensor) -> Tensor:
        return self.teacher.decode(latents) if self.losses.taught else pixels

    def _shrunk(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        return latents * (1 - self.losses.shrink * float(torch.rand((), generator=generator)))

    def _seen(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        return augmented(pictures, generator) if self.losses.disc_augment else pictures


def halves_of(pipeline: Pipeline, device: str) -> tuple[Half, Half]:
    """(encoder, decoder) of a pipeline, loaded in float32."""
    family = pipeline.family
    facts = (family.latent_channels, family.scaling_factor, family.shift_factor)
    made = [Half(half.module(device), *facts) for half in (pipeline.encoder, pipeline.decoder)]
    return made[0], made[1]


def averages_of(state: Weights) -> dict[str, str]:
    """{name in the auto-encoder: name in a checkpoint} of the averaged weights of both halves."""
    heads = [f"average/{half}/" for half in (ENCODER, DECODER)]
    return {name.removeprefix(head): name for head in heads for name in state.names() if name.startswith(head)}


def spread_rows(count: int, most: int) -> Sequence[int]:
    """At most `most` rows that lie evenly over `count`."""
    most = min(count, most)
    return [at * count // most for at in range(most)]
